"""The editor that a method trains once: read from a file, or trained on the examples, once in a workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from errata.edits.artefact import Artefact
from errata.edits.edit import Edit
from errata.errors import ConfigError
from errata.host.host import Host
from errata.methods._method import Workspace
from errata.training.examples import Example, examples_of


def training_examples(
    method: str, most: int, work: Workspace, *, consequences: bool = False
) -> list[Example]:
    """Return at most ``most`` of the workspace's examples, to be trained on.

    Raises ConfigError where there are fewer than two, or none with prompts that it must not change.
    """
    examples = examples_of(work.examples[:most], consequences=consequences)
    if len(examples) < 2 or not any(example.outside for example in examples):
        raise ConfigError(
            f"{method} needs at least two examples to be trained on, with prompts that they must not change: give a "
            "dataset or a file of cases with paraphrases and neighbours (examples=, --examples)"
        )
    return examples


def split(items: Sequence[Any], share: float) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the items that are trained on, and the share of them that is held out."""
    held = round(share * len(items))
    return items[held:], items[:held]


def editor_of(
    method: str, host: Host, file: str | None, settings: Any, work: Workspace, train: Callable[[], Artefact]
) -> Artefact:
    """Return the editor that a file holds, or one that is trained; ``settings``: what the training depends on.

    Raises EditError for an editor of another method or host.
    """
    if file is None:
        return work.remember((method, host.fingerprint, repr(settings)), train)
    editor = Artefact.load(file)
    editor.check(method, host.fingerprint)
    return editor


def check_same_editor(editor: Artefact, earlier: Edit | None) -> None:
    """Raise ConfigError where an edit that is gone on from was made with another editor."""
    before = None if earlier is None else earlier.provenance.notes.get("editor")
    if earlier is not None and before != editor.digest:
        raise ConfigError(
            f"the earlier edit was made with editor {before}, this one with {editor.digest}; use the same one"
        )


def facts_about(editor: Artefact) -> dict[str, Any]:
    """Return what an edit's notes say of its editor: digest and losses."""
    return {"editor": editor.digest, **{k: v for k, v in editor.card.items() if isinstance(v, float)}}
