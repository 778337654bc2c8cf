"""Open a model: by name, by folder, or as a live object."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.errors import ConfigError, HostError, RequestError
from errata.host import hooks, identity, locking, placement, tokens
from errata.host.families import Published, published
from errata.host.layout import Layout, Site, discover
from errata.registry import unknown

if TYPE_CHECKING:  # opens transformers, which most uses of this file do without
    from errata.host.stopping import Stop

BRANCHES = "_errata_branches"
OVERLAYS = "_errata_overlays"
TEXTS_KEPT = 2**17
"""Tokenised texts a host remembers: the same probes are asked before and after every edit."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Host:
    """A causal language model with its tokenizer and its layout.

    Not changed by anything but an edit's ``apply_`` and ``on``.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.name = name
        self.model.eval()
        locking.of(self.model)  # made now, before there are threads
        placement.keep_gradients_(self.model)

    def __repr__(self) -> str:
        return f"Host({self.name!r}, {self.family}, {len(self.layout.blocks)} layers, {self.dtype})"

    # --- facts -----------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, where the model's own holds others beside it."""
        inner = getattr(self.config, "get_text_config", None)
        return inner(decoder=True) if inner is not None else self.config

    @property
    def vocab_size(self) -> int:
        """Number of tokens the model may answer with."""
        return int(self.text_config.vocab_size)

    @property
    def family(self) -> str:
        """Architecture name, e.g. ``llama``."""
        return str(getattr(self.config, "model_type", type(self.model).__name__))

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings."""
        return placement.runs_on(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @cached_property
    def window(self) -> int | None:
        """Longest input in tokens; None if the configuration sets no bound."""
        for key in ("max_position_embeddings", "n_positions", "seq_length", "n_ctx"):
            bound = getattr(self.text_config, key, None)
            if isinstance(bound, int) and bound > 0:
                return bound
        return None

    @cached_property
    def layout(self) -> Layout:
        """Sites found by structure. Raises HostError where there are none to find."""
        ids = torch.arange(5, device=self.device)[None] % self.vocab_size
        probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return discover(self.model, probe)

    @cached_property
    def published(self) -> Published | None:
        """Layers and settings published for this very shape of model, if any."""
        return published(self.family, len(self.layout.blocks), self.layout.width)

    @property
    def fingerprint(self) -> str:
        """Identity of weights and vocabulary, 16 hex digits; see :mod:`errata.host.identity`.

        Weights count as rounded to bfloat16, so that one checkpoint opened in float32 and in bfloat16 is
        the same host; so it is in float16, unless it holds numbers too small for that. A quantised copy
        is another host. Names the unedited model, also while edits are in place, and is taken anew once
        something else has changed the weights. Raises HostError for weights that cannot be read.
        """
        return identity.fingerprint(self)

    def _take_fingerprint(self) -> str:
        digest = hashlib.sha256(b"errata host 1")
        for name, part in self._hashes(torch.bfloat16):
            digest.update(f"{name}:{part}\n".encode())
        if self.tokenizer is not None:
            vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
            digest.update(repr(vocabulary).encode())
        return digest.hexdigest()[:16]

    @locking.shared
    def weights_hash(self) -> str:
        """SHA-256 over the names, shapes and bytes of every parameter and buffer as they are now."""
        digest = hashlib.sha256()
        for name, part in self._hashes(None):
            digest.update(f"{name}:{part}\n".encode())
        return digest.hexdigest()

    def _hashes(self, dtype: torch.dtype | None) -> list[tuple[str, str]]:
        named = list(placement.named_tensors(self.model, buffers=dtype is None))
        if dtype is not None:
            named = [(n, self.overlays[n].unedited(p) if n in self.overlays else p) for n, p in named]

        def part(item: tuple[str, Tensor]) -> tuple[str, str]:
            name, tensor = item
            tensor = tensor.detach()
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            flat = tensor.contiguous().cpu().reshape(-1).view(torch.uint8)
            head = f"{tuple(tensor.shape)}:{tensor.dtype}:".encode()
            return name, hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(part, named))

    def device_of(self, site: Site) -> torch.device:
        """Where a site computes; with a device map not everything is where the embeddings are."""
        return placement.runs_on(self.model.get_submodule(site.name))

    @torch.no_grad()
    @locking.shared
    def weight(self, site: Site) -> Tensor:
        """Return a copy of a site's weight as it acts now, ``[d_out, d_in]``, float32 or wider.

        With the edits in place, merged or beside. A packed weight is read by running its module on unit
        vectors, so it has the precision of the host's dtype.
        """
        module: Any = self.model.get_submodule(site.name)
        if not site.packed:
            weight = module.weight.detach()
            columns = (weight if site.transposed else weight.mT).to(
                torch.promote_types(weight.dtype, torch.float32), copy=True
            )  # [d_in, d_out]: a column is what a unit vector gives
        else:
            units = torch.eye(site.d_in, dtype=self.dtype, device=self.device_of(site))
            zero = module.forward(units.new_zeros(1, 1, site.d_in)).float()  # the bias, if there is one
            parts = [module.forward(part[None]).float() - zero for part in units.split(1024)]
            columns = torch.cat([part.reshape(-1, site.d_out) for part in parts])
        beside = self.branches.get(site.parameter)
        if beside is not None:
            columns = beside(torch.eye(site.d_in, dtype=columns.dtype, device=columns.device), columns)
        return columns.mT

    @property
    def edited(self) -> bool:
        """Whether an edit of weights is in place, merged or beside."""
        return bool(self.overlays or self.branches)

    @property
    def branches(self) -> Mapping[str, Any]:
        """What stands beside weights, by parameter; kept on the model, as :attr:`overlays` are.

        Written by the edits room alone; each entry maps a module's input and output to its new output.
        """
        return self.model.__dict__.get(BRANCHES, {})

    @property
    def overlays(self) -> Mapping[str, Any]:
        """What stands on each touched weight; kept on the model, so that two hosts of it agree.

        Written by the edits room alone; each entry has the original bits as ``base``.
        """
        return self.model.__dict__.get(OVERLAYS, {})

    # --- running ---------------------------------------------------------------------------

    @cached_property
    def continues(self) -> bool:
        """Whether texts may go on from one that was run before, tried out once; see ``continuing``."""
        from errata.host import continuing

        return continuing.works(self)

    @cached_property
    def accepts(self) -> frozenset[str]:
        """Arguments of the model's forward."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def pad_id(self) -> int:
        """Id used to fill rows; masked out everywhere."""
        for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(self.tokenizer, key, None)
            if value is not None:
                return int(value)
        return 0

    def batch(self, rows: Sequence[Sequence[int]], *, side: tokens.Side = "right") -> tokens.Batch:
        """Pad rows of token ids. Raises RequestError for a row longer than the model's window."""
        longest = max(len(row) for row in rows)
        if self.window is not None and longest > self.window:
            raise RequestError(
                f"a text of {longest} tokens is longer than the model's window of {self.window}"
            )
        return tokens.pad(rows, side=side, fill=self.pad_id, device=self.device)

    def inputs(self, batch: tokens.Batch) -> dict[str, Any]:
        """Return what the model takes of a batch wherever it is run or generates."""
        return {"input_ids": batch.ids, "attention_mask": batch.mask}

    @locking.shared
    def forward(self, batch: tokens.Batch, *, keep: int | None = None) -> Tensor:
        """Run a batch; logits ``[rows, length, vocab]``, or of the last ``keep`` positions only."""
        inputs: dict[str, Any] = {**self.inputs(batch), "use_cache": False}
        if "position_ids" in self.accepts:
            inputs["position_ids"] = batch.positions
        if keep is not None and "logits_to_keep" in self.accepts:
            inputs["logits_to_keep"] = keep
        logits = self.model(**inputs).logits
        return logits if keep is None else logits[:, -keep:]

    @locking.shared
    def forward_at(self, batch: tokens.Batch, row: Tensor, at: Tensor) -> Tensor:
        """Run a batch; logits ``[n, vocab]`` at the positions (row[i], at[i]) only."""
        head = self.model.get_output_embeddings()
        if head is None:
            logits = self.forward(batch)
            return logits[row.to(logits.device), at.to(logits.device)]
        with hooks.gathering(head, row.to(batch.ids.device), at.to(batch.ids.device)):
            return self.forward(batch)[0]

    def generate(self, prompt: str | Sequence[str], *, max_new_tokens: int = 32, natural_stop: bool = True):
        """Continue one prompt, or each of several, greedily; return the new text only.

        Stops at the end token, and unless ``natural_stop`` is off also at a line break or shortly
        after the first sentence.
        """
        one = isinstance(prompt, str)
        prompts = [prompt] if one else list(prompt)
        rows = [self.encode_prompt(text) for text in prompts]
        texts = generate_rows(self, rows, max_new_tokens, "sentence" if natural_stop else "end")
        return texts[0] if one else texts

    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise a text with character offsets; ``special`` as in :func:`tokens.encode`."""
        return tokens.encode(self.tokenizer, text, special=special)

    @cached_property
    def _remember(self) -> Callable[..., Any]:
        return lru_cache(TEXTS_KEPT)(lambda make, *given: make(*given[:-1], special=given[-1]))

    def encode_prompt(self, prompt: str, *, special: bool = True) -> tuple[int, ...]:
        """Tokenise a prompt to be continued; ids."""
        return self._remember(_prompt_ids, self.tokenizer, prompt, special)

    def encode_answer(self, prompt: str, answer: str, *, special: bool = True) -> tokens.Answer:
        """Tokenise prompt and answer together."""
        return self._remember(tokens.encode_answer, self.tokenizer, prompt, answer, special)


def _prompt_ids(tokenizer: Any, prompt: str, *, special: bool) -> tuple[int, ...]:
    return tokens.encode_prompt(tokenizer, prompt, special=special).ids


@locking.shared
def generate_rows(
    host: Host, rows: Sequence[tuple[int, ...]], max_new_tokens: int, stop: Stop = "sentence"
) -> list[str]:
    """Continue rows of token ids greedily; the new text only, cut at its natural stop.

    Rows that were begun already (``continuing.Begun``) are gone on from. No row says more than the model's
    window holds.
    """
    from errata.host import continuing, stopping

    if host.continues and continuing.plain(host):
        begun = rows if isinstance(rows, continuing.Begun) else continuing.begin(host, rows)
        ids: Any = continuing.greedy(host, begun, _limits(host, rows, max_new_tokens), stop)
    else:
        from transformers import StoppingCriteriaList

        batch = host.batch(rows, side="left")
        stops = StoppingCriteriaList([stopping.NaturalStop(host.tokenizer, batch.ids.shape[1], stop)])
        limit = min(_limits(host, rows, max_new_tokens))
        ids = _generate(host, batch, limit, do_sample=False, stopping_criteria=stops)
    texts = host.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [stopping.cut(text, stop) for text in texts]


def _limits(host: Host, rows: Sequence[tuple[int, ...]], wanted: int) -> list[int]:
    """Return how many tokens each row may say: one at least, as all fit before it."""
    if host.window is None:
        return [wanted] * len(rows)
    return [max(1, min(wanted, host.window - len(row))) for row in rows]


@locking.shared
def draw_rows(
    host: Host, rows: Sequence[tuple[int, ...]], total: int, *, top_k: int = 5, seed: int = 0
) -> list[str]:
    """Continue rows by drawing among the ``top_k`` most probable tokens, up to ``total`` with the row's own.

    What a row says depends on seed and row, not on its neighbours or the global random state. Rows that were
    begun already are gone on from.
    """
    from errata.host import continuing

    limits = [min(total - len(row), one) for row, one in zip(rows, _limits(host, rows, total), strict=True)]
    begun = rows if isinstance(rows, continuing.Begun) else continuing.begin(host, rows)
    ids = continuing.draw(host, begun, limits, top_k=top_k, seed=seed)
    return list(host.tokenizer.batch_decode(ids, skip_special_tokens=True))


@locking.exclusive
def sample_rows(
    host: Host, rows: Sequence[Sequence[int]], new_tokens: int, *, top_k: int | None, seed: int
) -> list[str]:
    """Continue rows of token ids by sampling exactly ``new_tokens`` tokens each.

    ``top_k`` keeps the k most probable tokens at each step, None all. The global random state is left
    as it was.
    """
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        ids = _generate(
            host, host.batch(rows, side="left"), new_tokens, do_sample=True, top_k=top_k or 0, top_p=1.0,
            temperature=1.0, min_new_tokens=new_tokens,
        )  # fmt: skip
    return list(host.tokenizer.batch_decode(ids, skip_special_tokens=True))


def _generate(host: Host, batch: tokens.Batch, new_tokens: int, **options: Any) -> Tensor:
    settings = {"temperature": None, "top_p": None, "top_k": None, "num_beams": 1, **options}
    with torch.no_grad():
        out = host.model.generate(
            **host.inputs(batch),
            max_new_tokens=new_tokens,
            pad_token_id=host.pad_id,
            **settings,
        )
    return out[:, batch.ids.shape[1] :]


# --- opening --------------------------------------------------------------------------------


def load(
    model: str | os.PathLike[str] | nn.Module,
    tokenizer: Any = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> Host:
    """Open a host.

    ``model``: a hub name, a folder written by ``save_pretrained``, or a live model, which stays where
    it is unless ``device`` or ``dtype`` say otherwise. ``tokenizer``: needed with a live model; else
    the model's own, or another's name. ``device``: ``auto`` takes CUDA if there is one.

    Raises HostError when the model cannot be opened, holds numbers that are not finite, or is not
    fully in memory.
    """
    wanted = _dtype(dtype)
    place = _device(device)
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise HostError("a live model needs its tokenizer: errata.load(model, tokenizer=...)")
        live = model
        if device != "auto" or wanted is not None:
            _refuse_unloaded(live)
            live = _moved(live, None if device == "auto" else place, wanted)
        label = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    else:
        live = _open(str(model), place, wanted, revision, trust_remote_code)
        label = name or str(model)
    if not hasattr(live, "get_input_embeddings") or not hasattr(live, "config"):
        raise HostError(f"expected a transformers language model, found {type(live).__name__}")
    _refuse_unloaded(live)
    _refuse_not_finite(live)
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = _open_tokenizer(str(tokenizer or model), revision, trust_remote_code)
    host = _host(live, tokenizer, label)
    if any(placement.is_packed(module) for module in live.modules()):
        _settle(host)
    return host


def _host(model: Any, tokenizer: Any, name: str) -> Host:
    """Make the host that suits a model. Raises HostError for an encoder-decoder that says nothing."""
    from errata.host.seq2seq import Seq2SeqHost, is_encoder_decoder

    if not is_encoder_decoder(model):
        return Host(model, tokenizer, name=name)
    if model.get_output_embeddings() is None:
        raise HostError(
            f"{type(model).__name__} is an encoder-decoder without a language modelling head; "
            "open it as AutoModelForSeq2SeqLM does"
        )
    return Seq2SeqHost(model, tokenizer, name=name)


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype if isinstance(dtype, torch.dtype) else None
    if dtype not in DTYPES:
        raise ConfigError(unknown(dtype, ["auto", *DTYPES], "dtype"))
    return DTYPES[dtype]


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} asked for, but no CUDA device is to be seen; use --device cpu")
    return place


def _open(
    name: str, place: torch.device, dtype: torch.dtype | None, revision: str | None, trust: bool
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        raise HostError(f"{folder} holds no config.json; expected a folder written by save_pretrained")
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise HostError(f"{folder} holds no .safetensors weights; pickled weights are never opened")
    if folder.is_file():
        raise HostError(f"{folder} is a file; expected a folder written by save_pretrained, or a hub name")
    options: Mapping[str, Any] = {
        "dtype": dtype or "auto",
        "revision": revision,
        "trust_remote_code": trust,
        "use_safetensors": True,
    }
    found = str(folder) if folder.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(found, revision=revision, trust_remote_code=trust)
        # asked for a causal model, transformers gives the decoder of some encoder-decoders alone
        both = bool(getattr(config, "is_encoder_decoder", False))
        model = (AutoModelForSeq2SeqLM if both else AutoModelForCausalLM).from_pretrained(found, **options)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HostError(f"cannot open model {name!r}: {first}") from error
    except ImportError as error:
        first = str(error).strip().splitlines()[0]
        raise HostError(
            f"cannot open model {name!r}: {first} (a quantised model needs: pip install 'errata[quantized]')"
        ) from error
    return _moved(model, place, None)


def _moved(model: Any, place: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """Move a model, unless it is there already. Raises HostError where its kind forbids that."""
    if dtype is not None and any(placement.is_packed(module) for module in model.modules()):
        raise HostError("a quantised model keeps the dtype it was made with; open it with dtype='auto'")
    if dtype is None and all(t.device == place for t in (*model.parameters(), *model.buffers())):
        return model
    try:
        return model.to(device=place, dtype=dtype)
    except (ValueError, RuntimeError) as error:
        raise HostError(f"cannot move the model to {place or dtype}: {error}; load it there") from error


def _settle(host: Host) -> None:
    """Run a quantised model once: some layers cast or rearrange their own tensors at their first run."""
    ids = torch.arange(5, device=host.device)[None] % host.vocab_size
    try:
        with torch.no_grad():
            host.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except RuntimeError as error:
        raise HostError(f"the quantised model does not run on {host.device}: {error}") from error


def _open_tokenizer(name: str, revision: str | None, trust: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HostError(f"cannot open the tokenizer of {name!r}: {first}") from error


def _refuse_unloaded(model: nn.Module) -> None:
    placement.refuse_away(model)


def _refuse_not_finite(model: nn.Module) -> None:
    tensors = placement.named_tensors(model, buffers=False)
    bad = [n for n, t in tensors if t.is_floating_point() and not _finite(t)]
    if bad:
        raise HostError(f"weight {bad[0]} holds NaN or infinite numbers ({len(bad)} such weights); refused")


def _finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() < 2 else tensor  # eight bits have no isfinite
    return bool(torch.isfinite(wide).all())


def quiet() -> None:
    """Turn off the loader's own progress bars; for programs that show their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
