"""errata neurons: feed-forward layers as memories of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.host.host import Host

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="A prompt: the neurons that add most after its last token."),
]
Answer = Annotated[
    str | None,
    typer.Option("--answer", help="The answer whose logit they act on; default: the model's first choice."),
]
Show = Annotated[
    str | None,
    typer.Option(
        "--show",
        metavar="LAYER.INDEX",
        help="One neuron: texts that switch it on, tokens its value promotes.",
    ),
]
Token = Annotated[
    str | None, typer.Option("--token", help="The neurons whose values promote this token most.")
]
Agreement = Annotated[
    bool,
    typer.Option("--agreement", help="How often a value's first token follows its neuron's first trigger."),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="CONCEPT",
        help="Skill neurons: those that tell apart what texts are labelled with (--from).",
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Labelled texts for --for: a file of records with text, label and optionally subject, or lab.",
    ),
]
Layer = Annotated[int | None, typer.Option(min=0, help="This layer alone; default: all.")]
Count = Annotated[int, typer.Option(min=1, help="How many neurons (of a layer), texts or tokens.")]
Edits = Annotated[
    list[Path] | None,
    typer.Option("--edit", "-e", help="Look at the model with this edit of weights; repeatable."),
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of text for --show and --agreement.")]
CorpusFile = Annotated[
    Path | None,
    typer.Option("--corpus", help="Text file for --show and --agreement; default: the model's own (lab)."),
]


def command(
    prompt: Prompt = None, answer: Answer = None, show: Show = None, token: Token = None,
    agreement: Agreement = False, concept: For = None, source: Source = None, layer: Layer = None,
    count: Count = 5, model: common.Model = "lab", edit: Edits = None, tokens: Tokens = 20_000,
    corpus: CorpusFile = None, device: common.Device = "auto", dtype: common.Dtype = "auto",
    seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Look at feed-forward neurons: which ones decide a prompt, what switches them on, what their values promote."""
    from contextlib import ExitStack

    from errata.edits import Edit
    from errata.inspect import skills

    ways = [
        ("PROMPT", prompt), ("--show", show), ("--token", token), ("--agreement", agreement or None),
        ("--for", concept),
    ]  # fmt: skip
    _check([name for name, value in ways if value is not None], answer, layer, concept, source)
    labelled = None if concept is None or source is None else common.read_concept(source, concept)
    host = common.open_text_host(model, device, dtype)
    with ExitStack() as stack:
        for path in edit or []:
            stack.enter_context(Edit.load(path).on(host))
        if prompt is not None:
            document = _dominant(host, prompt, answer, layer, count)
        elif labelled is not None:
            document = skills.skills(host, labelled, count=count, seed=seed)
        elif token is not None:
            document = _promoting(host, token, count)
        else:
            document = _texts(host, show, corpus, tokens, count)
    if json:
        common.emit(document)
    else:
        _print(document)


def _check(
    asked: list[str], answer: str | None, layer: int | None, concept: str | None, source: str | None
) -> None:
    """Raise ConfigError unless one question is asked, with options that belong to it."""
    from errata.errors import ConfigError

    if len(asked) != 1:
        found = ", ".join(asked) or "none"
        raise ConfigError(f"give a prompt, --show, --token, --agreement or --for, one of them; found {found}")
    if "PROMPT" not in asked and (answer is not None or layer is not None):
        raise ConfigError("--answer and --layer go with a prompt")
    if (concept is None) != (source is None):
        raise ConfigError("--for CONCEPT and --from TEXTS go together")


def _dominant(host: Host, prompt: str, answer: str | None, layer: int | None, count: int) -> dict[str, Any]:
    from errata.inspect import neurons

    layers = None if layer is None else [layer]
    found = neurons.dominant(host, prompt, answer=answer, count=count, layers=layers)
    return {"prompt": prompt, "dominant": [one.to_dict() for one in found]}


def _promoting(host: Host, token: str, count: int) -> dict[str, Any]:
    from errata.errors import RequestError
    from errata.inspect import neurons

    ids = host.encode_answer("The", token).target
    if not ids:
        raise RequestError(f"{token!r} is no token")
    return {
        "token": str(host.tokenizer.decode([ids[0]])), "promoting": neurons.promoting(host, ids[0], count=count)
    }  # fmt: skip


def _texts(host: Host, show: str | None, corpus: Path | None, tokens: int, count: int) -> dict[str, Any]:
    from errata.errors import ConfigError
    from errata.inspect import neurons, tuned
    from errata.stats.corpora import as_corpus

    one = None if show is None else neurons.neuron(host, show)
    chosen = host.resources.corpus if corpus is None else as_corpus(corpus)
    if chosen is None:
        raise ConfigError(f"{host.name} brings no texts of its own: name a file with --corpus")
    rows = tuned.fixed_rows(host, chosen.texts(), tokens=tokens)
    if one is not None:
        return neurons.describe(host, one, rows, count=count)
    triggers = neurons.Triggers(host, [site.layer for site in neurons.sites(host)], count=1)
    triggers.add(rows)
    return {
        "tokens": sum(map(len, rows)),
        "agreement": {str(k): v for k, v in triggers.agreement(rows).items()},
    }


def _print(document: Mapping[str, Any]) -> None:
    if "skills" in document:
        _print_skills(document)
    elif "dominant" in document:
        rows = [
            (one["neuron"], f"{one['coefficient']:+.2f}", f"{100 * one['share']:.1f} %", f"{one['effect']:+.2f}",
             " ".join(map(repr, one["tokens"][:5])))
            for one in document["dominant"]
        ]  # fmt: skip
        columns = ("neuron", "coefficient", "of the layer", "on the answer", "what it adds")
        common.table(f"largest sub-updates after {document['prompt']!r}", columns, rows, right=(1, 2, 3))
    elif "promoting" in document:
        rows = [(one["neuron"], f"{one['standing']:.2f}") for one in document["promoting"]]
        common.table(f"values that promote {document['token']!r}", ("neuron", "deviations above the mean"), rows,
                     right=(1,))  # fmt: skip
    elif "agreement" in document:
        rows = [(layer, f"{100 * value:.2f} %") for layer, value in document["agreement"].items()]
        common.table(f"first token of the value follows the first trigger, {document['tokens']} tokens",
                     ("layer", "neurons"), rows, right=(0, 1))  # fmt: skip
    else:
        for side in ("highest", "lowest"):
            rows = [(f"{one['value']:+.2f}", repr(one["text"])) for one in document[side]]
            common.table(f"neuron {document['neuron']}: {side} after", ("", "text"), rows, right=(0,))
        print("promotes:", " ".join(common.safe(repr(text)) for text in document["promoted"]))
        print("demotes: ", " ".join(common.safe(repr(text)) for text in document["demoted"]))


def _print_skills(document: Mapping[str, Any]) -> None:
    rows = [
        (one["label"], neuron["neuron"], "high" if neuron["fires"] else "low", f"{neuron['chosen']:.3f}",
         f"{neuron['held_out']:.3f}")
        for one in document["skills"] for neuron in one["neurons"]
    ]  # fmt: skip
    columns = ("label", "neuron", "with the label", "chosen by", "held out")
    common.table(f"neurons that tell {document['concept']}: balanced accuracy", columns, rows, right=(3, 4))
    rows = [
        (one["label"], *(f"{one[name]:.3f}" for name in ("vote", "random_vote", "shuffled")))
        for one in document["skills"]
    ]
    columns = ("label", "their vote, held out", "random neurons' vote", "best by shuffled labels")
    common.table(None, columns, rows, right=(1, 2, 3))


VERB = Verb("neurons", command, order=73)
