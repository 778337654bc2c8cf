"""Bring an export to where it is used: a repository of the Hugging Face Hub, or a running vLLM server.

What is sent is what the export's record names, with the checksums that stand there; a folder that was changed since is
refused. Keys come from the environment and are never arguments.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata import files
from errata.edits.export import _folder as folders
from errata.edits.export._card import CARD, card
from errata.errors import EditError
from errata.host.files import first_line

VLLM_KEY = "VLLM_API_KEY"
"""Environment variable with the key of a vLLM server, as vLLM itself has it."""
TIMEOUT = 60.0
"""Seconds that a server may take to load an adapter."""
LONGEST = 1 << 20
"""Bytes of a server's answer that are read."""


@dataclass(frozen=True)
class Exported:
    """A folder that errata exported, whole and unchanged."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of the edit it was made of."""
        return str(self.record["edit"])

    @property
    def exporter(self) -> str:
        """What kind of export it is."""
        return str(self.record["exporter"])


@dataclass(frozen=True)
class Pushed:
    """The receipt of a push."""

    to: str
    """``hub`` or ``vllm``."""
    place: str
    """Address of the repository or the server."""
    name: str
    """Of the repository, or of the model that requests name."""
    digest: str
    """Of the edit."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as plain data."""
        return {"to": self.to, "place": self.place, "name": self.name, "edit": self.digest, **self.facts}


def read_export(folder: str | os.PathLike[str]) -> Exported:
    """Read an export's record and compare every file with its checksum there.

    Raises EditError for a folder without a record, with a file missing, changed or added.
    """
    target = Path(folder).expanduser()
    path = target / folders.RECORD
    if not path.is_file():
        raise EditError(f"{folder} holds no {folders.RECORD}; name a folder that errata export wrote")
    record, expected = folders.read_record(target)
    if not {"edit", "exporter"} <= set(record):
        raise EditError(f"{path} is damaged: it names no edit or no exporter")
    found = {
        one.relative_to(target).as_posix() for one in target.rglob("*") if one.is_file() or one.is_symlink()
    } - {folders.RECORD}
    for name in sorted(found ^ set(expected)):
        state = "missing" if name in expected else "not part of the export"
        raise EditError(f"{target / name} is {state}; export again")
    for name, checksum in expected.items():
        file = target / name
        if file.is_symlink() or files.sha256(file) != checksum:
            raise EditError(f"{file} is not what was exported; export again")
    return Exported(target, record)


# --- the Hub --------------------------------------------------------------------------------


def push_to_hub(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    public: bool = False,
    message: str = "",
    api: Any = None,
) -> Pushed:
    """Upload an export as a commit of a model repository, which is made, private, where there is none.

    ``repository``: owner/name. ``public``: whether a repository that is made is open to everybody. ``message``: of the
    commit. ``api``: an ``HfApi``; default one with the token that ``hf auth login`` keeps or ``HF_TOKEN`` has. A model
    card is added where the export has none. Raises EditError where the export is not whole or the Hub refuses.
    """
    exported = read_export(folder)
    if exported.exporter == "prompts":
        raise EditError("the Hub holds models: an export of prompts is a file for a client's own code")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    hub = HfApi() if api is None else api
    names = [*sorted(exported.record["files"]), folders.RECORD]
    operations = [CommitOperationAdd(name, str(exported.folder / name)) for name in names]
    if CARD not in names:
        operations.append(CommitOperationAdd(CARD, card(exported.record).encode()))
    try:
        place = str(hub.create_repo(repository, private=not public, exist_ok=True))
        commit = hub.create_commit(
            repository, operations=operations, commit_message=message or f"errata edit {exported.digest}"
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise EditError(f"cannot push to {repository}: {first_line(error)}") from error
    return Pushed(
        "hub", place, repository, exported.digest, {"revision": str(commit.oid), "files": len(operations)}
    )


# --- vLLM -----------------------------------------------------------------------------------


def push_to_vllm(
    folder: str | os.PathLike[str], url: str, *, name: str | None = None, path: str | None = None
) -> Pushed:
    """Have a running vLLM server load an export to ``vllm`` as a further model, and see that it lists it.

    ``url``: of the server, with or without ``/v1``. ``name``: what requests call the model; default the adapter's
    folder, which is named by its content. ``path``: the adapter's folder as the server sees it; default: this one's.
    The server needs ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``. Raises EditError where the export is
    not whole, of another kind, or the server refuses.
    """
    exported = read_export(folder)
    if exported.exporter != "vllm":
        raise EditError(
            f"{folder} is an export to {exported.exporter}; a vLLM server takes one made with --to vllm, whose path "
            "is named by its content"
        )
    adapter = str(exported.record["adapter"])
    name = name or adapter
    place = path or str((exported.folder / adapter).resolve())
    base = _base(url)
    _ask(f"{base}/load_lora_adapter", {"lora_name": name, "lora_path": place})
    listed = served(url)
    if name not in listed:
        raise EditError(
            f"{url} acknowledged {name} and does not list it; it lists {', '.join(listed) or 'none'}"
        )
    return Pushed("vllm", url, name, exported.digest, {"path": place, "models": listed})


def remove_from_vllm(url: str, name: str) -> list[str]:
    """Have a vLLM server unload an adapter; return the models that it still lists. Raises EditError if it refuses."""
    _ask(f"{_base(url)}/unload_lora_adapter", {"lora_name": name})
    return served(url)


def served(url: str) -> list[str]:
    """Return the names of the models that a server lists. Raises EditError for an answer that is no such list."""
    answer: Any = files.parse_json(
        _ask(f"{_base(url)}/models"), lambda reason: EditError(f"{url} lists no models: {reason}")
    )
    try:
        return [str(one["id"]) for one in answer["data"]]
    except (TypeError, KeyError) as error:
        raise EditError(f"{url} lists no models: its answer has not the form of /v1/models") from error


def _base(url: str) -> str:
    """Return the address that requests start with. Raises EditError for one that is not of HTTP."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise EditError(f"expected an address such as http://localhost:8000, found {url!r:.100}")
    base = url.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def _ask(address: str, body: Mapping[str, str] | None = None) -> str:
    """Return the answer to a request, POST where there is a body. Raises EditError with the server's reason."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get(VLLM_KEY):
        headers["Authorization"] = f"Bearer {os.environ[VLLM_KEY]}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data=data, headers=headers)  # _base has checked the scheme
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read(LONGEST).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        reason = " ".join(error.read(500).decode("utf-8", "replace").split())
        hint = (
            "; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            if error.code == 404
            else ""
        )
        raise EditError(f"{address} answered {error.code}: {reason or error.reason}{hint}") from error
    except OSError as error:  # no server, no route, too slow
        raise EditError(f"{address} cannot be reached: {getattr(error, 'reason', None) or error}") from error
