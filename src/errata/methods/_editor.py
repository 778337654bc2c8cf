"""What methods share that train something once for many fits: the examples it is trained on, and its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from errata.config import plain
from errata.edits.artefact import Artefact
from errata.errors import ConfigError
from errata.host.host import Host
from errata.methods._method import Workspace
from errata.training.examples import Example, examples_of


def training_examples(
    method: str, host: Host, work: Workspace, most: int, *, consequences: bool = False
) -> list[Example]:
    """Return the workspace's first ``most`` examples; the host is given their pictures.

    Raises HostError for pictures where it reads none, ConfigError where there are fewer than two, or none with prompts
    that it must not change.
    """
    for case in work.examples[:most]:
        host.see((*case.requests, *case.probes))
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


def trained_editor(
    method: str, host: Host, file: str | None, settings: Any, work: Workspace, train: Callable[[], Artefact]
) -> Artefact:
    """Return the editor that a file holds, the host's own, or one that is trained on the examples.

    The host's own is taken for the settings that it was trained with. Whatever it is, one serves all fits of a
    workspace. Raises EditError for an editor of another method or host, ConfigError for another than that of the edit
    that is gone on from.
    """
    if file is None:
        key = (method, host.fingerprint, repr(settings))
        editor: Artefact = work.remember(key, lambda: _own(method, host, settings, work) or train())
    else:
        editor = Artefact.load(file)
        editor.check(method, host.fingerprint)
    before = None if work.after is None else work.after.provenance.notes.get("editor")
    if work.after is not None and before != editor.digest:
        raise ConfigError(
            f"the earlier edit was made with editor {before}, this one with {editor.digest}; use the same one"
        )
    return editor


NEUTRAL = ("editor", "rows", "stored")
"""Settings that leave what is learned as it is."""


def _own(method: str, host: Host, settings: Any, work: Workspace) -> Artefact | None:
    """Return the editor that the host brings along; None where it has none that was trained with the settings.

    Raises EditError for one that was trained on another model than the host is.
    """
    file = work.own_editor(method)
    if file is None:
        return None
    editor = Artefact.load(file)
    # a setting that is younger than the editor was as its default then
    asked, trained = plain(settings), {**plain(type(settings)()), **editor.card["settings"]}
    if any(trained[name] != value for name, value in asked.items() if name not in NEUTRAL):
        return None
    editor.check(method, host.fingerprint)
    return editor


def facts_about(editor: Artefact) -> dict[str, Any]:
    """Return what an edit's notes say of its editor: digest and losses."""
    return {"editor": editor.digest, **{k: v for k, v in editor.card.items() if isinstance(v, float)}}
