"""What a worker holds open: one model at a time, its workspaces, cases, and what it says unedited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata import lab
from errata.bench import health, results, sources
from errata.bench.plan import Cell, Plan
from errata.bench.runner import Engine, counted, held_out
from errata.bench.unedited import Unedited
from errata.errors import DataError
from errata.evaluation.metrics import perplexity
from errata.host.prompts import PromptFormat, prompt_format
from errata.types import Case

if TYPE_CHECKING:  # methods are reached through the registry only
    from errata.host.load import Host
    from errata.methods._method import Method, Workspace

TEXTS = 200


@dataclass(frozen=True)
class Tools:
    """What a run needs from the rooms above: functions of modules, so that other processes can import them."""

    open: Callable[..., Any]
    """As :func:`errata.api.load`."""
    workspace: Callable[..., Any]
    """As :func:`errata.api.workspace`."""
    check: Callable[[Any, Any], None]
    """As :func:`errata.api.check_kind`: raises where a method edits another kind of model."""


@dataclass(frozen=True)
class Neutral:
    """Text that no edit is about, and what the unedited host makes of it."""

    texts: Sequence[str]
    tokens: int
    perplexity: float
    prompts: Sequence[str]
    """Open prompts."""
    continued: Sequence[str]


@dataclass
class Room:
    """Opens what cells ask for and keeps it while the next ones ask for the same."""

    folder: Path
    plan: Plan
    tools: Tools
    _model: str | None = None
    _host: Any = None
    _hash: str = ""
    _works: dict[int, Any] = field(default_factory=dict)
    _neutral: dict[int, Neutral] = field(default_factory=dict)
    _cases: dict[str, Sequence[Case]] = field(default_factory=dict)
    _unedited: dict[str, Unedited] = field(default_factory=dict)

    def host(self, cell: Cell) -> Host:
        """Return a cell's model, opened unless it is open."""
        if self._model != cell.model:
            self.close()
            spec = self.plan.model(cell.model)
            host = self.tools.open(spec.name, device=spec.device, dtype=spec.dtype)
            self._host = host.with_prompt_format(
                prompt_format(PromptFormat(), template=spec.template)
            )  # fits and questions alike
            self._model, self._hash = cell.model, self._host.weights_hash()
        return self._host

    def close(self) -> None:
        """Let the model go, and all that was made with it."""
        self._model, self._host = None, None
        for held in (self._works, self._neutral, self._unedited):
            held.clear()

    def restored(self) -> bool | None:
        """Whether the model's weights are those it was opened with, bit by bit; if not, it is let go.

        None: no model is open.
        """
        if self._host is None:
            return None
        same = self._host.weights_hash() == self._hash
        if not same:
            self.close()
        return same

    def check(self, method: Method, cell: Cell) -> None:
        """Raise ConfigError where a method edits another kind of model than a cell's."""
        self.tools.check(method, self.host(cell))

    def work(self, cell: Cell) -> Workspace:
        """Return the workspace of a cell's model and seed; sharing it saves time and changes nothing."""
        host = self.host(cell)
        if cell.seed not in self._works:
            corpus = self.plan.recipe.corpus
            self._works[cell.seed] = self.tools.workspace(host, seed=cell.seed, corpus=corpus)
        return self._works[cell.seed]

    def cases(self, cell: Cell) -> Sequence[Case]:
        """Return a cell's cases. Raises DataError where they are no longer those of the plan."""
        if cell.dataset not in self._cases:
            facts = self.plan.datasets[cell.dataset]
            cases, found = sources.again(facts)
            if found["sha256"] != facts["sha256"]:
                raise DataError(
                    f"dataset {cell.dataset} has changed since the run began: was {facts['sha256'][:12]}, "
                    f"is {found['sha256'][:12]}; start a new run"
                )
            self._cases[cell.dataset] = cases
        return self._cases[cell.dataset]

    def asking(self, cell: Cell) -> dict[str, Any]:
        """Return how a cell's probes are asked: options of :func:`errata.evaluation.observe.observe`."""
        return {
            "max_new_tokens": self.plan.recipe.max_new_tokens,
            "template": self.plan.model(cell.model).template,
        }

    def unedited(self, cell: Cell) -> Unedited:
        """Return what the unedited host answers to a cell's cases."""
        if cell.dataset not in self._unedited:
            folder = self.folder / results.UNEDITED
            self._unedited[cell.dataset] = Unedited(
                folder, self.host(cell), self.cases(cell), self.asking(cell)
            )
        return self._unedited[cell.dataset]

    def neutral(self, cell: Cell) -> Neutral:
        """Return neutral text and what a cell's unedited host makes of it."""
        if cell.seed not in self._neutral:
            host, work = self.host(cell), self.work(cell)
            texts = lab.neutral_texts(TEXTS) if host.name == lab.NAME else held_out(host, work)
            prompts = health.open_prompts(texts)
            said, continued = self.engine(cell, texts=texts, prompts=prompts).health()
            tokens = counted(texts, said)
            self._neutral[cell.seed] = Neutral(texts, tokens, perplexity.of_texts(said), prompts, continued)
        return self._neutral[cell.seed]

    def engine(self, cell: Cell, **more: Any) -> Engine:
        """Return what fits and observes a cell's cases."""
        given: Mapping[str, Any] = {"before": self.unedited(cell).of, "asking": self.asking(cell), **more}
        return Engine(self.host(cell), self.cases(cell), self.work(cell), cell.plan, **given)
