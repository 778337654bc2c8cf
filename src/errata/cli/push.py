"""errata push: bring an export to the Hugging Face Hub or to a running vLLM server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import _ledger, common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits.pushing import Pushed

app = typer.Typer(no_args_is_help=True, help="Bring an export to where it is used: the Hub, a vLLM server.")

Folder = Annotated[Path, typer.Argument(help="A folder that errata export wrote.")]
Url = Annotated[str, typer.Option("--url", help="Of the server, such as http://localhost:8000.")]


@app.command("hub")
def hub(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME of a model repository; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="A repository that is made is open to everybody.")] = False,
    message: _ledger.Reason = "", repo: _ledger.Repo = None, author: _ledger.Author = "", json: common.Json = False,
) -> None:  # fmt: skip
    """Upload an export as a commit of a repository, with a model card.

    The token is the one of `hf auth login`, or $HF_TOKEN. A folder that was changed since it was exported is refused.
    """
    from errata.edits.pushing import push_to_hub

    pushed = push_to_hub(folder, repository, public=public, message=message)
    _finish(pushed, repo, author, message, json)


@app.command("vllm")
def vllm(
    folder: Annotated[Path, typer.Argument(help="A folder of: errata export --to vllm.")],
    url: Url,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; default: the adapter's folder, named by content.")
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="The adapter's folder as the server sees it; default: as it is here.")
    ] = None,
    message: _ledger.Reason = "", repo: _ledger.Repo = None, author: _ledger.Author = "", json: common.Json = False,
) -> None:  # fmt: skip
    """Have a running vLLM server load an export as a further model, and see that it lists it.

    The server needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; its key is taken from $VLLM_API_KEY.
    """
    from errata.edits.pushing import push_to_vllm

    pushed = push_to_vllm(folder, url, name=name, path=path)
    _finish(pushed, repo, author, message, json)


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="What requests call the model.")],
    url: Url,
    json: common.Json = False,
) -> None:
    """Have a running vLLM server unload an adapter."""
    from errata.edits.pushing import remove_from_vllm

    left = remove_from_vllm(url, name)
    if json:
        common.emit({"removed": name, "models": left})
    else:
        print(f"{name} removed from {url}; it lists {', '.join(left) or 'no models'}")


def _finish(pushed: Pushed, repo: Path | None, author: str, message: str, json: bool) -> None:
    """Record the push in the ledger that the export came from, where there is one, and print the receipt."""
    event = _record(pushed, repo, author, message)
    if json:
        common.emit({**pushed.to_dict(), "event": event})
        return
    print(f"edit {pushed.digest} is at {pushed.place} as {pushed.name}")
    common.table(None, ("", "value"), [(key, str(value)) for key, value in pushed.facts.items()])
    if event is not None:
        print(f"event {event}: recorded in the ledger")


def _record(pushed: Pushed, repo: Path | None, author: str, message: str) -> int | None:
    """Append the event to the ledger that exported the edit; return its number, None where no ledger did."""
    from errata.errors import ConfigError, LedgerError
    from errata.ledger import folders

    try:
        ledger = folders.find(repo)
    except LedgerError:
        if repo is not None:
            raise
        if author:
            raise ConfigError("--author is recorded in a ledger, and there is none here") from None
        return None
    exports = [event for event in ledger.events() if event.kind == "exported"]
    made = next((event for event in reversed(exports) if event.body.get("digest") == pushed.digest), None)
    if made is None:
        if repo is not None:
            raise LedgerError(f"{repo} exported no edit {pushed.digest}")
        return None
    body = {
        "to": f"{pushed.to} {pushed.place}", "edits": made.body.get("edits", []), "folder": pushed.name,
        "digest": pushed.digest,
    }  # fmt: skip
    return ledger.append("exported", body=body, author=author, reason=message).number


VERB = Verb("push", app, order=87)
