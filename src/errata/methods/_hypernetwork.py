"""What the editors share that turn gradients into changes of weights: settings, training, the edit that comes out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from errata import config as settings
from errata.checksum import checksum
from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.edit import Provenance, timestamp, versions
from errata.edits.weight import Delta, WeightEdit
from errata.errors import ConfigError, EditError
from errata.host.host import Host
from errata.host.layout import DECODER, ENCODER
from errata.host.tokens import Answer
from errata.linalg.lowrank import LowRank
from errata.locate.gradients import Stacks, Tokens, selected_maps
from errata.methods._editor import facts_about, split, training_examples
from errata.methods._method import Workspace, notes, provenance, resolve_layers
from errata.methods._other_model import own_answers
from errata.methods._settings import at_least_zero
from errata.training.editing import Item, Sampling, items_of, means, with_own_choices
from errata.training.factors import Change, Factors, capture
from errata.training.hypernetwork import Damping, Form, Hypernetwork, NetworkShape
from errata.training.loop import Loop, Task
from errata.training.loop import train as run_loop
from errata.training.workers import ALONE, Workers
from errata.types import Request, plain_case


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of an editor's training, and of what it is trained on."""

    editor: str | None = None
    """File of an editor that errata train wrote. None: one is trained for the fit, on the examples."""
    modules: tuple[str, ...] | None = None
    """Linear maps to edit: mlp_in and mlp_out, the feed-forward's into and out of its hidden layer, mlp, both; or the
    end of a path inside a block. ``name@first-last`` sets the layers of one."""
    layers: tuple[int, ...] | None = None
    """Layers of modules without their own."""
    stack: Stacks = "decoder"
    """Which stack of an encoder-decoder the modules are in, or both; other models have one, called decoder."""
    token: Tokens = "all"
    """Tokens whose factors are read: those that predict the answer, or all."""
    steps: int = 100
    """Steps of training at most."""
    per_step: int = 8
    """Examples in a step."""
    inside: int = 2
    """Prompts in scope asked about each, in other words than the request's where there are any."""
    outside: int = 2
    """Prompts out of scope asked about each."""
    others: int = 1
    """Prompts of other examples asked about each, as out of scope."""
    request: float = 0.25
    """Share of the examples for which one of the prompts in scope is the request itself."""
    learning_rate: float = 1e-3
    """Adam's for the network."""
    clip: float | None = 1.0
    """Largest norm of a step's gradient."""
    warmup: int = 10
    """Steps over which the rates rise."""
    decay: Literal["none", "cosine"] = "cosine"
    """Rates afterwards: as they are, or falling to nothing along half a cosine."""
    every: int = 20
    """Steps from one validation, and checkpoint, to the next."""
    patience: int = 10
    """Validations without a gain that end training."""
    most: int = 5000
    """Examples that are trained on and held out at most."""
    held_out: float = 0.05
    """Share of the examples that are held out for validation."""
    validation: int = 32
    """Examples of a validation at most (authors' code: 500)."""
    answer_tokens: int = 8
    """Tokens of the host's own answer to a request whose old target is not given."""
    rows: int = 64
    """Prompts run at once, which changes nothing but rounding and memory."""
    stored: Literal["float32", "float16"] = "float32"
    """How the file holds the network's matrices; they are float32 where they are used."""

    def problems(self) -> list[str]:
        """Check ranges."""
        counts = (
            "steps",
            "per_step",
            "inside",
            "every",
            "patience",
            "most",
            "validation",
            "answer_tokens",
            "rows",
        )
        complaints = positive(self, *counts, "learning_rate", "clip")
        complaints += at_least_zero(self, "outside", "others", "warmup")
        complaints += [
            f"{name}: expected a share from 0 to 1, found {share}"
            for name, share in (("held_out", self.held_out), ("request", self.request))
            if not 0 <= share <= 1
        ]
        if self.modules == ():
            complaints.append("modules: expected at least one, found none")
        return complaints

    @property
    def loop(self) -> Loop:
        """How it is trained."""
        return Loop(self.steps, self.per_step, self.clip, self.warmup, self.decay, self.every, self.patience)

    @property
    def at_once(self) -> int:
        """How many samples are run at once."""
        return max(1, self.rows // self.sampling.prompts)

    @property
    def sampling(self) -> Sampling:
        """What a step asks."""
        return Sampling(self.inside, self.outside, self.others, self.request)


@dataclass(frozen=True)
class EditorSettings(TrainingSettings):
    """Settings of an editor that is a network on normalised factors."""

    rank: int = 256
    """Rank of a block's linear map, at most its width (authors' code: 1920)."""
    blocks: int = 2
    """Residual blocks (paper: 2)."""
    step: float = 1.0
    """Size of the untrained editor's changes, in the unit of ``scale``; it is learned, for each map."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of ``step``: relative to the weight's root mean square, or plain numbers."""
    edit_weight: float = 1.0
    """Weight of the loss in scope."""
    locality_weight: float = 1.0
    """Weight of the KL divergence out of scope."""
    step_rate: float = 1e-2
    """Adam's for the logarithm of the step sizes."""
    statistics: int = 128
    """Examples whose factors the normalisation is measured on, before training."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("rank", "blocks", "step", "edit_weight", "step_rate", "statistics")
        return [*super().problems(), *positive(self, *names), *at_least_zero(self, "locality_weight")]

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the losses in scope and out of it."""
        return self.edit_weight, self.locality_weight

    def summed(self, facts: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Return what a step records: the samples' mean losses in scope and out of it, and their weighted sum."""
        edit, locality = means(facts)
        loss = self.edit_weight * edit + self.locality_weight * locality
        return {"loss": loss, "edit": edit, "locality": locality}


QUICK: Mapping[str, Any] = {"steps": 20, "every": 5, "most": 200, "validation": 8, "statistics": 64}
"""Settings of a short training."""


class Editor(nn.Module):
    """The network, and the logarithms of numbers that each map has: its step, what else a method learns."""

    def __init__(
        self, maps: Mapping[str, tuple[int, int]], shape: NetworkShape, logs: Sequence[str], seed: int,
        damped: int = 0,
    ) -> None:  # fmt: skip
        """``damped``: directions of each map's inputs in which changes are damped."""
        super().__init__()
        self.network = Hypernetwork(maps, shape, seed=seed)
        self.logs = nn.ParameterDict({name: nn.Parameter(torch.zeros(len(maps))) for name in logs})
        self.numbers = {name: i for i, name in enumerate(maps)}
        self.damped = damped
        self.damping = nn.ModuleList(Damping(d_in, damped) for _, d_in in maps.values() if damped)

    def positive(self, log: str, name: str) -> Tensor:
        """Return a map's number ``[]``, which is positive."""
        return self.logs[log][self.numbers[name]].exp()

    def damp(self, name: str, rows: Tensor) -> Tensor:
        """Return inputs of a map ``[n, d_in]`` with what they have in common made smaller, where that is set."""
        return self.damping[self.numbers[name]](rows) if self.damped else rows


def map_names(host: Host, config: TrainingSettings, modules: tuple[str, ...]) -> list[str]:
    """Return the paths of the maps that settings select, else those of ``modules`` in the upper half of each stack."""
    chosen, found = config.modules or modules, set[str]()
    for stack in (DECODER, ENCODER) if config.stack == "both" else (config.stack,):
        own = config.layers
        if any("@" not in entry for entry in chosen):
            own = resolve_layers(host, own, lambda depth: tuple(range(depth // 2, depth)), stack)
        found |= set(selected_maps(host, chosen, own, stack))
    return [name for name, _ in host.model.named_modules() if name in found]


C = TypeVar("C", bound=TrainingSettings)
E = TypeVar("E", bound=nn.Module)


def with_published(config: C, published: Mapping[str, Any]) -> C:
    """Return settings with what is published for a model in place of all that are left at their defaults."""
    open_ = {field.name: field.default for field in fields(config)}
    return replace(config, **{n: v for n, v in published.items() if getattr(config, n) == open_[n]})


def weight_rms(host: Host, name: str) -> float:
    """Return the root mean square of a map's weight."""
    weight = host.model.get_submodule(name).weight.detach()
    return float(weight.to(torch.promote_types(weight.dtype, torch.float32)).norm()) / weight.numel() ** 0.5


# --- training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What an editor is trained on."""

    items: Sequence[Item]
    held: Sequence[Item]
    maps: Mapping[str, tuple[int, int]]
    """Widths of output and input of each map, by its path."""
    key: str
    """Tells trainings apart whose checkpoints must not be mixed."""
    workers: Workers = ALONE
    """The processes that train together."""


def read(method: str, host: Host, config: TrainingSettings, work: Workspace, names: Sequence[str]) -> Data:
    """Read the examples. Raises ConfigError where none has paraphrases, or prompts that must not change."""
    examples = training_examples(method, host, work, config.most)
    if not any(len(example.inside) > 1 for example in examples):
        raise ConfigError(
            f"{method} is trained on the request in other words, and no example has any: give a dataset or a file of "
            "cases with paraphrases (examples=, --cases)"
        )
    trained, held = split(examples, config.held_out)
    held = held[: config.validation]
    asked = [e.request.text for e in (*trained, *held) if e.request.target_old is None]
    old = own_answers(host, asked, config.answer_tokens)
    items = items_of(host, trained, old)
    if not items:
        raise ConfigError(f"{method}: no example fits {host.name}'s window of {host.window} tokens")
    held_items = with_own_choices(host, items_of(host, held, old) or items[:1], config.rows)
    first = capture(host, [items[0].answer], names, tokens=config.token, rows=config.rows)
    plain = [method, host.fingerprint, host.prompt_format.to_dict(), without_editor(config), work.seed]
    cases = [plain_case(case) for case in work.examples[: config.most]]
    key = checksum({"of": plain, "cases": cases}, {})
    return Data(items, held_items, {name: one.shape for name, one in first.items()}, key, work.workers)


@dataclass(frozen=True)
class Prepared:
    """What an editor that is a network on normalised factors is trained with."""

    host: Host
    config: EditorSettings
    items: Sequence[Item]
    held: Sequence[Item]
    editor: Editor
    data: Data
    energy: Mapping[str, float]
    """Mean squared norm of each map's inputs."""

    def factors(self, items: Sequence[Item]) -> dict[str, Factors]:
        """Return the factors of some requests, by map, where the editor is."""
        return factors_of(self.host, [item.answer for item in items], list(self.editor.numbers), self.config)


def rng_of(step: int, seed: int) -> random.Random:
    """Return what a step draws with."""
    return random.Random(f"errata-editor-{seed}-{step}")


def factors_of(
    host: Host, answers: Sequence[Answer], names: Sequence[str], config: TrainingSettings
) -> dict[str, Factors]:
    """Return the factors of some answers, by map, on the host's device."""
    found = capture(host, answers, names, tokens=config.token, rows=config.rows)
    return {name: one.to(host.device) for name, one in found.items()}


def prepare(
    method: str, host: Host, config: EditorSettings, work: Workspace, *, names: Sequence[str], form: Form,
    logs: Sequence[str], damped: int = 0,
) -> Prepared:  # fmt: skip
    """Read the examples, and start an editor that only normalises. Raises ConfigError as :func:`read`."""
    data = read(method, host, config, work, names)
    shape = NetworkShape(config.rank, config.blocks, form)
    editor = Editor(data.maps, shape, logs, work.seed, damped).to(host.device)
    prepared = Prepared(host, config, data.items, data.held, editor, data, {})
    count = min(len(data.items), config.statistics)
    parts = [data.items[i : min(i + config.rows, count)] for i in range(0, count, config.rows)]
    try:
        energy = editor.network.set_statistics_([lambda part=part: prepared.factors(part) for part in parts])
    except ValueError as error:
        raise ConfigError(f"{method} cannot normalise what it reads of {count} examples: {error}") from error
    return replace(prepared, energy=energy)


def finish(method: str, prepared: Prepared, task: Task, work: Workspace) -> Artefact:
    """Train the editor and return it in its best state."""
    config, editor = prepared.config, prepared.editor
    groups = [
        {"params": list(editor.network.parameters()), "lr": config.learning_rate},
        {"params": list(editor.logs.parameters()), "lr": config.step_rate},
    ]
    body = {
        "logs": list(editor.logs), "rank": config.rank, "blocks": config.blocks, "form": editor.network.form,
        **({"damped": editor.damped} if editor.damped else {}),
    }  # fmt: skip
    return conclude(
        method, prepared.host, config, prepared.data, editor, torch.optim.Adam(groups), body, task, work
    )


def conclude(
    method: str, host: Host, config: TrainingSettings, data: Data, editor: nn.Module,
    optimizer: torch.optim.Optimizer, body: Mapping[str, Any], task: Task, work: Workspace,
) -> Artefact:  # fmt: skip
    """Train an editor and return it in its best state; ``body``: what it is built anew from, beside the maps."""
    facts = run_loop(
        editor, optimizer, config.loop, task, key=data.key, seed=work.seed, where=work.training,
        on_progress=work.on_progress, workers=data.workers,
        settings={"method": method, "model": host.name, "seed": work.seed, **without_editor(config)},
    )  # fmt: skip
    whole = {
        "maps": {name: list(sizes) for name, sizes in data.maps.items()}, "token": config.token,
        "prompt_format": host.prompt_format.to_dict(), **body,
    }  # fmt: skip
    tensors = {name: tensor.detach().cpu() for name, tensor in editor.state_dict().items()}
    if config.stored == "float16":
        tensors = {name: rounded(tensor) for name, tensor in tensors.items()}
        editor.load_state_dict(tensors)
        facts |= task.validate()  # the scores are those of what is stored
    card = {
        "examples": len(data.items), "held_out": len(data.held), "settings": without_editor(config),
        "seed": work.seed, "training": data.key, "versions": versions(), **facts,
    }  # fmt: skip
    return Artefact(method, host.fingerprint, tensors, whole, card, timestamp())


def rounded(tensor: Tensor) -> Tensor:
    """Return a matrix ``[n, m]`` in float16, anything else as it is: statistics have a wider range."""
    return tensor.half() if tensor.ndim > 1 else tensor


def without_editor(config: TrainingSettings) -> dict[str, Any]:
    """Return settings as plain data, but for the file of an editor."""
    return {name: value for name, value in settings.plain(config).items() if name != "editor"}


# --- editing --------------------------------------------------------------------------------


def editor_of(
    artefact: Artefact, host: Host, config: C, names: Callable[[], Sequence[str]],
    build: Callable[[Mapping[str, tuple[int, int]], Mapping[str, Any]], E],
) -> tuple[E, C]:  # fmt: skip
    """Return a trained editor on the host's device, and the settings with what it was trained with.

    ``names``: the maps that the settings select. ``build``: makes an editor from its maps and its plain data. Raises
    ConfigError for an editor of other maps, where the settings name any, or of another prompt format; EditError for a
    damaged one.
    """
    body, found = artefact.body, artefact.body["prompt_format"]
    if found != host.prompt_format.to_dict():
        raise ConfigError(
            f"editor: it was trained with the prompt format {found or 'raw'}, found "
            f"{host.prompt_format.to_dict() or 'raw'}; train one for it, or leave template, system and join out"
        )
    maps = {name: (sizes[0], sizes[1]) for name, sizes in body["maps"].items()}
    named = config.modules is not None or config.layers is not None or config.stack != DECODER
    if named and list(names()) != list(maps):
        raise ConfigError(f"editor: it was trained for {', '.join(maps)}, found {', '.join(names())}")
    editor = build(maps, body)
    try:
        editor.load_state_dict(dict(artefact.tensors))
    except RuntimeError as error:
        raise EditError(f"the editor's tensors do not fit its header: {error}") from error
    return editor.to(host.device), replace(config, token=body["token"])


def network_of(maps: Mapping[str, tuple[int, int]], body: Mapping[str, Any]) -> Editor:
    """Return an editor of the shape that a file's plain data tell."""
    shape = NetworkShape(body["rank"], body["blocks"], body["form"])
    return Editor(maps, shape, body["logs"], 0, body.get("damped", 0))


def edit_of(
    method: str, host: Host, requests: Sequence[Request], factors: Mapping[str, Factors],
    changes: Mapping[str, Change], artefact: Artefact, config: Any, work: Workspace,
) -> WeightEdit:  # fmt: skip
    """Return the sum of all products as an edit."""
    record = provenance(method, host, requests, config, work, **notes(facts_about(artefact)))
    return weight_edit(changes, factors, record)


def weight_edit(
    changes: Mapping[str, Change], factors: Mapping[str, Factors], record: Provenance
) -> WeightEdit:
    """Return the sum of all products, in factors of at most as many columns as there are products."""
    deltas: dict[str, Delta] = {}
    for name, change in changes.items():
        outer, inner = (side.detach().double().cpu() for side in (change.outer, change.inner))
        product = LowRank(outer.mT, inner)
        size = min(product.shape)
        whole = product if product.rank <= size else product.truncate(size)[0]
        deltas[f"{name}.weight"] = whole.to(torch.float32)
    return WeightEdit(
        deltas, frozenset(f"{name}.weight" for name, one in factors.items() if one.transposed), record
    )


class Course:
    """A host on which one change after another is put in place, as weights, and all are taken off at the end."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.total: WeightEdit | None = None
        self.stack = ExitStack()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is added in place until the block ends."""
        with self.stack:
            yield

    def add(self, factors: Mapping[str, Factors], changes: Mapping[str, Change]) -> None:
        """Put a change in place, on top of those before."""
        later = weight_edit(changes, factors, Provenance("sequence", (), {}, self.host.fingerprint))
        self.stack.close()
        self.total = later if self.total is None else self.total.then(later)
        self.stack.enter_context(self.total.on(self.host))


def edit_after(
    course: Course, method: str, host: Host, requests: Sequence[Request], artefact: Artefact, config: Any,
    work: Workspace,
) -> WeightEdit:  # fmt: skip
    """Return the sum of all changes of a course as an edit. Raises ConfigError where there was none."""
    if course.total is None:
        raise ConfigError(f"{method} made no change")
    record = provenance(method, host, requests, config, work, **notes(facts_about(artefact)))
    return WeightEdit(course.total.deltas, course.total.transposed, record)
