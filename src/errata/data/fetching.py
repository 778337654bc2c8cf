"""Download datasets, and verify them later: each downloaded file has a lock file with its source and hash."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

from errata import files
from errata.data._base import Dataset
from errata.errors import DataError
from errata.progress import OnProgress, ignore

CHUNK = 1 << 20
TIMEOUT = 60.0
"""Seconds without a response after which a download fails."""
OFFLINE = "without network, copy the file into the data folder yourself (`errata data list` shows where)"


@dataclass(frozen=True)
class Lock:
    """Source and hash of a downloaded file, stored next to it as ``NAME.lock.json``."""

    source: str
    """``owner/name:path`` on the hub, or an address."""
    commit: str | None
    """The hub's commit; None for an address."""
    sha256: str
    bytes: int


def data_folder() -> Path:
    """Return the folder of datasets known by name; the environment variable ``ERRATA_DATA`` overrides it."""
    override = os.environ.get("ERRATA_DATA")
    if override:
        return Path(override).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("errata") / "data"


def file_name(dataset: Dataset, variant: str) -> str:
    """Return the file name of a variant."""
    return dataset.files.get(variant) or dataset.files.get("") or f"{dataset.name}.json"


def variant_of(dataset: Dataset, path: Path, records: Sequence[Any] = ()) -> str:
    """Infer the variant of a file from its first records, and among the possible ones from its name.

    Where neither decides, returns the likeliest, usually the dataset's default. ``records``: as in the file.
    """
    variants = tuple(dataset.variants_of(records)) if dataset.variants_of and records else ()
    candidates = variants or dataset.variants
    parts = path.absolute().parts
    for variant in candidates:
        name = Path(file_name(dataset, variant)).parts
        if parts[-len(name) :] == name:
            return variant
    return candidates[0]


def locate(dataset: Dataset, variant: str) -> Path:
    """Return the file of a variant in the data folder. Raises DataError saying how to get it."""
    path = data_folder() / file_name(dataset, variant)
    if path.is_file():
        return path
    name = f"{dataset.name}/{variant}" if variant else dataset.name
    ways = f"get it from {dataset.home}, and put it there under that name"
    if origin(dataset, variant) is not None:
        ways = f"`errata data fetch {name}` downloads it; without network, {ways}"
    raise DataError(
        f"the file of {name} does not exist: expected {path}; {ways}, set ERRATA_DATA to the folder that has it, "
        f"or give its path: {name}@PATH"
    )


def origin(dataset: Dataset, variant: str) -> str | None:
    """Return where a variant's file is downloaded from: a URL, ``owner/name:path`` on the Hub, or None."""
    return dataset.urls.get(variant) or dataset.urls.get("") or dataset.hub


def sha256(path: Path) -> str:
    """Hash a file's bytes. Raises DataError where it cannot be read."""
    try:
        return files.sha256(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def lock_path(path: Path) -> Path:
    """Return the path of a file's lock."""
    return path.with_name(f"{path.name}.lock.json")


def read_lock(path: Path) -> Lock | None:
    """Read the lock of a file; None where there is none. Raises DataError for one that cannot be read."""
    lock = lock_path(path)
    if not lock.is_file():
        return None
    try:
        text = files.read_text(lock, DataError, most=files.MIB)
        return Lock(**files.parse_json(text, DataError))
    except (DataError, TypeError) as error:
        raise DataError(
            f"{lock} is not a lock file of a dataset: {error}; delete it and {path.name}, and fetch again"
        ) from error


def verified_sha256(path: Path) -> str:
    """Return a file's SHA-256. Raises DataError where it differs from its lock's."""
    digest, lock = sha256(path), read_lock(path)
    if lock is not None and lock.sha256 != digest:
        raise DataError(
            f"{path} is not the file that was fetched from {lock.source}: its sha256 is {digest}, the lock "
            f"says {lock.sha256}; delete {lock_path(path).name} if the change is intended, else fetch it again"
        )
    return digest


def fetch_file(
    dataset: Dataset, variant: str, *, revision: str | None = None, endpoint: str | None = None,
    tick: OnProgress = ignore,
) -> Path:  # fmt: skip
    """Download a variant's file into the data folder, write its lock, and return its path.

    From the Hub at ``revision``; without it, at the lock's commit if there is a lock, else at the newest commit,
    which the lock then records. A file that matches its lock is not downloaded again. ``endpoint``: another Hub.
    Raises DataError where the dataset cannot be downloaded, where there is no network, and where a file without
    lock, or a lock of another source, is already there.
    """
    source, target = origin(dataset, variant), data_folder() / file_name(dataset, variant)
    if source is None:
        raise DataError(
            f"{dataset.name} cannot be downloaded; get it from {dataset.home}, and put it at {target}"
        )
    if "://" in source and revision is not None:
        raise DataError(f"{dataset.name} comes from {source}, which has no revisions; omit the revision")
    old = read_lock(target)
    if target.is_file() and old is None:
        raise DataError(f"{target} exists already, without a lock; move it away to fetch it")
    if old is not None and old.source != source:
        raise DataError(f"{target} came from {old.source}, not from {source}; move it and its lock away")
    pinned = old.commit if old else None
    if old and target.is_file() and revision in (None, pinned) and sha256(target) == old.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            if "://" in source:
                download, commit = _from_address(source, Path(folder) / "file", tick), None
            else:
                download, commit = _from_hub(source, revision or pinned, Path(folder), endpoint, dataset)
            _keep(download, Lock(source, commit, sha256(download), download.stat().st_size), old, target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}; set ERRATA_DATA") from error
    return target


def _keep(download: Path, new: Lock, old: Lock | None, target: Path) -> None:
    """Move a downloaded file and its lock into place. Raises DataError where the file differs from its lock."""
    if old is not None and old.commit == new.commit and old.sha256 != new.sha256:
        raise DataError(
            f"{new.source} has changed since the first download: sha256 {new.sha256}, the lock says "
            f"{old.sha256}; delete {lock_path(target)} and {target.name} to take the new one"
        )
    # The lock goes first: a file without its lock would be trusted, a lock without its file is not read.
    _write(lock_path(target), json.dumps(asdict(new), indent=2) + "\n")
    download.replace(target)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _from_address(address: str, target: Path, tick: OnProgress) -> Path:
    """Download a URL. Raises DataError where the server does not respond, or stops before the end."""
    try:
        with urlopen(address, timeout=TIMEOUT) as answer, target.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            received = 0
            for piece in iter(lambda: answer.read(CHUNK), b""):
                file.write(piece)
                received += len(piece)
                tick("fetch", received, max(total, received))
    except (OSError, HTTPException) as error:
        raise DataError(f"{address} cannot be fetched: {error}; {OFFLINE}") from error
    if total and received != total:
        raise DataError(f"{address} stopped after {received} of {total} bytes; try again")
    return target


def _from_hub(
    source: str, revision: str | None, folder: Path, endpoint: str | None, dataset: Dataset
) -> tuple[Path, str | None]:
    """Download a file from the Hub at a revision; return its path and the commit."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    # without network it is an error of the hub's HTTP library, which differs by version: a base of this one
    failures = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError, ValueError))
    repository, _, inside = source.partition(":")
    try:
        commit = HfApi(endpoint=endpoint).dataset_info(repository, revision=revision).sha
        path = hf_hub_download(
            repository, inside, repo_type="dataset", revision=commit, local_dir=folder, endpoint=endpoint
        )
    except failures as error:
        at = f" at revision {revision}" if revision else ""
        raise DataError(
            f"{source}{at} cannot be fetched from the hub: {error}; {OFFLINE}, from {dataset.home}"
        ) from error
    return Path(path), commit
