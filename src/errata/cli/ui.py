"""errata ui: the server of errata serve with a page to ask, edit and revert in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from errata.cli import _ledger, common, serve
from errata.cli._verb import Verb

Runs = Annotated[
    list[Path] | None,
    typer.Option("--run", help="Folder of a benchmark run whose board is shown; repeatable."),
]


def command(
    model: serve.ModelName = None, repo: _ledger.Repo = None, edit: serve.Files = None, runs: Runs = None,
    name: serve.Name = None, address: serve.Address = "127.0.0.1", port: serve.Port = 8000,
    read_token_file: serve.ReadTokens = None, write_token_file: serve.WriteTokens = None,
    max_tokens: serve.MaxTokens = 2048, max_rows: serve.MaxRows = 32, max_waiting: serve.MaxWaiting = 128,
    max_body: serve.MaxBody = 1_000_000, timeout: serve.Timeout = 120.0, foreign: common.Foreign = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", json: common.Json = False,
) -> None:  # fmt: skip
    """Serve a model with a page: ask before and after side by side, make edits, read the log, revert.

    The same server as errata serve, whose options it takes; open the address that it prints in a browser.
    """
    limits = {
        "most_tokens": max_tokens, "most_rows": max_rows, "most_waiting": max_waiting, "most_body": max_body,
        "timeout": timeout, "page": True, "runs": tuple(runs or ()),
    }  # fmt: skip
    settings = serve.server_settings(address, port, read_token_file, write_token_file, limits)
    served = serve.open_served(model, repo, edit or [], name, foreign=foreign, device=device, dtype=dtype)
    serve.run(served, settings, json=json, path="/")


VERB = Verb("ui", command, order=42)
