"""Prompts: the texts of an edit and how they are put, as plain JSON that any client of a model can read.

``prompts.json`` holds the router, the procedure and the templates; ``entries.jsonl`` one entry a line, in the edit's
order. Both are UTF-8, and the same edit gives the same bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from errata.edits.edit import Edit
from errata.edits.export import _verify as verifying
from errata.edits.export._exporter import INSTEAD, Exporter, Options, Plan
from errata.edits.prompt import PUT, PromptEdit
from errata.edits.routers._router import Router
from errata.edits.routers.similarity import Similarity
from errata.errors import EditError

VERSION = 1
BREAKS = re.compile("[\x85\u2028\u2029]")
"""Line breaks that JSON does not escape."""
RULES = {
    "always": "The first entry is in scope of every prompt.",
    "lexical": "An entry is in scope of prompts that contain its phrase as whole words (in scripts without spaces, "
    "anywhere), both in NFC and case-folded. The longest phrase comes first, of equally long ones the last entry.",
    "fulltext": "An entry's score is the BM25 of its passage for any of the prompt's words, both in NFC and "
    "case-folded (SQLite FTS5, negated). It is in scope above the threshold; the highest score comes first.",
    "similarity": "An entry's score is the cosine of its vector and the prompt's, both by the named sentence encoder. "
    "It is in scope above the threshold; the highest score comes first.",
}
"""How each router that needs no model of the edit's own decides; others are refused."""
STEPS = {
    "put": "Put the contexts of the first `count` entries in scope before the prompt, the first one next to it, and "
    "the suffix of the entry behind it. Leave out the last ones where the window does not hold them.",
    "fill": "Fill the contexts of the first `count` entries in scope, the first one last, as {texts}, and the prompt "
    "as {prompt}, into the template `prompt`. Leave out the last ones where the window does not hold them; without "
    "any, take the prompt as it is.",
    "select": "Fill the contexts of the first `count` entries in scope, the first one last, as {texts}, and the prompt "
    "as {prompt}, into the template `select`. Generate at most `tokens` tokens; their first line is a sentence. If it "
    "is empty or begins with none, take the prompt as it is; else fill it as {text}, and the prompt, into `answer`.",
    "decompose": "Begin with the templates `examples` and `question`, {prompt} filled in. Generate at most `tokens` "
    "tokens, cut off at the first `fact` or `answer`, and append them. If there was an `answer` before any `fact`, no "
    "line that begins with `subquestion`, or no entry in scope of what follows it on the last such line, or after "
    "`hops` rounds, end with `answer` on a new line. Else put `fact` and the first entry's context on a new line, and "
    "generate again.",
}
"""What a client does, by procedure; another one is refused."""
FIELDS = {
    "put": ("count",),
    "fill": ("count", "templates"),
    "select": ("count", "tokens", "templates"),
    "decompose": ("tokens", "hops", "templates"),
}
"""The settings that each uses."""


def plan(edit: Edit, host: None, options: Options) -> Plan:
    """Make the documents."""
    if not isinstance(edit, PromptEdit):
        raise EditError(
            f"a {edit.kind} edit has no texts to put into prompts; "
            + (INSTEAD if edit.kind == "steer" else "export it to a checkpoint or to peft")
        )
    _refuse_router(edit.router)
    if edit.procedure.name not in STEPS:
        raise EditError(
            f"how {edit.procedure.name} works with texts is more than a client could follow in words; {INSTEAD}"
        )
    document = _document(edit)
    lines = [_line(entry) for entry in _entries(edit)]
    texts = {
        "prompts.json": json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        "entries.jsonl": "".join(f"{line}\n" for line in lines),
    }

    def write(folder: Path) -> None:
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())

    facts = {"entries": len(edit.contexts), "router": edit.router.name, "procedure": edit.procedure.name}
    return Plan(facts, write, lambda folder: _verify(folder, edit, document))


def _verify(folder: Path, edit: PromptEdit, document: dict[str, Any]) -> dict[str, Any]:
    """Read the files as a client does, and compare them with the edit. Raises EditError where they differ."""
    read = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    if read != json.loads(json.dumps(document)):
        raise verifying.refuse_unlike("prompts.json")
    lines = (folder / "entries.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    if [(one["entry"], one["context"]) for one in entries] != list(enumerate(edit.contexts)):
        raise verifying.refuse_unlike("entries.jsonl")
    if entries != json.loads(json.dumps(_entries(edit))):
        raise verifying.refuse_unlike("entries.jsonl")
    return {"compared": "the files, read as a client reads them", "entries": len(entries)}


def _line(entry: dict[str, Any]) -> str:
    """Return an entry as one line for every reader: some break lines at more characters than line feeds."""
    text = json.dumps(entry, ensure_ascii=False, sort_keys=True)
    return BREAKS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _refuse_router(router: Router) -> None:
    """Raise EditError for a router that decides by states of the model, which a client does not have."""
    own = isinstance(router, Similarity) and router.encoder is None
    if "states" in router.reads or own:
        raise EditError(
            f"the {router.name} router decides by {'vectors' if own else 'states'} of the edited model itself, which "
            "no client of another program has; fit the edit with a scope by subject, a retriever by words or a "
            f"sentence encoder by name, or {INSTEAD}"
        )
    if router.name not in RULES:
        raise EditError(
            f"how a {router.name} router decides is not known in words that a client could follow; {INSTEAD}"
        )


def _document(edit: PromptEdit) -> dict[str, Any]:
    procedure, router = edit.procedure, edit.router
    facts = {name: value for name, value in router.facts().items() if not isinstance(value, tuple)}
    document: dict[str, Any] = {
        "format": "errata prompts", "version": VERSION, "edit": edit.digest, "method": edit.provenance.method,
        "router": {"name": router.name, "rule": RULES[router.name], **facts},
        "procedure": {name: procedure.body()[name] for name in FIELDS[procedure.name]}
        | {"name": procedure.name, "rule": STEPS[procedure.name]},
        "entries": {"file": "entries.jsonl", "count": len(edit.contexts)},
        "prompt_format": dict(edit.provenance.prompt_format),
    }  # fmt: skip
    if procedure.name == "put":
        document["template"] = "{contexts}{prompt}{suffix}"
    if procedure == PUT and router.name == "always" and edit.contexts:
        document["prefix"] = edit.contexts[0]
        document["suffix"] = edit.suffixes[0] if edit.suffixes else ""
    return document


def _entries(edit: PromptEdit) -> list[dict[str, Any]]:
    """Return the entries with their parts of the router's settings and tensors."""
    router = edit.router
    lists: dict[str, tuple[Any, ...]] = {
        name: value for name, value in router.facts().items() if isinstance(value, tuple)
    }
    entries: list[dict[str, Any]] = []
    for number, context in enumerate(edit.contexts):
        entry: dict[str, Any] = {"entry": number, "context": context}
        if edit.suffixes:
            entry["suffix"] = edit.suffixes[number]
        entry.update({name.removesuffix("s"): values[number] for name, values in lists.items()})
        if isinstance(router, Similarity):
            entry["vector"] = list(map(float, router.keys[number]))
        entries.append(entry)
    return entries


EXPORTER = Exporter(
    name="prompts",
    title="plain JSON for any client of a model",
    takes=("prompt edits whose router decides by the prompt's text, or by a sentence encoder of its own",),
    plan=plan,
    needs_host=False,
    options=frozenset(),
)
