"""errata extract: what does a model recite of a corpus?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.host.host import Host
    from errata.progress import OnProgress

WINDOW = 12
"""Least tokens of a stretch of a free sample, by default."""
TEXTS = 500
"""Texts of the lab that are asked for by default."""
SAMPLE_TOKENS = 64
"""New tokens of a free sample; as many as the window where that is longer."""
Texts = list[tuple[int, ...]]


Secrets = Annotated[
    Path | None,
    typer.Option(
        "--secrets", help='Planted secrets, JSON lines: {"prompt": ..., "secret": ..., "others": [...]}.'
    ),
]


def command(
    corpus: Annotated[
        Path | None,
        typer.Argument(help="Text file (paragraphs), or .jsonl with a field text; default: the lab's training text."),
    ] = None,
    model: common.Model = "lab",
    prefix: Annotated[str, typer.Option("--prefix", help="Lengths of true prefixes, in tokens.")] = "4,8,16",
    suffix: Annotated[int, typer.Option("--suffix", min=1, help="Tokens that have to follow.")] = 12,
    free: Annotated[
        int, typer.Option("--free", min=0, help="Also sample this many texts from nothing and look them up.")
    ] = 0,
    window: Annotated[
        int, typer.Option("--window", min=1, help="--free: least tokens of a sampled stretch that counts.")
    ] = WINDOW,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Sample from the most probable tokens only; default: all.")
    ] = None,
    secrets: Secrets = None,
    text: Annotated[
        bool, typer.Option("--text", help="Show the stretches that --free finds; default: their number alone.")
    ] = False,
    edit: Annotated[
        list[Path] | None, typer.Option("--edit", "-e", help="Ask the model with this edit; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First N texts of the corpus.")] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw the shares here, .png or .svg.")] = None,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Measure what a model recites: after true prefixes, by free sampling, and how exposed planted secrets are.

    The corpus is indexed by a suffix array over tokens; matches are exact and inside one text.
    """
    from contextlib import ExitStack

    from errata.edits import Edit

    outputs.check_figure(figure)
    _check(free, text=text, window=window)
    lengths = _lengths(prefix)
    edits = [Edit.load(path) for path in edit or []]
    host = common.open_text_host(model, device, dtype)
    texts = [host.encode(one).ids for one in _texts(host.name, corpus, limit)]
    asked = _secrets(secrets) if secrets else []
    with ExitStack() as stack, common.progress(not json) as tick:
        for one in edits:
            stack.enter_context(one.on(host))
        document: dict[str, Any] = {
            "model": host.name, "texts": len(texts), "tokens": sum(map(len, texts)),
            "discovered": [_discovered(host, texts, length, suffix, top_k, tick) for length in lengths],
            "secrets": [_exposure(host, one) for one in asked],
        }  # fmt: skip
        if free:
            document["extracted"] = _extracted(host, texts, free, window, top_k, seed, tick, show=text)
    if figure is not None:
        document["figure"] = str(_draw(figure, document))
    if json:
        common.emit(document)
    else:
        _show(document)


def _check(free: int, *, text: bool, window: int) -> None:
    """Raise ConfigError for options of free samples where none are asked for."""
    from errata.errors import ConfigError

    given = [name for name, on in (("--text", text), ("--window", window != WINDOW)) if on]
    if given and not free:
        raise ConfigError(f"{' and '.join(given)}: for --free N, which samples texts")


def _draw(path: Path, document: dict[str, Any]) -> Path:
    from errata.report.bars import write_discovery

    return write_discovery(path, document)


def _discovered(
    host: Host, texts: Texts, prefix: int, suffix: int, top_k: int | None, tick: OnProgress
) -> dict[str, Any]:
    """Return what is recited after prefixes of one length, and of which texts."""
    from errata.inspect.extract import discovery, recitals

    found = recitals(
        host, texts, prefix=prefix, suffix=suffix, top_k=top_k,
        on_texts=lambda done, total: tick(f"prefixes of {prefix}", done, total),
    )  # fmt: skip
    summary = discovery(found, prefix=prefix, suffix=suffix).to_dict()
    return {**summary, "recited": [one.text for one in found if one.greedy]}


def _extracted(
    host: Host, texts: Texts, samples: int, window: int, top_k: int | None, seed: int, tick: OnProgress,
    *, show: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return what free samples hold of the texts; ``show``: with the stretches themselves."""
    from errata.inspect.extract import extract
    from errata.inspect.extract_index import TokenIndex

    index = TokenIndex(texts)
    found = extract(
        host, index, samples=samples, tokens=max(SAMPLE_TOKENS, window), window=window, seed=seed, top_k=top_k,
        on_samples=lambda done, total: tick("samples", done, total),
    )  # fmt: skip
    return {**found.to_dict(), "corpus": index.digest, **({} if show else {"examples": None})}


def _lengths(text: str) -> list[int]:
    from errata.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--prefix takes positive numbers with commas between, found {text!r:.80}")
    return [int(part) for part in parts]


def _texts(name: str, corpus: Path | None, limit: int | None) -> list[str]:
    from errata import lab
    from errata.errors import ConfigError
    from errata.lab.known import training_documents
    from errata.stats.corpora import file_corpus

    if corpus is not None:
        return list(file_corpus(corpus).texts())[:limit]
    if name not in lab.MODELS:
        raise ConfigError(f"the training text of {name} is not known: name a corpus")
    return [document.text for document in training_documents(limit or TEXTS)]


def _secrets(path: Path) -> list[dict[str, Any]]:
    """Read planted secrets. Raises DataError for a line that is none."""
    from errata.errors import DataError
    from errata.files import parse_json, read_text

    result = []
    for number, line in enumerate(read_text(path, DataError).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        record = parse_json(line, lambda reason, place=place: DataError(f"{place}: {reason}"))
        fits = isinstance(record, dict) and all(
            isinstance(record.get(key), str) for key in ("prompt", "secret")
        )
        others = (record.get("others") or record.get("alphabet")) if fits else None
        if not isinstance(others, list) or not all(isinstance(one, str) for one in others):
            raise DataError(
                f'{place}: expected {{"prompt": "...", "secret": "...", "others": ["...", ...]}}, '
                'or "alphabet" in place of "others"'
            )
        result.append(record)
    return result


def _exposure(host: Host, record: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from errata.inspect.exposure import exact_exposure
    from errata.inspect.extract import exposure

    prompt, secret = record["prompt"], record["secret"]
    if record.get("others"):
        found = asdict(exposure(host, prompt, secret, record["others"]))
    else:
        found = asdict(exact_exposure(host, prompt, secret.split(), record["alphabet"]))
    return {name: value for name, value in found.items() if name != "secret"}


def _show(document: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        (one["prefix"], one["texts"], f"{one['greedy']:.1%}", "{:.1%} to {:.1%}".format(*one["interval"]),
         *(f"{share:.1%}" for share in one["within"].values()), f"{one['strength']:.2f}", f"{one['exact']:.2f}")
        for one in document["discovered"]
    ]  # fmt: skip
    samples = [common.counted(int(n), "sample") for n in document["discovered"][0]["within"]]
    suffix = document["discovered"][0]["suffix"]
    title = f"the next {suffix} tokens of {document['model']} after true prefixes"
    columns = ("prefix", "texts", "greedy", "95 %", *samples, "strength", "exact")
    common.table(common.safe(title), columns, rows, right=range(len(columns)))
    if "extracted" in document:
        one = document["extracted"]
        print(
            f"{one['hits']} of {one['samples']} samples hold {one['window']} tokens or more of the corpus "
            f"({one['dropped']} more repeat themselves), {one['distinct']} different ones; "
            f"the next is new with probability {one['unseen']:.2f}, at least {one['total']:.0f} in all"
        )
        for text, count in one["examples"] or ():
            print(common.safe(f"  {count} times in the corpus: {' '.join(text.split())}"))
    if document["secrets"]:
        rows = [(i + 1, f"{one['rank']} of {one['of']}", f"{one['exposure']:.1f}")
                for i, one in enumerate(document["secrets"])]  # fmt: skip
        common.table("secrets", ("line", "rank", "exposure, bits"), rows, right=(0, 1, 2))
    if "figure" in document:
        print(f"written: {document['figure']}")


VERB = Verb("extract", command, order=74)
