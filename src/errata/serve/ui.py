"""The page of errata ui, and what it shows besides models and edits: methods, and the boards of runs."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from errata.host.kinds import CAUSAL
from errata.methods import DEFAULT, REGISTRY
from errata.report import tables
from errata.report.board import boards
from errata.report.read import read_runs


def routes(runs: Sequence[Path]) -> APIRouter:
    """Return the page and its own routes; ``runs``: folders of runs whose boards it shows."""
    router = APIRouter()
    content, policy = page()

    @router.get("/", response_model=None, include_in_schema=False)
    async def index() -> Response:
        """Return the page; it holds nothing of the model."""
        headers = {
            "content-security-policy": policy, "referrer-policy": "no-referrer", "x-frame-options": "DENY",
            "cache-control": "no-cache",
        }  # fmt: skip
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    @router.get("/v1/board", response_model=None)
    async def board() -> dict[str, Any]:
        """Return the tables of the runs, as far as they are."""
        return {"sections": await run_in_threadpool(sections, runs) if runs else []}

    @router.get("/v1/methods", response_model=None)
    async def methods() -> dict[str, Any]:
        """List the methods that edit a causal language model."""
        every = [REGISTRY.get(name) for name in REGISTRY]
        entries = [one for one in every if CAUSAL in one.hosts and one.name != "none"]
        return {"usual": DEFAULT, "data": [{"name": one.name, "title": one.title} for one in entries]}

    return router


def page() -> tuple[str, str]:
    """Return the page, all in one, and the policy that lets a browser run exactly its own script and style."""
    style, script = _asset("style.css"), _asset("script.js")
    parts = {"STYLE": style, "SCRIPT": script}
    content = re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]], _asset("page.html"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return content, policy


def sections(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the tables of runs as plain data. Raises DataError for a folder that is no run."""
    found = tables.sections(boards(read_runs(list(runs))), brief=True)
    return [
        {
            "title": one.title,
            "tag": one.tag,
            "tables": [
                {
                    "title": t.title,
                    "columns": list(t.columns),
                    "rows": [list(r) for r in t.rows],
                    "notes": list(t.notes),
                }
                for t in one.tables
            ],
        }
        for one in found
    ]


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return resources.files("errata.serve").joinpath("page").joinpath(name).read_text(encoding="utf-8")
