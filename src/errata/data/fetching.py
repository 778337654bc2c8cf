"""Get a dataset's file, and know it again: beside each fetched file lies a lock with where from and its hash."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

from errata import files
from errata.data._base import Dataset
from errata.errors import DataError

Tick = Callable[[str, int, int], None]

CHUNK = 1 << 20
TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""
OFFLINE = "without network, get the file by another way and put it into the data folder (`errata data list`)"


@dataclass(frozen=True)
class Lock:
    """Where a file came from and what it was; ``NAME.lock.json`` beside it."""

    source: str
    """``owner/name:path`` on the hub, or an address."""
    commit: str | None
    """The hub's commit; None for an address."""
    sha256: str
    bytes: int


def data_folder() -> Path:
    """Folder in which datasets are looked for by name; ``ERRATA_DATA`` moves it."""
    override = os.environ.get("ERRATA_DATA")
    if override:
        return Path(override).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("errata") / "data"


def file_name(dataset: Dataset, variant: str) -> str:
    """Return the name under which a variant's file is looked for."""
    return dataset.files.get(variant) or dataset.files.get("") or f"{dataset.name}.json"


def variant_of(dataset: Dataset, path: Path, records: Sequence[Any] = ()) -> str:
    """Tell the variant a file is of by its first records; among those they leave open, by its usual name.

    The likeliest where neither says anything, which is the dataset's default as a rule. ``records``: as they
    are in the file.
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
        f"the file of {name} is not here: expected {path}; {ways}, set ERRATA_DATA to the folder that has it, "
        f"or name the file: {name}@PATH"
    )


def origin(dataset: Dataset, variant: str) -> str | None:
    """Return where a variant's file is fetched from: an address, ``owner/name:path``, or None."""
    return dataset.urls.get(variant) or dataset.urls.get("") or dataset.hub


def sha256(path: Path) -> str:
    """Hash a file's bytes. Raises DataError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for piece in iter(lambda: file.read(CHUNK), b""):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def lock_path(path: Path) -> Path:
    """Return where the lock of a file lies."""
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
            f"{lock} is no lock of a dataset: {error}; delete it and {path.name}, and fetch anew"
        ) from error


def verified_sha256(path: Path) -> str:
    """Return a file's hash. Raises DataError where it is not what its lock says was fetched."""
    digest, lock = sha256(path), read_lock(path)
    if lock is not None and lock.sha256 != digest:
        raise DataError(
            f"{path} is not the file that was fetched from {lock.source}: its sha256 is {digest}, the lock "
            f"says {lock.sha256}; delete {lock_path(path).name} if the change was meant, else fetch it anew"
        )
    return digest


def fetch_file(
    dataset: Dataset, variant: str, *, revision: str | None = None, endpoint: str | None = None,
    tick: Tick = lambda *_: None,
) -> Path:  # fmt: skip
    """Download a variant's file into the data folder, write its lock, and return its path.

    From the hub at ``revision``; without one, at the commit of the lock if there is one, else at the newest,
    whose commit the lock then keeps. What is there as its lock says is not fetched again. ``endpoint``:
    another hub. Raises DataError where the dataset can be had in neither way, where there is no network, and
    where the lock or a file without lock stands against it.
    """
    source, target = origin(dataset, variant), data_folder() / file_name(dataset, variant)
    if source is None:
        raise DataError(
            f"{dataset.name} cannot be fetched; get it from {dataset.home}, and put it at {target}"
        )
    if "://" in source and revision is not None:
        raise DataError(f"{dataset.name} comes from {source}, which has no revisions; leave it out")
    old = read_lock(target)
    if target.is_file() and old is None:
        raise DataError(f"{target} is there already, without a lock; move it away to fetch it")
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
    """Put a downloaded file and its lock in place. Raises DataError for a file other than the lock says."""
    if old is not None and old.commit == new.commit and old.sha256 != new.sha256:
        raise DataError(
            f"{new.source} now gives another file than at first: sha256 {new.sha256}, the lock says "
            f"{old.sha256}; delete {lock_path(target)} and {target.name} to take the new one"
        )
    # The lock goes first: a file without its lock would be trusted, a lock without its file is not read.
    _write(lock_path(target), json.dumps(asdict(new), indent=2) + "\n")
    download.replace(target)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _from_address(address: str, target: Path, tick: Tick) -> Path:
    """Download what an address gives. Raises DataError where it does not answer, or stops before the end."""
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
    """Download a file of the hub at a revision; return it with the commit."""
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
