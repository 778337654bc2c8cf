"""errata lens: what a model would answer if it stopped at a layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.host.host import Host
    from errata.inspect.lens import Lens
    from errata.types import Corpus

TOKENS, STEPS = 20_000, 100
"""Of text, and of a training, by default."""

Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="A prompt to read layer by layer.")]
Answer = Annotated[
    str | None,
    typer.Option(
        "--answer", help="The answer whose first token is followed; default: the model's first choice."
    ),
]
Edits = Annotated[
    list[Path] | None,
    typer.Option("--edit", "-e", help="Look at the model with this edit of weights; repeatable."),
]
Tuned = Annotated[
    Path | None, typer.Option("--tuned", help="A tuned lens that --fit has written; default: the logit lens.")
]
Fit = Annotated[
    Path | None, typer.Option("--fit", help="Train a tuned lens and write it to this file (.safetensors).")
]
Exit = Annotated[
    float | None,
    typer.Option(
        "--exit", min=0.0, max=1.0, help="Measure early exit on texts: leave at this much confidence, as 0.9."
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of text for --fit and --exit.")]
Into = Annotated[
    str | None,
    typer.Option(
        "--into",
        metavar="TARGET",
        help="Put the states of PROMPT's last token in place of {} in this prompt.",
    ),
]
Picture = Annotated[
    Path | None, typer.Option("--output", "-o", help="Draw what is read of a prompt to a .png or .svg file.")
]
Steps = Annotated[int, typer.Option(min=0, help="Steps of --fit behind its ridge regression.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint of a --fit that was stopped.")
]
CorpusFile = Annotated[
    Path | None,
    typer.Option("--corpus", help="Text file for --fit and --exit; default: the model's own (lab)."),
]


def command(
    prompt: Prompt = None, answer: Answer = None, model: common.Model = "lab", edit: Edits = None,
    tuned: Tuned = None, into: Into = None, fit: Fit = None, leave: Exit = None, tokens: Tokens = TOKENS,
    steps: Steps = STEPS, resume: Resume = False, corpus: CorpusFile = None, output: Picture = None,
    force: common.Force = False, device: common.Device = "auto", dtype: common.Dtype = "auto",
    seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Read what a model would answer at every layer: logit lens, tuned lens (--fit, --tuned), early exit (--exit).

    With --into, another prompt reads the states of this one's last token (Patchscopes): what do they stand for?
    """
    from contextlib import ExitStack

    from errata.edits import Edit

    _check(prompt, answer, fit, leave, edit, tuned, into, output, resume=resume)
    _check_read(prompt, fit, corpus, tokens, steps)
    if fit is not None:
        _check_files(fit, resume=resume, force=force)
    host = common.open_text_host(model, device, dtype)
    with ExitStack() as stack:
        if fit is not None:
            tick = stack.enter_context(common.progress(not json))
            document = _fit(host, fit, _texts(host, corpus), tokens, steps, seed, tick, resume=resume)
        else:
            for path in edit or []:
                stack.enter_context(Edit.load(path).on(host))
            lens = _lens(host, tuned)  # refuses edits that decide by row
            if leave is not None:
                document = _exits(lens, _texts(host, corpus), tokens, leave)
            elif into is not None:
                document = _scope(lens, prompt or "", into, answer)
            else:
                document = _read(lens, prompt or "", answer)
    if output is not None:
        from errata.report import grid

        (grid.write_reading if into is None else grid.write_scope)(output, document)
    if json:
        common.emit(document)
        return
    _show(document)
    if output is not None:
        print(f"{output}  {common.size(output)}")


def _check(
    prompt: str | None, answer: str | None, fit: Path | None, leave: float | None, edit: list[Path] | None,
    tuned: Path | None, into: str | None, output: Path | None, *, resume: bool,
) -> None:  # fmt: skip
    """Raise ConfigError unless one question is asked, with options that belong to it."""
    from errata.errors import ConfigError

    asked = [
        name for name, value in (("PROMPT", prompt), ("--fit", fit), ("--exit", leave)) if value is not None
    ]
    if len(asked) != 1:
        raise ConfigError(
            f"give a prompt, --fit FILE or --exit CONFIDENCE, one of them; found {', '.join(asked) or 'none'}"
        )
    for name, value in (("--answer", answer), ("--into", into), ("--output", output)):
        if value is not None and prompt is None:
            raise ConfigError(f"{name} goes with a prompt")
    if into is not None and tuned is not None:
        raise ConfigError("--into puts states in as they are: leave --tuned out")
    outputs.check_figure(output)
    if fit is not None and (edit or tuned):
        raise ConfigError("--fit trains a lens for the model as it is: leave --edit and --tuned out")
    if resume and fit is None:
        raise ConfigError("--resume goes with --fit")


def _check_read(prompt: str | None, fit: Path | None, corpus: Path | None, tokens: int, steps: int) -> None:
    """Raise ConfigError for options of texts and of a training where there is neither."""
    from errata.errors import ConfigError

    if prompt is not None and (corpus is not None or tokens != TOKENS):
        raise ConfigError("--corpus and --tokens are for the texts of --fit and --exit, not for a prompt")
    if fit is None and steps != STEPS:
        raise ConfigError("--steps goes with --fit")


def _check_files(fit: Path, *, resume: bool, force: bool) -> None:
    from errata.errors import EditError

    outputs.check_new_edit(fit, force=force)
    checkpoint = _checkpoint(fit)
    if checkpoint.exists() and not (resume or force):
        raise EditError(
            f"{checkpoint} is the checkpoint of a training that did not end: --resume goes on from it, --force starts "
            "anew"
        )


def _checkpoint(fit: Path) -> Path:
    return fit.with_name(f"{fit.name}.checkpoint")


def _texts(host: Host, corpus: Path | None) -> Corpus:
    from errata.errors import ConfigError
    from errata.stats.corpora import as_corpus

    chosen = host.resources.corpus if corpus is None else as_corpus(corpus)
    if chosen is None:
        raise ConfigError(f"{host.name} brings no texts of its own: name a file with --corpus")
    return chosen


def _fit(
    host: Host, path: Path, corpus: Corpus, tokens: int, steps: int, seed: int, tick: Any, *, resume: bool
) -> dict[str, Any]:  # fmt: skip
    from errata.inspect import tuned
    from errata.training.loop import TrainingFiles

    rows = tuned.fixed_rows(host, corpus.texts(), tokens=tokens)
    where = TrainingFiles(_checkpoint(path), resume, None)
    artefact = tuned.fit(host, rows, tuned.Settings(steps), seed=seed, where=where, on_progress=tick)
    document = {"path": str(artefact.save(path)), **artefact.summary()}
    _checkpoint(path).unlink(missing_ok=True)
    return document


def _lens(host: Host, path: Path | None) -> Lens:
    from errata.edits.artefact import Artefact
    from errata.inspect.lens import Lens
    from errata.inspect.tuned import lens_of

    return Lens(host) if path is None else lens_of(host, Artefact.load(path))


def _exits(lens: Lens, corpus: Corpus, tokens: int, confidence: float) -> dict[str, Any]:
    from errata.inspect import lens as lenses
    from errata.inspect import tuned

    rows = tuned.fixed_rows(lens.host, corpus.texts(), tokens=tokens)
    return lenses.exits(lens, rows, confidence=confidence)


def _scope(lens: Lens, prompt: str, into: str, answer: str | None) -> dict[str, Any]:
    from errata.inspect import patchscope

    return patchscope.scope(lens, prompt, into, answer=answer).to_dict(lens.host)


def _read(lens: Lens, prompt: str, answer: str | None) -> dict[str, Any]:
    host = lens.host
    ids = host.encode_base(prompt)
    token = None if answer is None else host.encode_answer(prompt, answer).target[0]
    return {"prompt": prompt, **lens.look(ids, token).to_dict(host)}


def _show(document: Mapping[str, Any]) -> None:
    if "path" in document:
        card = document["card"]
        names = ("logit_lens", "ridge", "tuned_lens")
        rows = [
            (layer, *(f"{card[name][layer]:.3f}" for name in names)) for layer in range(len(card["ridge"]))
        ]
        title = (
            "divergence from the model's own distribution, nats, on texts held out; layer 0: word embeddings"
        )
        common.table(title, ("layer", "logit lens", "ridge regression", "tuned lens"), rows, right=range(4))
        print(f"{document['path']}  lens {document['digest']}")
        return
    if "confidence" in document:
        rows = [
            (layer, f"{100 * agree:.1f} %", f"{100 * settled:.1f} %")
            for layer, (agree, settled) in enumerate(
                zip(document["agreement_by_layer"], document["settled_by_layer"], strict=True)
            )
        ]
        columns = ("layer", "first choice is the final one", "and stays it")
        common.table(f"{document['tokens']} tokens", columns, rows, right=range(3))
        print(
            f"leaving at confidence {document['confidence']:g}: {document['mean_layers_saved']:.2f} of "
            f"{document['layers']} layers saved, {100 * document['agreement']:.1f} % of first choices kept"
        )
        return
    if "into" in document:
        _show_scope(document)
        return
    answer = document["answer"]
    rows = [
        (layer, *map(repr, top), answer["rank"][layer], f"{answer['probability'][layer]:.3f}")
        for layer, top in enumerate(document["top"])
    ]
    columns = ("layer", *map(repr, document["tokens"]), "rank", "probability")
    count = len(columns)
    common.table(
        f"first choice after each token, by layer; rank and probability of {answer['token']!r} after the last",
        columns, rows, right=(0, count - 2, count - 1),
    )  # fmt: skip


def _show_scope(document: Mapping[str, Any]) -> None:
    answer = document["answer"]
    rows = [
        (layer, *(f"{value:.2f} {text.strip()!r}" for value, text in zip(values, texts, strict=True)))
        for layer, (values, texts) in enumerate(zip(document["probability"], document["texts"], strict=True))
    ]
    columns = ("from layer", *(f"into {layer}" for layer in range(1, len(rows))))
    title = f"{document['target']!r} with the states of {document['source']!r}: probability of {answer['token']!r}"
    common.table(title, columns, rows, right=(0,))
    print(f"with the words themselves: {answer['plain']:.3f}")


VERB = Verb("lens", command, order=72)
