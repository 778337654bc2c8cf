"""errata serve: a model and its edits behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import _ledger, common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.serve.server import Served
    from errata.serve.settings import ServerSettings

Name = Annotated[
    str | None, typer.Option("--name", help="What requests call the model; default: its own name.")
]
Address = Annotated[
    str, typer.Option("--host", help="Address to listen on; any but this machine's own needs tokens.")
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
ReadTokens = Annotated[
    Path | None,
    typer.Option("--read-token-file", help="Tokens that may ask, one a line; default: $ERRATA_READ_TOKEN."),
]
WriteTokens = Annotated[
    Path | None,
    typer.Option(
        "--write-token-file",
        help="Tokens that may also change edits, one a line; default: $ERRATA_WRITE_TOKEN.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")]
MaxRows = Annotated[int, typer.Option("--max-rows", min=1, help="Texts continued in one batch.")]
MaxWaiting = Annotated[
    int, typer.Option("--max-waiting", min=0, help="Texts that wait; more are refused (429).")
]
MaxBody = Annotated[int, typer.Option("--max-body", min=1, help="Bytes of a request's body.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that an answer may take.")]
Files = Annotated[list[Path] | None, typer.Option("--edit", "-e", help="An edit file; repeatable.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="lab, a hub name, or a folder; default: the ledger's model and edits."),
]


def command(
    model: ModelName = None, repo: _ledger.Repo = None, edit: Files = None, name: Name = None,
    address: Address = "127.0.0.1", port: Port = 8000, read_token_file: ReadTokens = None,
    write_token_file: WriteTokens = None, max_tokens: MaxTokens = 2048, max_rows: MaxRows = 32,
    max_waiting: MaxWaiting = 128, max_body: MaxBody = 1_000_000, timeout: Timeout = 120.0,
    foreign: common.Foreign = False, device: common.Device = "auto", dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Serve a model, without and with its edits, behind the OpenAI interface.

    Requests name what answers: NAME is the model itself, NAME+all has what is in place in the ledger (or all --edit
    files), NAME+ID one edit, NAME+TAG what was in place at a tag. With a ledger, edits are made, applied, reverted and
    verified at /v1/edits while answers go on. Without --model the model and edits are the ledger's.
    """
    limits = {
        "most_tokens": max_tokens, "most_rows": max_rows, "most_waiting": max_waiting, "most_body": max_body,
        "timeout": timeout,
    }  # fmt: skip
    settings = server_settings(address, port, read_token_file, write_token_file, limits)
    served = open_served(model, repo, edit or [], name, foreign=foreign, device=device, dtype=dtype)
    run(served, settings, json=json)


def server_settings(
    address: str,
    port: int,
    read_token_file: Path | None,
    write_token_file: Path | None,
    limits: dict[str, Any],
) -> ServerSettings:
    """Return the server's settings. Raises ConfigError where the extra is missing, or an address needs tokens."""
    from errata import extras

    extras.need("errata serve", "serve", "fastapi", "uvicorn", "prometheus_client")
    from errata.serve.settings import ServerSettings
    from errata.serve.tokens import Tokens

    return ServerSettings(address, port, Tokens.collect(read_token_file, write_token_file), **limits)


def open_served(
    model: str | None, repo: Path | None, files: list[Path], name: str | None, *, foreign: bool, device: str,
    dtype: str,
) -> Served:  # fmt: skip
    """Open what is to be served: a ledger's model, or a model that is named with edits from files.

    Raises ConfigError where both a ledger and files were named.
    """
    from errata.edits import Edit
    from errata.errors import ConfigError, LedgerError
    from errata.ledger import folders
    from errata.ledger.working import Working
    from errata.serve.server import Served, check_edits, served_name

    if model is not None and repo is None:
        edits = tuple(Edit.load(path) for path in files)
        host = common.open_text_host(model, device, dtype)
        check_edits(host, edits, foreign=foreign)
        return Served(host, name or served_name(model), edits, foreign=foreign)
    if files or foreign:
        raise ConfigError("--edit and --foreign need --model, without --repo: a ledger serves its own edits")
    try:
        ledger = folders.find(repo)
    except LedgerError as error:
        raise ConfigError(f"{error}, or name a model with --model") from error
    with _ledger.open_working(ledger, device=device, dtype=dtype, show=True, model=model) as working:
        host = working.host
    given = model or ledger.settings.model
    options: dict[str, Any] = {
        "model": model,
        "device": None if device == "auto" else device,
        "dtype": None if dtype == "auto" else dtype,
    }
    return Served(
        host, name or served_name(given), ledger=ledger, open_working=lambda own: Working.open(own, **options)
    )


def run(served: Served, settings: ServerSettings, *, json: bool, path: str = "/v1") -> None:
    """Serve until a signal to stop; print where, once it listens."""
    import logging

    from errata.serve.server import Server

    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.WARNING)

    def ready(address: str) -> None:
        names = list(server.desk.catalogue.models())
        if json:
            common.emit({"url": f"{address}{path}", "model": served.name, "models": names})
        else:
            print(f"{served.name} at {address}{path}: {len(names)} names of models; Ctrl-C stops", flush=True)

    server = Server(served, settings, on_ready=ready)
    server.run()


VERB = Verb("serve", command, order=41)
