"""Open a model: by name, by folder, or as a live object, without the wrappers around it.

What cannot be edited safely is refused here, with the reason, before anything is fitted: weights that are
away, damaged or not finite, files that describe another model than they hold, wrappers that compute something
else than the model inside them, models that are no causal language models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import ConfigError, HostError
from errata.host import files, hooks, placement, trial
from errata.host.host import Host
from errata.registry import unknown

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    it is unless ``device`` or ``dtype`` is set. ``tokenizer``: needed with a live model, a processor where prompts are
    to have pictures; else the model's own, or another's name. ``device``: ``auto`` takes CUDA if there is one.

    A live model may be wrapped by ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` or PEFT: the
    host is the model inside, and edits act on the wrapped one too. Its training mode stays as it is; whatever
    the host runs, it runs in evaluation mode. A tokenizer with tokens that the model has no embedding for is
    warned about, and texts with such tokens are refused.

    Raises HostError when the model cannot be opened, holds numbers that are not finite, is not fully in
    memory, or is no causal language model or encoder-decoder.
    """
    torch_dtype = as_dtype(dtype)
    place = as_device(device)
    processor, blind = None, ""
    with hooks.plain_torch():
        if isinstance(model, nn.Module):
            live, label = _live(model, tokenizer, None if device == "auto" else place, torch_dtype, name)
        else:
            live = _open(str(model), place, torch_dtype, revision, trust_remote_code)
            label = name or str(model)
        if not hasattr(live, "get_input_embeddings") or not hasattr(live, "config"):
            raise HostError(f"expected a transformers language model, found {type(live).__name__}")
        placement.refuse_away(live)
        inference = next((n for n, p in live.named_parameters() if p.is_inference()), None)
        if inference is not None:
            raise HostError(
                f"weight {inference} was made in inference mode, so it takes no change and passes no gradient on; "
                "make the model outside torch.inference_mode()"
            )
        _refuse_not_finite(live)
        if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            source = str(tokenizer or model)
            tokenizer = files.open_tokenizer(source, revision, trust_remote_code)
            processor, blind = files.open_processor(source, live, revision, trust_remote_code)
        training = [m for m in live.modules() if m.training] if isinstance(model, nn.Module) else []
        try:
            host = Host(live, processor or tokenizer, name=label)
            host.codec.blind = blind or host.codec.blind
            if any(placement.is_packed(module) for module in live.modules()):
                _settle(host)
            trial.check(host)
        finally:
            for module in training:
                module.training = True
    return host


def _live(
    model: nn.Module, tokenizer: Any, place: torch.device | None, dtype: torch.dtype | None, name: str | None
) -> tuple[nn.Module, str]:
    """Return the model inside a live one's wrappers, moved where needed, and its label."""
    if tokenizer is None:
        raise HostError("a live model needs its tokenizer: errata.load(model, tokenizer=...)")
    live = unwrapped(model)
    if place is not None or dtype is not None:
        placement.refuse_away(live)
        live = _moved(live, place, dtype)
    label = name or getattr(getattr(live, "config", None), "_name_or_path", "") or type(live).__name__
    return live, label


# --- wrappers -------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that compute the same: compiled, data-parallel, with LoRA-like adapters.

    Raises HostError for wrappers that compute something else, and where parts of the model are compiled.
    """
    inner: Any = model
    while True:
        if type(inner).__module__.startswith("peft."):
            inner = _without_peft(inner)
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):  # torch.compile
            inner = inner._orig_mod
        elif not hasattr(inner, "config") and [name for name, _ in inner.named_children()] == ["module"]:
            inner = inner.module  # DataParallel, DistributedDataParallel, averaged models
        else:
            break
    _refuse_compiled(inner)
    return inner


def _without_peft(model: Any) -> nn.Module:
    """Return a PEFT model's base with the adapters that are built into it."""
    kinds = getattr(model, "peft_config", None) or {}
    for adapter, config in kinds.items():
        kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
        if getattr(config, "is_prompt_learning", False) or kind == "XLORA":
            raise HostError(
                f"PEFT adapter {adapter!r} ({kind}) changes what the model is given, not its layers, so the "
                "model cannot be edited with it: load the base model, or one with LoRA-like adapters"
            )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model.model
    if not isinstance(base, nn.Module) or base is model:
        raise HostError(f"{type(model).__name__} has no base model inside; load the base model itself")
    return base


def _refuse_compiled(model: nn.Module) -> None:
    """Raise HostError where a part of the model, or its forward, is compiled in place."""
    for path, module in model.named_modules():
        inside = path and isinstance(getattr(module, "_orig_mod", None), nn.Module)
        called = getattr(module, "_compiled_call_impl", None) is not None
        forward = hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        if inside or called or forward:
            what = "its forward" if forward else f"module {path}" if path else "the model"
            raise HostError(
                f"{what} is compiled in place (torch.compile): compiled code does not see what is read "
                "from and put into single layers; load the model before compiling it, or wrap it as a "
                "whole: torch.compile(model)"
            )


# --- from names and folders -----------------------------------------------------------------


def as_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype of a name; None for ``auto``. Raises ConfigError for an unknown one."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype if isinstance(dtype, torch.dtype) else None
    if dtype not in DTYPES:
        raise ConfigError(unknown(dtype, ["auto", *DTYPES], "dtype"))
    return DTYPES[dtype]


def as_device(device: str) -> torch.device:
    """Return the device of a name; ``auto``: a GPU where there is one. Raises ConfigError for one that is not there."""
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
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local:
        files.check_folder(folder)
    elif folder.is_file():
        raise HostError(f"{folder} is a file; expected a folder written by save_pretrained, or a hub name")
    else:
        files.refuse_path(name)
    options: Mapping[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust,
        **({} if local else files.hub_options(name, revision)),
    }
    source = str(folder) if local else name
    with files.reading(f"model {name!r}"):
        config = AutoConfig.from_pretrained(source, **options)
        model, report = _opener(config).from_pretrained(
            source, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
        files.check_loaded(name, model, report)
    return _moved(model, place, None)


def _opener(config: Any) -> Any:
    """Return the transformers class that opens a model as its configuration describes it."""
    import transformers

    heads = [str(name) for name in getattr(config, "architectures", None) or ()]
    for ending in ("ForMaskedLM", "ForSequenceClassification"):
        if any(name.endswith(ending) for name in heads):
            return getattr(transformers, f"AutoModel{ending}")
    # as causal models, transformers opens the decoder of some encoder-decoders alone
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    towers = config.get_text_config(decoder=True) is not config
    if towers and type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


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
    try:
        with torch.no_grad():
            host.run(host.codec.probe(host.device))
    except RuntimeError as error:
        raise HostError(f"the quantised model does not run on {host.device}: {error}") from error


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
