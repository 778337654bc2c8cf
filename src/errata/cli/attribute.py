"""errata attribute: which training texts taught a model an answer?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

LINE = 100
"""Characters of a text in the terminal's table."""


def command(
    prompt: Annotated[str, typer.Argument(help="The prompt whose answer is in question.")],
    answer: Annotated[
        str | None, typer.Option("--answer", help="The answer; default: what the model writes.")
    ] = None,
    model: common.Model = "lab",
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", help="Texts: paragraphs of a text file, or .jsonl with a field text; default: the "
                     "beginning of the lab's training text."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="bm25, embedding, tracin, trak or ekfac.")
    ] = "ekfac",
    shortlist: Annotated[
        int, typer.Option("--shortlist", min=0, help="Texts, the first by BM25, that gradients are taken of; 0: all.")
    ] = 200,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Texts to show.")] = 10,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw the scores here, .png or .svg.")] = None,
    device: common.Device = "auto", dtype: common.Dtype = "auto", json: common.Json = False,
) -> None:  # fmt: skip
    """Rank training texts by how strongly they are held to have taught an answer.

    bm25 compares words, embedding hidden states; tracin, trak and ekfac gradients, of which a positive score means
    that training on the text makes the answer more probable, to first order.
    """
    from errata.inspect.attribute import Query, attribute
    from errata.stats.corpora import file_corpus

    outputs.check_figure(figure)
    host = common.open_text_host(model, device, dtype)
    texts = _lab_texts(host.name) if corpus is None else list(file_corpus(corpus).texts())
    if answer is None:
        answer = host.generate([prompt], max_new_tokens=12)[0].strip().split("\n")[0].rstrip(".")
    with common.progress(not json) as tick:
        found = attribute(
            host, Query(prompt, answer), texts, method=method, shortlist=shortlist, limit=limit,
            on_texts=lambda done, total: tick("gradients of texts", done, total),
        )  # fmt: skip
    document = {
        "model": host.name, "prompt": prompt, "answer": answer, "method": method, "texts": len(texts),
        "sources": [one.to_dict() for one in found],
    }  # fmt: skip
    if figure is not None:
        from errata.report.bars import write_sources

        document["figure"] = str(write_sources(figure, document))
    if json:
        common.emit(document)
        return
    rows = [
        (one.index + 1, f"{one.score:.3g}", ", ".join(one.words), " ".join(one.text.split())[:LINE])
        for one in found
    ]
    title = common.safe(f"{prompt} -> {answer}, by {method} among {len(texts)} texts")
    common.table(title, ("text", "score", "words in common", ""), rows, right=(0, 1))
    if figure is not None:
        print(f"written: {document['figure']}")


def _lab_texts(name: str) -> list[str]:
    from errata import lab
    from errata.errors import ConfigError
    from errata.lab.known import training_documents

    if name not in lab.MODELS:
        raise ConfigError(f"the training text of {name} is not known: name it with --corpus")
    return [document.text for document in training_documents(DOCUMENTS)]


DOCUMENTS = 2000
"""Documents of the lab's training text that are searched by default."""
VERB = Verb("attribute", command, order=73)
