"""errata methods: list the methods, or one method's settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from errata.cli import common
from errata.cli._verb import Verb
from errata.errors import ConfigError


def command(
    name: Annotated[str | None, typer.Argument(help="A method whose settings to list.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Only methods whose edits are of this kind: weight, memory, prompt, model."),
    ] = None,
    json: common.Json = False,
) -> None:
    """List the methods, or one method's settings with their meanings and the paper's values."""
    from errata.methods import REGISTRY

    if name is None:
        entries = _of_kind([_facts(REGISTRY.get(n)) for n in REGISTRY], kind)
        if json:
            common.emit(entries)
            return
        rows = [
            (e["name"], e["paper"], f"{e['gives']}, {e['host']}", _yes(e["batch"]), _yes(e["sequential"]),
             ", ".join(e["needs"]))
            for e in entries
        ]  # fmt: skip
        common.table(None, ("method", "paper", "edits", "batch", "sequential", "needs"), rows)
        if kind is not None:
            return
        steps = [(step["name"], step["on"], step["settings"], step["meaning"]) for step in _steps()]
        print(
            "stabilisers for --set stabilise=[...], applied in the order given; numbers follow a name after colons"
        )
        common.table(None, ("stabiliser", "acts on", "numbers", "effect"), steps)
        return
    from errata.config import settings

    method = REGISTRY.get(name)
    fields = [
        {"name": s.name, "type": s.type, "default": s.default, "meaning": s.meaning}
        for s in settings(method.config)
    ]
    if json:
        common.emit({**_facts(method), "settings": fields})
        return
    print(f"{method.title}: {method.paper}")
    common.table(
        None,
        ("setting", "default", "meaning"),
        [(f["name"], _text(f["default"]), f["meaning"]) for f in fields],
    )
    print(f"usage: errata edit ... --method {name} --set key=value")


def _of_kind(entries: list[dict[str, Any]], kind: str | None) -> list[dict[str, Any]]:
    """Keep the methods whose edits are of a kind. Raises ConfigError for a kind that no method gives."""
    kinds = sorted({entry["gives"] for entry in entries})
    if kind is not None and kind not in kinds:
        raise ConfigError(f"--kind {kind!r}: expected one of {', '.join(kinds)}")
    return [entry for entry in entries if kind in (None, entry["gives"])]


def _facts(method: Any) -> dict[str, Any]:
    from errata.host.kinds import kind

    return {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "gives": method.gives.kind,
        "host": ", ".join(kind(name).title for name in method.hosts),
        "hosts": list(method.hosts),
        "writes": method.writes,
        "batch": method.batch,
        "sequential": method.sequential,
        "needs": list(method.needs),
        "undo": "solved again" if method.gives.kind == "weight" else method.undo,
        "train": method.train is not None,
    }


def _steps() -> list[dict[str, str]]:
    """Describe the stabilisers."""
    from errata.config import settings
    from errata.methods._stabilise import STEPS

    return [
        {
            "name": name,
            "on": step.on,
            "settings": "; ".join(f"{s.name} {s.default} ({s.meaning})" for s in settings(step)),
            "meaning": str(step.__doc__).split("\n")[0],
        }
        for name, step in STEPS.items()
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


VERB = Verb("methods", command, order=100)
