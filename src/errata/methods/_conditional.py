"""What the editors share that read an edit as text: KnowledgeEditor's network, its settings and its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.host.host import Host
from errata.methods import _hypernetwork as hypernetwork
from errata.methods._hypernetwork import Data, TrainingSettings
from errata.methods._method import Workspace
from errata.methods._other_model import own_answers
from errata.training.conditional import ConditionalEditor, ConditionalShape
from errata.training.editing import Item
from errata.training.factors import Change, Factors
from errata.training.tune import seeded
from errata.types import Request


@dataclass(frozen=True)
class ConditionalSettings(TrainingSettings):
    """Settings of an editor that reads an edit as text."""

    step: float = 0.2
    """Largest size of a change, s, in the unit of ``scale`` (authors' code: 1, plain)."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of ``step``: relative to the weight, over the mean norm of its gradients; or plain, from a random start."""
    encoder: int = 128
    """Width of each direction of the LSTM (authors' code: 128)."""
    condition: int = 256
    """Width of what an edit's text becomes (authors' code: 1024)."""
    head: int = 128
    """Width of the hidden layer of each weight's head (authors' code: 128)."""
    statistics: int = 64
    """Examples on which the mean norm of gradients is measured."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("step", "encoder", "condition", "head", "statistics")
        return [*super().problems(), *positive(self, *names)]


def names_of(host: Host, config: TrainingSettings) -> list[str]:
    """Return the paths of the maps that settings select, else the feed-forwards' outputs in the upper half."""
    return hypernetwork.map_names(host, config, ("mlp_out",))


def start(
    method: str, host: Host, config: ConditionalSettings, work: Workspace
) -> tuple[Data, ConditionalEditor, Mapping[str, Any]]:
    """Return what an editor is trained on, the editor at its start, and the plain data that it is built anew from."""
    data = hypernetwork.read(method, host, config, work, names_of(host, config))
    width = host.model.get_input_embeddings().weight.shape[1]
    sizes = (width, config.encoder, config.condition, config.head)
    with seeded(host, work.seed):
        editor = ConditionalEditor(data.maps, ConditionalShape(*sizes)).to(host.device)
    start_(host, config, data, editor)
    return data, editor, {"shape": list(sizes)}


def build(maps: Mapping[str, tuple[int, int]], body: Mapping[str, Any]) -> ConditionalEditor:
    """Return an editor of the shape that a file's plain data tell."""
    with torch.random.fork_rng(devices=[]):  # what it starts from is replaced by the file's tensors
        return ConditionalEditor(maps, ConditionalShape(*body["shape"]))


def text_of(host: Host, request: Request, old: str) -> Tensor:
    """Return an edit as text, as the host's word embeddings ``[tokens, d]``."""
    ids = host.encode(f"{old} >> {request.target} || {request.text}").ids
    table = host.model.get_input_embeddings()
    with torch.no_grad():
        return table(torch.tensor([ids], device=host.device))[0].float()


@torch.no_grad()
def start_(host: Host, config: ConditionalSettings, data: Data, editor: ConditionalEditor) -> None:
    """Set the units of changes, and in units of the weight a start as a step of descent."""
    some = data.items[: config.statistics]
    parts = [some[i : i + config.rows] for i in range(0, len(some), config.rows)]
    squares = dict.fromkeys(editor.names, 0.0)
    for part in parts:
        for name, one in factors_of(host, part, editor, config).items():
            same = one.owner[:, None] == one.owner
            grams = (one.gradients @ one.gradients.mT) * (one.keys @ one.keys.mT)
            squares[name] += float((grams * same).sum())
    for name in editor.names:
        head = editor.head(name)
        head.unit.fill_(config.step)
        head.shift.fill_(config.step)
        if config.scale == "published":
            continue
        out, into = head.sizes
        size = hypernetwork.weight_rms(host, name) * (out * into) ** 0.5  # the weight's norm
        head.unit.mul_(out * size / max(1e-12, (squares[name] / len(some)) ** 0.5))
        head.shift.mul_(size * (out / into) ** 0.5)
        head.columns_bias()[:] -= 1


def old_answers(
    host: Host, requests: Sequence[Request], config: TrainingSettings, work: Workspace
) -> dict[str, str]:
    """Return the old answer to each request's prompt: the one that it gives, else what the unedited host says."""
    with work.unedited(host):
        asked = [request.text for request in requests if request.target_old is None]
        own = own_answers(host, asked, config.answer_tokens)
    return own | {request.text: request.target_old for request in requests if request.target_old is not None}


def factors_of(
    host: Host, items: Sequence[Item], editor: ConditionalEditor, config: TrainingSettings
) -> dict[str, Factors]:
    """Return the factors of some requests, by map."""
    return hypernetwork.factors_of(host, [item.answer for item in items], editor.names, config)


def changes_of(
    host: Host, items: Sequence[Item], editor: ConditionalEditor, config: TrainingSettings
) -> dict[str, Change]:
    """Return the changes of some requests, on the model as it is."""
    texts = [text_of(host, item.request, item.old) for item in items]
    return editor.changes(editor.conditions(texts), factors_of(host, items, editor, config))
