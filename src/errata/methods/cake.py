"""CaKE: low-rank adapters trained on a few texts that use the fact in both places of a chain of two steps.

Paper      Yao et al., "CaKE: Circuit-aware Editing Enables Generalizable Knowledge Learners", EMNLP 2025,
           arXiv 2503.16356
Implements For each request: statements of the fact; texts that lead to its subject by a feature stated in them, so that
           the fact is read late; texts that go on from its answer. LoRA is trained on all of them (Eq. 4) in
           mini-batches: rank 8, alpha 32, 40 passes of 4 texts
Departs    The authors have a language model write three texts of each sort from templates of the relation; here
           wordings that suit any relation are filled in (``narratives``, ``late``, ``onward``), which a user replaces
           by those of a relation, and a request's ``indirect`` prompts are trained as well. Their code trains on whole
           texts (``whole``), their Eq. 4 on answers. The rate of LoRA's B is in the weight's root mean square, and
           training stops early; ``scale: published`` is theirs. Texts that exceed the model's window are left out
Needs      Gradients; the package peft (pip install 'errata[lora]')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, RequestError
from errata.host.host import Host
from errata.host.kinds import CAUSAL, TEXT_HOSTS
from errata.methods._adapters import AdapterConfig, train_adapters
from errata.methods._circuits import Wordings, circuit_samples
from errata.methods._method import Method, Workspace, check_requests, notes, provenance
from errata.training.tune import Line, Losses, lay_out
from errata.types import Request
from errata.writing import folded

OLD_TOKENS = 8
"""Length of the model's present answer at most, where a request has no old target."""


@dataclass(frozen=True)
class Config(Wordings, AdapterConfig):
    """Settings of CaKE."""

    dropout: float = 0.05
    """Dropout probability of an adapter's inputs during training (authors' code: 0.05)."""
    steps: int = 40
    """Passes over the texts at most (authors' code: 40)."""
    per_step: int | None = 4
    """Texts per Adam step, in a new order in each pass (authors' code: 4). None: all."""
    learning_rate: float | None = None
    """Adam's rate, in the unit of ``scale``. None: 5e-4; 1e-4 in plain numbers (authors' code: 1e-4)."""
    whole: bool = False
    """Whether whole texts are trained (authors' code), not their answers alone (paper, Eq. 4)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *self.wording_problems()]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the low-rank edit that has the model use the requests' facts in chains of two steps."""
    check_requests("cake", requests)
    if config.whole and host.kind != CAUSAL:
        raise ConfigError(f"whole: {host.name} reads its prompt and its answer apart; leave whole=true out")
    if config.scale == "published" and config.learning_rate is None:
        config = replace(config, learning_rate=1e-4)
    lines = _lines(host, requests, config, work)

    def losses(config: Config) -> Losses:
        assert config.layers is not None
        return Losses(host, lines, depth=min(config.layers))

    trained = train_adapters("cake", host, config, work, losses, shuffle=True)
    facts = notes({**trained.facts, "texts": len(lines)})
    record = provenance("cake", host, requests, trained.config, work, **facts)
    return WeightEdit(trained.deltas, trained.across, record)


def _lines(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> list[Line]:
    """Return the texts of all requests as the model reads them, each once and none that exceeds its window.

    Raises RequestError where no text of a request is left.
    """
    old = work.old_answers(host, requests, OLD_TOKENS)
    lines: dict[Line, None] = {}
    for request, answer in zip(requests, old, strict=True):
        own = _line_of(host, requests, request, answer, config, work.seed)
        if not own:
            raise RequestError(
                f"no text about {request.text!r:.80} fits the model's window; shorten the wordings"
            )
        lines |= dict.fromkeys(own)
    return list(lines)


def _line_of(
    host: Host, requests: Sequence[Request], request: Request, old: str, config: Config, seed: int
) -> list[Line]:
    """Return one request's texts; ``old`` is the answer beside its target, unless it is the same or none."""
    differs = old and folded(old) != folded(request.target)
    others = [one.subject for one in requests]
    samples = circuit_samples(request, config, others=others, answer=old if differs else None, seed=seed)
    lines = [_line(host, sample, config) for sample in samples]
    return [line for line in lines if host.window is None or len(line.ids) <= host.window]


def _line(host: Host, sample: Request, config: Config) -> Line:
    """Return a text as the model reads it, scored at its answer, or ``whole`` at every token but the first."""
    if not config.whole:
        return lay_out(host, sample, "target")
    ids = host.encode_answer(sample.text, sample.target).ids
    return Line(ids[:-1], tuple(range(len(ids) - 1)), ids[1:])


METHOD = Method(
    name="cake",
    title="CaKE",
    paper="CaKE: Circuit-aware Editing Enables Generalizable Knowledge Learners, EMNLP 2025, arXiv 2503.16356",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients", "peft"),
    hosts=TEXT_HOSTS,
    writes="linear",
)
