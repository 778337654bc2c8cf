"""errata trace: where in a model a fact is read from, by restoring, swapping or cutting off its states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.host.host import Host
    from errata.inspect.facts import Fact
    from errata.inspect.tracing import Settings
    from errata.progress import OnProgress
    from errata.types import Case

What = Annotated[
    str,
    typer.Argument(metavar="WHAT", help="A prompt, with --subject; or cases: lab:100, a dataset, a file."),
]
Subject = Annotated[
    str | None, typer.Option("--subject", help="The subject, as it is spelled in the prompt.")
]
Answer = Annotated[
    str | None,
    typer.Option("--answer", help="The answer whose first token is read; default: the model's first choice."),
]
Edits = Annotated[
    list[Path] | None,
    typer.Option("--edit", "-e", help="Look at the model with this edit of weights; repeatable."),
]
Noise = Annotated[
    str,
    typer.Option(
        help="Deviation of the noise: s3, three times that of subjects' word embeddings; or a number."
    ),
]
Draws = Annotated[int, typer.Option(min=1, help="How often noise is drawn.")]
Window = Annotated[
    int | None,
    typer.Option(
        min=1, help="Layers restored, or cut, at once; default: a fifth of the model's. Block outputs: one."
    ),
]
Kinds = Annotated[
    str,
    typer.Option(
        help="States to restore or swap: hidden, mlp, attn, separated by commas. --against-editing: one; default: "
        "hidden."
    ),
]
Severed = Annotated[
    str | None,
    typer.Option("--severed", help="Restore block outputs once more with later mlp, attn or both held back."),
]
Swap = Annotated[
    str | None,
    typer.Option("--swap", help="Swap states with the same prompt about this subject, in place of noise."),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast", help="Estimate swaps by gradients, the top 5 % exactly; of cases: how well estimates agree."
    ),
]
Edges = Annotated[
    bool,
    typer.Option("--edges", help="Cut the last token's attention to the subject, to the rest, to itself."),
]
Attention = Annotated[
    bool,
    typer.Option("--attention", help="Attribute the answer to attention weights: heads, and tokens read."),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against-editing", metavar="METHOD", help="Compare effects with edits by this method at each layer."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first N cases; default: all.")]
Picture = Annotated[
    Path | None, typer.Option("--output", "-o", help="Draw the map or comparison to a .png or .svg file.")
]


def command(
    what: What, subject: Subject = None, answer: Answer = None, model: common.Model = "lab", edit: Edits = None,
    noise: Noise = "s3", draws: Draws = 10, window: Window = None, kinds: Kinds = "hidden,mlp,attn",
    severed: Severed = None, swap: Swap = None, fast: Fast = False, edges: Edges = False, attention: Attention = False,
    against: Against = None, settings: common.Settings = None, limit: Limit = None, output: Picture = None,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Trace which states of a model bring an answer back, for one prompt or on average over cases.

    Causal tracing: noise hides the subject, clean states are restored one by one. --swap, --edges, --attention and
    --against-editing ask in other ways. Where an answer is restored is not where an edit works best: see docs/trace.md.
    """
    from errata.inspect.tracing import Settings

    _check(
        subject, answer, swap, output, fast=fast, edges=edges, attention=attention, against=against,
        settings=settings, limit=limit,
    )  # fmt: skip
    asked = Settings(noise, draws, window, _names(kinds), _names(severed or "", ("mlp", "attn")), seed)
    _check_read(
        asked, {"--swap": swap is not None, "--fast": fast, "--edges": edges, "--attention": attention,
                "--against-editing": against is not None},
    )  # fmt: skip
    cases = None if subject is not None else common.read_cases(what, seed)[:limit]
    host = common.open_text_host(model, device, dtype)
    with ExitStack() as stack:
        _place(stack, host, edit or [])
        tick = stack.enter_context(common.progress(not json))
        if against is not None:
            document = _against(host, cases or [], asked, against, settings or [], seed, tick)
        elif edges or attention:
            known = _facts(host, what, subject, answer, cases)
            document = (
                _attention(host, known, one=cases is None, tick=tick) if attention
                else _edges(host, known, window, one=cases is None, tick=tick)
            )  # fmt: skip
        elif cases is not None and fast:
            document = _agreement(host, _facts(host, what, subject, answer, cases), asked, tick)
        elif swap is not None:
            document = _swap(host, what, subject or "", swap, answer, asked, fast=fast)
        else:
            document = _trace(
                host, _facts(host, what, subject, answer, cases), asked, one=cases is None, tick=tick
            )
    if output is not None:
        _draw(output, document)
    if json:
        common.emit(document)
    else:
        _show(document)
        if output is not None:
            print(f"{output}  {common.size(output)}")


def _draw(path: Path, document: Mapping[str, Any]) -> None:
    from errata.report import grid, heatmap, layers

    draw = (
        layers.write_localisation if "by_layer" in document
        else grid.write_attention if "heads" in document
        else heatmap.write_heatmap
    )  # fmt: skip
    draw(path, document)


def _check(
    subject: str | None, answer: str | None, swap: str | None, output: Path | None, *, fast: bool, edges: bool,
    attention: bool, against: str | None, settings: list[str] | None, limit: int | None,
) -> None:  # fmt: skip
    """Raise ConfigError for options that do not belong together."""
    from errata.errors import ConfigError

    outputs.check_figure(output)
    asked = (("--swap", swap), ("--edges", edges), ("--attention", attention), ("--against-editing", against))
    ways = [name for name, on in asked if on]
    problems = [
        (len(ways) > 1, f"{' and '.join(ways)} are different questions: ask one at a time"),
        (fast and bool(set(ways) - {"--swap"}), "--fast goes with --swap, or with cases alone"),
        (
            subject is None and swap is not None,
            "--swap needs a prompt with --subject; of cases, --fast pairs them",
        ),
        (
            subject is None and answer is not None,
            "--answer needs a prompt with --subject; cases have their own",
        ),
        (subject is not None and fast and swap is None, "--fast needs --swap OTHER, or cases"),
        (subject is not None and against is not None, "--against-editing needs cases, as lab:20"),
        (subject is not None and limit is not None, "--limit goes with cases"),
        (bool(settings) and against is None, "--set goes with --against-editing METHOD"),
        (
            output is not None and (bool(set(ways) - {"--against-editing", "--attention"}) or fast),
            "-o draws causal tracing, --attention and --against-editing; the others print tables and --json",
        ),
    ]
    for wrong, text in problems:
        if wrong:
            raise ConfigError(text)


def _check_read(asked: Settings, ways: Mapping[str, bool]) -> None:
    """Raise ConfigError for settings that what is asked, one of some ways or plain causal tracing, does not read."""
    from errata.errors import ConfigError
    from errata.inspect.tracing import DEFAULT

    chosen = [way for way, on in ways.items() if on]
    cuts, against = bool({"--edges", "--attention"} & {*chosen}), "--against-editing" in chosen
    noisy = against or not chosen
    unread = [
        name for name, given in (
            ("--noise", asked.noise != DEFAULT.noise and not noisy),
            ("--draws", asked.draws != DEFAULT.draws and not noisy),
            ("--window", asked.width is not None and not noisy and "--edges" not in chosen),
            ("--kinds", asked.kinds != DEFAULT.kinds and cuts), ("--severed", asked.severed and bool(chosen)),
        ) if given
    ]  # fmt: skip
    if unread:
        raise ConfigError(f"{' and '.join(unread)}: not for {' '.join(chosen)}, which would not read it")
    if against and asked.kinds != DEFAULT.kinds and len(asked.kinds) > 1:
        raise ConfigError(f"--against-editing compares one kind of states, found {', '.join(asked.kinds)}")


def _names(text: str, known: Sequence[str] = ("hidden", "mlp", "attn")) -> Any:
    """Return names in their order, each once. Raises ConfigError for others."""
    from errata.errors import ConfigError
    from errata.registry import unknown

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(unknown(name, list(known), "kind of state"))
    return tuple(name for name in known if name in names)


def _place(stack: ExitStack, host: Host, paths: Sequence[Path]) -> None:
    from errata.edits import Edit

    for path in paths:
        stack.enter_context(Edit.load(path).on(host))


def _facts(
    host: Host, what: str, subject: str | None, answer: str | None, cases: Sequence[Case] | None
) -> list[Fact]:
    from errata.inspect import facts

    if cases is None:
        return [facts.fact(host, what, subject or "", answer)]
    requests = [case.request for case in cases]
    return facts.facts(host, requests, answers=[request.target_old or request.target for request in requests])


def _trace(host: Host, known: list[Fact], asked: Settings, *, one: bool, tick: OnProgress) -> dict[str, Any]:
    from errata.inspect import tracing

    if one:
        return tracing.trace(host, known[0], asked).to_dict()
    return tracing.average(
        host, known, asked, on_fact=lambda done, total: tick("facts", done, total)
    ).to_dict()


def _edges(
    host: Host, known: list[Fact], window: int | None, *, one: bool, tick: OnProgress
) -> dict[str, Any]:
    from errata.inspect import knockout

    chosen = known if one else knockout.answered(host, known)
    found = knockout.knockout(
        host, chosen, width=window, on_fact=lambda done, total: tick("facts", done, total)
    )
    return found[0].to_dict() if one else knockout.averaged(found)


def _attention(host: Host, known: list[Fact], *, one: bool, tick: OnProgress) -> dict[str, Any]:
    from errata.inspect import attention

    if one:
        return attention.attribution(host, known[0]).to_dict()
    return attention.attributions(host, known, on_fact=lambda done, total: tick("facts", done, total))


def _swap(
    host: Host, prompt: str, subject: str, other: str, answer: str | None, asked: Settings, *, fast: bool
) -> dict[str, Any]:  # fmt: skip
    from errata.inspect import swapping

    pair = swapping.pair(host, prompt, subject, other, answer=answer)
    swapper = swapping.Swapper(host, len(pair.clean.ids), asked.kinds)
    if not fast:
        return swapper.exact(pair).to_dict()
    estimate, some = swapper.fast(pair)
    return {**estimate.to_dict(), "exact": some.to_dict()["maps"]}


def _agreement(host: Host, known: list[Fact], asked: Settings, tick: OnProgress) -> dict[str, Any]:
    from errata.inspect import swapping

    return swapping.measure(host, known, asked.kinds, on_pair=lambda done, total: tick("pairs", done, total))


def _against(
    host: Host, cases: Sequence[Case], asked: Settings, method: str, settings: list[str], seed: int, tick: OnProgress
) -> dict[str, Any]:  # fmt: skip
    from dataclasses import replace

    from errata import config as configs
    from errata.bench.layers import against_editing

    found = against_editing(
        host, cases, method=method, settings=configs.parse_assignments(settings), seed=seed,
        trace=replace(asked, kinds=asked.kinds[:1]), on_progress=tick,
    )  # fmt: skip
    return {"method": method, **found.to_dict()}


# --- tables ---------------------------------------------------------------------------------


def _show(document: Mapping[str, Any]) -> None:
    if "by_layer" in document:
        _show_localisation(document)
    elif "heads" in document:
        _show_attention(document)
    elif "sets" in document or "change" in document:
        _show_edges(document)
    elif "pairs" in document:
        rows = [(kind, one["cells"], _span(one, "pearson"), _span(one, "spearman"))
                for kind, one in document["agreement"].items()]  # fmt: skip
        common.table(f"estimates by gradients against exact effects, {document['pairs']} pairs",
                     ("states", "cells", "Pearson", "Spearman"), rows, right=(1, 2, 3))  # fmt: skip
    else:
        _show_maps(document)


def _span(one: Mapping[str, Any], name: str) -> str:
    low, high = one[f"{name}_interval"]
    return f"{one[name]:.3f} ({low:.3f} to {high:.3f})"


def _show_maps(document: Mapping[str, Any]) -> None:
    layers = len(next(iter(document["maps"].values()))["effect"][0 if "roles" in document else slice(None)])
    for name, one in document["maps"].items():
        effect = one["effect"]
        if "roles" in document:
            labels, grid = document["roles"], effect
        else:
            subject = document["subject_tokens"]
            labels = [
                f"{document['tokens'][at]!r}{'*' if at in subject else ''}" for at in document["positions"]
            ]
            labels += ["all of the subject*"] * (len(effect[0]) - len(labels))
            grid = [list(row) for row in zip(*effect, strict=True)]
        rows = [
            (label, *("-" if v is None else f"{round(v, 2) + 0:.2f}" for v in row))
            for label, row in zip(labels, grid, strict=True)
        ]
        common.table(
            f"effect of {name}, by layer", ("", *map(str, range(layers))), rows, right=range(1, layers + 1)
        )
    if "roles" in document:
        low, high = document["total_effect_interval"]
        count = f"{document['facts']} facts, {document['skipped']} not known"
        print(f"{count}; total effect {document['total_effect']:.3f} "
              f"({low:.3f} to {high:.3f})")  # fmt: skip
    elif "swapped" in document:
        print(f"difference of logits, {document['answer']!r} less {document['swapped']['answer']!r}: "
              f"{document['clean_difference']:.2f}, about {document['swapped']['subject']!r} "
              f"{document['swapped_difference']:.2f}")  # fmt: skip
    else:
        print(f"answer {document['answer']!r}: clean {document['clean']:.3f}, corrupted {document['corrupted']:.3f}, "
              f"noise of deviation {document['deviation']:.3g}")  # fmt: skip


def _show_edges(document: Mapping[str, Any]) -> None:
    changes = document.get("change") or {name: one["change"] for name, one in document["sets"].items()}
    rows = [(name, *(f"{100 * v:+.0f} %" for v in row)) for name, row in changes.items()]
    layers = len(rows[0]) - 1
    title = f"change of the answer's probability, attention cut in windows of {document['window']} around each layer"
    common.table(title, ("cut from", *map(str, range(layers))), rows, right=range(1, layers + 1))


def _show_attention(document: Mapping[str, Any]) -> None:
    layers = len(document["heads"])
    columns = ("", *map(str, range(layers)))
    if "reads" in document:
        rows = [(name, *(f"{v:+.2f}" for v in one["score"])) for name, one in document["reads"].items()]
    else:
        subject = document["subject_tokens"]
        rows = [
            (f"{text!r}{'*' if at in subject else ''}", *(f"{row[at]:+.2f}" for row in document["last"]))
            for at, text in enumerate(document["tokens"])
        ]
    title = "probability of the answer owed to what the last token reads, by layer"
    common.table(title, columns, rows, right=range(1, layers + 1))
    best = sorted(
        (
            (value, layer, head)
            for layer, row in enumerate(document["heads"])
            for head, value in enumerate(row)
        ),
        reverse=True,
    )[:HEADS]
    rows = [(f"{layer}.{head}", f"{value:+.3f}") for value, layer, head in best]
    common.table(None, ("head", "largest edge"), rows, right=(1,))
    if "reads" in document:
        print(f"{document['facts']} facts, {document['skipped']} not known")
    else:
        print(f"answer {document['answer']!r}: {document['clean']:.3f}; without a layer's attention "
              f"{', '.join(f'{value:.3f}' for value in document['without'])}")  # fmt: skip


def _show_localisation(document: Mapping[str, Any]) -> None:
    names = {
        "increment": "R2 that tracing adds to the layer", "r2_layer": "R2 of the layer", "r2_score": "R2 of tracing",
        "r2_both": "R2 of both", "correlation": "correlation", "correlation_within": "correlation within a layer, mean",
    }  # fmt: skip
    number = lambda value: "-" if value is None else f"{value:.3f}"  # noqa: E731
    rows = [
        (one["layer"], number(one["score"]), number(one["success"]), number(one["correlation"]))
        for one in document["by_layer"]
    ]
    title = f"tracing of {document['kind']} against {document['method']}, {document['facts']} facts"
    common.table(title, ("layer", "tracing", "edit success", "correlation"), rows, right=range(4))
    rows = [
        (text, *(number(document[name][key]) for key in ("value", "low", "high")))
        for name, text in names.items()
    ]
    common.table(None, ("", "", "from", "to"), rows, right=(1, 2, 3))


HEADS = 10
"""Heads that are listed."""
VERB = Verb("trace", command, order=71)
