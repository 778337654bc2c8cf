"""Kformer: sentences that are retrieved for a prompt become neurons of the top layers' feed-forwards.

Paper      Yao et al., "Kformer: Knowledge Injection in Transformer Feed-Forward Layers", NLPCC 2022, arXiv 2201.05742
Implements Sec. 3: BM25 finds candidates, the nearest by the product of mean word embeddings are taken, and each such
           vector e gives a neuron in every top layer,
               FFN'(x) = FFN(x) + act(x phi_k^T) phi_v,   phi_k = W_k e + b_k,   phi_v = W_v e + b_v,
           without a softmax. The pool holds the statement of every request: an edit adds its text, and trains nothing
Departs    The paper finetunes the whole model with the projections on its task. Here the host is frozen, and the
           projections alone are trained, once, on other facts: on their answers with the statement in the pool, and on
           the host's own answers to prompts that must not change (paper: no such term). W_v starts at zero, so that the
           untrained host is the host. For a share of the rows the pool is one sentence, as with a single edit
Undo       Each request has a neuron of its own in each layer (``errata retract``)
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata import config as settings
from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.edit import timestamp, versions
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.reranked import Reranked
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.embedding import word_embeddings
from errata.host.host import Host
from errata.methods._editor import facts_about, split, trained_editor, training_examples
from errata.methods._method import (
    Method,
    Workspace,
    check_requests,
    notes,
    provenance,
    resolve_layers,
    without,
)
from errata.methods._settings import at_least_zero
from errata.training import knowledge as sentences
from errata.training.examples import Example
from errata.training.tune import seeded
from errata.training.whole import WholeTraining
from errata.types import Request
from errata.writing import statement


@dataclass(frozen=True)
class Config:
    """Settings of Kformer."""

    editor: str | None = None
    """File of trained projections, see errata train. None: they are trained on the examples."""
    layers: tuple[int, ...] | None = None
    """Layers whose feed-forwards get neurons. None: the top quarter (paper: 9 to 11 of RoBERTa's 12)."""
    knowledge: int = 5
    """Sentences that a prompt gets at most (authors' code: 5)."""
    candidates: int = 20
    """Sentences with the highest BM25, of which these are taken by their vectors."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "gelu"
    """What a neuron applies to its key's product (paper: the feed-forward's own, GELU)."""
    train_embeddings: bool = False
    """Whether the sentences' word embeddings are trained as well, apart from the model's (authors' code: yes)."""
    start: float = 0.02
    """Standard deviation of W_k's initial entries (authors' code: 0.02)."""
    value_start: float = 0.0
    """Standard deviation of W_v's (authors' code: 0.02)."""
    most: int = 1000
    """Examples that are trained on at most."""
    held_out: float = 0.1
    """Share of the examples that are held out."""
    alone: float = 0.5
    """Share of the rows of a step that find their own sentence only (paper: none)."""
    keep_weight: float = 0.3
    """Weight of the host's own answers to prompts that must not change (paper: none)."""
    answer_tokens: int = 16
    """Tokens of these answers at most."""
    steps: int = 1500
    """Steps of the training at most (authors' code: 8000 on Social IQA, 12,000 on MedQA)."""
    warmup: int = 150
    """Of these, steps in which the rate rises from zero (authors' code: 150)."""
    per_step: int = 16
    """Rows in a step (authors' code: 16 on Social IQA, 8 on MedQA)."""
    learning_rate: float = 1e-2
    """Adam's rate, chosen on the lab, seed 1 (authors' code: 1e-5, for the whole model)."""
    beta2: float = 0.98
    """Adam's second beta, the first being 0.9 (authors' code: 0.98)."""
    weight_decay: float = 0.01
    """Adam's (authors' code: 0.01)."""
    every: int = 200
    """Steps between evaluations on held-out examples."""
    patience: int = 3
    """Evaluations without a lower loss that end training."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = (
            "knowledge", "candidates", "start", "most", "answer_tokens", "per_step", "learning_rate", "every",
            "patience",
        )  # fmt: skip
        complaints = [*positive(self, *names)]
        complaints += at_least_zero(self, "value_start", "keep_weight", "steps", "warmup", "weight_decay")
        for name in ("held_out", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                complaints.append(f"{name}: expected a share below 1, found {getattr(self, name)}")
        if not 0 <= self.alone <= 1:
            complaints.append(f"alone: expected a share from 0 to 1, found {self.alone}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the statements of all requests so far as neurons, and the router that finds them."""
    check_requests("kformer", requests)
    earlier: MemoryEdit | None = work.after
    with without(earlier, host), hooks.frozen(host.model), seeded(host, work.seed):
        editor = trained_editor(
            "kformer", host, config.editor, config, work, lambda: train(host, config, work)
        )
        path, table = word_embeddings(host)
    layers, activation = tuple(editor.body["layers"]), editor.body["activation"]
    if config.layers is not None and resolve_layers(host, config.layers, _top) != layers:
        raise ConfigError(f"layers: the editor was trained for {list(layers)}, found {list(config.layers)}")
    texts = tuple(_statement(host, request) for request in requests)
    vectors = sentences.mean_embeddings(editor.tensors.get("embeddings", table), _ids(host, texts))
    maps = sentences.Projections.of(editor.tensors)
    # one by one: a product for several at once may differ in the last bit
    singles = [maps.neurons(vector) for vector in vectors.split(1)]
    neurons = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*singles, strict=True)]
    before = None if earlier is None else earlier.router
    if isinstance(before, Reranked):
        texts, vectors = (*before.passages, *texts), torch.cat([before.vectors, vectors])
    old = [None] * len(layers) if earlier is None else earlier.interventions
    record = provenance("kformer", host, requests, config, work, **notes(facts_about(editor)))
    return MemoryEdit(
        tuple(
            _intervention(host.layout.feed_forward(layer), keys, values, activation, one)
            for layer, (keys, values), one in zip(layers, neurons, old, strict=True)
        ),
        Reranked(texts, vectors, config.knowledge, config.candidates), record, reads=path,
    )  # fmt: skip


def _intervention(
    module: str, keys: Tensor, values: Tensor, activation: str, earlier: Intervention | None
) -> Intervention:
    """Return a neuron for each entry, with keys and values ``[entries, d]``, behind those of an earlier edit."""
    payload = {"keys": keys[:, None], "biases": keys.new_zeros(len(keys), 1), "values": values[:, None]}
    if earlier is not None:
        payload = {name: torch.cat([earlier.payload[name], part]) for name, part in payload.items()}
    return Intervention(module, "slots", payload, "all", activation)  # type: ignore[arg-type]


def _top(depth: int) -> tuple[int, ...]:
    """Return the layers of the top quarter."""
    return tuple(range(depth - max(1, depth // 4), depth))


def _statement(host: Host, request: Request) -> str:
    return statement(request.text, request.target, host.prompt_format.join)


def _ids(host: Host, texts: Sequence[str]) -> list[tuple[int, ...]]:
    return [host.encode(text, special=False).ids for text in texts]


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the projections on the workspace's examples, whose statements are the pool."""
    examples = training_examples("kformer", host, work, config.most)
    layers = resolve_layers(host, config.layers, _top)
    texts = [_statement(host, example.request) for example in examples]
    with hooks.frozen(host.model), seeded(host, work.seed):
        table = word_embeddings(host)[1].to(host.device)
        pool = sentences.Pool(
            host, [host.layout.feed_forward(layer) for layer in layers], min(layers), _ids(host, texts), table,
            config.knowledge, config.activation,
        )  # fmt: skip
        projections = sentences.Projections.random(
            len(layers), host.layout.width, table.shape[1], key_start=config.start, value_start=config.value_start
        )  # fmt: skip
        rounds = WholeTraining(
            config.steps, config.per_step, config.learning_rate, config.every, config.patience
        )
        plan = sentences.Plan(
            rounds, config.warmup, config.beta2, config.weight_decay, config.alone, config.train_embeddings
        )
        trained, held = _rows(host, examples, texts, config)
        tensors, facts = sentences.train(
            pool, projections, trained, held, plan, seed=work.seed,
            tick=lambda done, total: work.on_progress("projections", done, total),
        )  # fmt: skip
    plain = {name: value for name, value in settings.plain(config).items() if name != "editor"}
    card = {
        "settings": plain, "seed": work.seed, "versions": versions(), "examples": len(examples),
        "rows": len(trained), **facts,
    }  # fmt: skip
    body = {"layers": list(layers), "activation": config.activation}
    return Artefact("kformer", host.fingerprint, tensors, body, card, timestamp())


def _rows(
    host: Host, examples: Sequence[Example], texts: Sequence[str], config: Config
) -> tuple[list[sentences.Row], list[sentences.Row]]:
    """Return rows that are trained on, and rows of the examples that are held out."""
    outside = sorted({prompt for example in examples for prompt in example.outside})
    answers = host.generate(outside, max_new_tokens=config.answer_tokens) if config.keep_weight else []
    own = {prompt: text.strip(" .\n") for prompt, text in zip(outside, answers, strict=False)}
    asked: list[sentences.SentencePrompt] = []
    for number, example in enumerate(examples):
        asked += [sentences.SentencePrompt(number, prompt, answer) for prompt, answer in example.inside]
        kept = [prompt for prompt in example.outside if own.get(prompt)]  # a host may answer nothing
        asked += [
            sentences.SentencePrompt(number, prompt, own[prompt], config.keep_weight) for prompt in kept
        ]
    rows = sentences.rows_with(host, asked, texts, config.candidates)
    _, held = split(range(len(examples)), config.held_out)
    return [row for row in rows if row.own not in held], [row for row in rows if row.own in held]


METHOD = Method(
    name="kformer",
    title="Kformer",
    paper="Kformer: Knowledge Injection in Transformer Feed-Forward Layers, NLPCC 2022, arXiv 2201.05742",
    config=Config,
    fit=fit,
    train=train,
    undo="any",
    gives=MemoryEdit,
    blind="it finds facts by the word embeddings of texts, and a picture has none",
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("examples", "gradients"),
)
