"""PlugLM: facts are rows of a key-value memory, which added layers beside the upper feed-forwards attend to.

Paper      Cheng et al., "Decouple Knowledge from Parameters for Plug-and-Play Language Modeling", Findings of ACL 2023,
           arXiv 2305.11564
Implements Sec. 3: a document is the attentive pooling of its word embeddings, softmax(w^T tanh(W e)), its key and value
           are linear maps of that; a layer's query is the attentive pooling of the prompt's states, mapped and batch
           normalised; the five rows of the largest inner products are attended to, softmax(Q K^T / sqrt(d_head) +
           beta_head cos(query, key)) V, and h = x + FFN(x) + MEM(x). Sec. 5: knowledge is edited by adding, replacing
           and deleting rows
Departs    The paper pre-trains BERT with these layers, and smaller feed-forwards, on masked words. Here they are
           attached to a model as it is, whose weights are frozen, and only they are trained, on examples: the answers
           to prompts that a fact covers, and the model's own to those that it does not. Normalisation is by running
           statistics. A row that adds nothing stands among those attended to (``null_row``), without which a memory
           of one fact would speak on every prompt; the retrieval has a loss of its own (``retrieval_weight``), as
           there are few examples to learn it from; embeddings are scaled to a root mean square of 1 and what a layer
           adds by that of the stream. Half of the steps attend to one row; rates warm up and decay
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
Limits     A prompt is answered as well as the examples teach: those should state what prompts will ask, in such words.
           A document is a bag of words: order is lost. Without rows the model is as it was, bit for bit
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from errata import config as settings
from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.edit import timestamp, versions
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.top_rows import TopRows
from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.host.host import Host
from errata.methods import _editor as editors
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
from errata.training import key_value_memory as knowledge
from errata.training.examples import Example, target_groups, with_other_targets
from errata.training.key_value_memory import Document, KnowledgeMemory, MemoryShape
from errata.training.tune import Line, rms, seeded
from errata.types import Request
from errata.writing import statement


@dataclass(frozen=True)
class Config:
    """Settings of PlugLM."""

    editor: str | None = None
    """File of a trained memory without rows, see errata train. None: one is trained on the examples."""
    layers: tuple[int, ...] | None = None
    """Layers that attend to the memory. None: the upper half (paper: the last 6 of 12)."""
    rows: int = 5
    """Rows that a prompt attends to in each layer (paper: 5)."""
    key_width: int = 128
    """Numbers that keys and queries have (paper: 128)."""
    heads: int | None = None
    """Heads of the attention. None: of 64 numbers each (paper: 12 of 64)."""
    null_row: bool = True
    """Whether attention may also go to a row that adds nothing, with a learned logit (paper: no)."""
    most: int = 1000
    """Examples that are trained on at most."""
    held_out: float = 0.1
    """Share of the examples that are held out."""
    steps: int = 400
    """Steps of AdamW (paper: 8,000 of LAMB)."""
    per_step: int = 16
    """Examples in a step; their facts are the memory then (paper: 8,192 texts)."""
    prompts: int = 1
    """Prompts of either sort, in scope and out of it, of each example in a step."""
    learning_rate: float = 2e-3
    """AdamW's rate (paper: 0.006, LAMB)."""
    gate_rate: float = 0.03
    """The same for the betas and the null row's logits, single numbers that decide whether a row speaks."""
    warmup: int = 50
    """Steps in which the rate rises from zero; it falls linearly to zero in the others."""
    clip: float = 1.0
    """Norm that gradients are cut to."""
    retrieval_weight: float = 1.0
    """Weight of the cross-entropy of an example's own row among those of the step, by inner products (paper: 0)."""
    every: int = 100
    """Steps between evaluations on held-out examples."""
    variants: int = 40
    """Other targets that each example is also trained on, drawn among those that stand in one another's place: few
    examples teach to read a row only where it does not always say the same (paper: none, it has millions of texts)."""
    answer_tokens: int = 16
    """Tokens of the model's own answers, which are to stay, at most."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = (
            "rows", "key_width", "heads", "most", "per_step", "prompts", "learning_rate", "gate_rate", "clip",
            "every", "answer_tokens",
        )  # fmt: skip
        complaints = [
            *positive(self, *names),
            *at_least_zero(self, "steps", "warmup", "retrieval_weight", "variants"),
        ]
        if not 0 <= self.held_out < 1:
            complaints.append(f"held_out: expected a share below 1, found {self.held_out}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the rows of all requests so far, with the layers that attend to them."""
    check_requests("pluglm", requests)
    config = _resolved(host, config)
    earlier: MemoryEdit | None = work.after
    with without(earlier, host), seeded(host, work.seed):
        editor = editors.trained_editor(
            "pluglm", host, config.editor, config, work, lambda: train(host, config, work)
        )
        memory = _restored(editor, host, config)
        keys, parts = knowledge.rows_of(host, memory, [_document(host, request) for request in requests])
    modules = [host.layout.feed_forward(layer) for layer in config.layers or ()]
    if earlier is not None:
        keys = torch.cat([earlier.router.tensors()["keys"], keys])
        parts = [
            {name: torch.cat([one.payload[name], new]) for name, new in part.items()}
            for one, part in zip(earlier.interventions, parts, strict=True)
        ]
    interventions = tuple(
        Intervention(module, "attend", part, "all", shared=layer.shared())
        for module, part, layer in zip(modules, parts, memory.each(), strict=True)
    )
    record = provenance("pluglm", host, requests, config, work, **notes(editors.facts_about(editor)))
    return MemoryEdit(interventions, TopRows(keys, config.rows), record)


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the encoder of facts and the layers on the workspace's examples."""
    config = _resolved(host, config)
    examples = editors.training_examples("pluglm", host, work, config.most)
    trained, held = editors.split(examples, config.held_out)
    modules = [host.layout.feed_forward(layer) for layer in config.layers or ()]
    with hooks.frozen(host.model), seeded(host, work.seed):
        scale = 1 / rms(host.model.get_input_embeddings().weight)
        draw = random.Random(f"pluglm {work.seed}")
        documents, held_documents = (_documents(host, some, config, draw) for some in (trained, held))
        sizes = knowledge.sizes_of(host, config.layers or (), documents)
        memory = KnowledgeMemory(_shape(host, config), sizes, scale).to(host.device)
        plan = knowledge.KnowledgeTraining(
            config.rows, config.steps, config.per_step, config.prompts, config.learning_rate, config.gate_rate,
            config.warmup, config.clip, config.retrieval_weight, config.every,
        )  # fmt: skip
        facts = knowledge.train_knowledge(
            host, modules, memory, documents, held_documents, plan, seed=work.seed, on_progress=work.on_progress,
        )  # fmt: skip
    tensors = {name: tensor.cpu() for name, tensor in memory.state_dict().items()}
    plain = {name: value for name, value in settings.plain(config).items() if name != "editor"}
    card = {
        "settings": plain, "seed": work.seed, "versions": versions(), "examples": len(trained), "held_out": len(held),
    }  # fmt: skip
    return Artefact("pluglm", host.fingerprint, tensors, _body(config), {**card, **facts}, timestamp())


def _resolved(host: Host, config: Config) -> Config:
    layers = resolve_layers(host, config.layers, lambda depth: tuple(range(depth // 2, depth)))
    return replace(config, layers=layers, heads=config.heads or max(1, host.layout.width // 64))


def _shape(host: Host, config: Config) -> MemoryShape:
    return MemoryShape(host.layout.width, config.key_width, config.heads or 1, config.null_row)


def _body(config: Config) -> dict[str, object]:
    """Return what an editor is built with, as plain data."""
    return {
        "layers": list(config.layers or ()), "key_width": config.key_width, "heads": config.heads,
        "null_row": config.null_row,
    }  # fmt: skip


def _restored(editor: Artefact, host: Host, config: Config) -> KnowledgeMemory:
    """Return an editor's memory. Raises ConfigError for settings that it was not trained with."""
    wrong = [name for name, value in _body(config).items() if editor.body.get(name) != value]
    if wrong:
        found = ", ".join(f"{name}={editor.body.get(name)}" for name in wrong)
        raise ConfigError(f"the editor was trained with {found}: give the same settings, or train another")
    memory = KnowledgeMemory(_shape(host, config), [1.0] * len(config.layers or ()))
    memory.load_state_dict(dict(editor.tensors))
    return memory.to(host.device).eval().requires_grad_(False)


def _document(host: Host, request: Request) -> tuple[int, ...]:
    return host.encode(statement(request.text, request.target, host.prompt_format.join)).ids


def _documents(
    host: Host, examples: Sequence[Example], config: Config, draw: random.Random
) -> list[Document]:
    """Return examples as rows of tokens, with the host's own answers to prompts out of scope."""
    prompts = sorted({prompt for example in examples for prompt in example.outside})
    answers = host.generate(prompts, max_new_tokens=config.answer_tokens) if prompts else []
    own = {prompt: text.strip(" .\n") for prompt, text in zip(prompts, answers, strict=True)}
    documents, values = list[Document](), target_groups(examples)
    for example in examples:
        outside = tuple(_line(host, prompt, own[prompt]) for prompt in example.outside if own[prompt])
        variants = tuple(
            _stated(host, one) for one in with_other_targets(example, values, config.variants, draw)
        )
        documents.append(replace(_stated(host, example), outside=outside, variants=variants))
    return documents


def _stated(host: Host, example: Example) -> Document:
    return Document(
        _document(host, example.request),
        tuple(_line(host, prompt, answer) for prompt, answer in example.inside),
        (),
    )


def _line(host: Host, prompt: str, answer: str) -> Line:
    """Return a prompt and its answer. Raises RequestError where they share their only token."""
    row = host.encode_answer(prompt, answer)
    if row.start < 1:
        raise RequestError(f"prompt {prompt!r} and answer {answer!r} share their first token")
    return Line(row.ids[:-1], tuple(range(row.start - 1, len(row.ids) - 1)), row.target)


METHOD = Method(
    name="pluglm",
    title="PlugLM",
    paper="Decouple Knowledge from Parameters for Plug-and-Play Language Modeling, Findings of ACL 2023, "
    "arXiv 2305.11564",
    config=Config,
    fit=fit,
    train=train,
    undo="any",
    gives=MemoryEdit,
    blind="its documents are made of the word embeddings of texts, and a picture has none",
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("examples", "gradients"),
)
