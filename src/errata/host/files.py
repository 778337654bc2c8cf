"""Read model files that others wrote: they are checked before anything is built from it.

Readers of many formats fail in many ways. Here each failure is one HostError with its cause kept, and a folder
whose settings describe another model than its weights hold is refused rather than filled up with random numbers.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata.errors import ErrataError, HostError
from errata.host.passes import arguments

CONFIG_BYTES = 2**24
"""Largest config.json that is read."""
LARGEST = 10**15
"""Largest whole number that a model's configuration may hold."""
DEPTHS = re.compile(r"(num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(en|de)coder_layers)$")
"""Settings of how many blocks a model has; each block has a weight at least."""
SIZES = re.compile(
    r"(vocab_size|hidden_size|intermediate_size|_dim|head_dim|n_\w+|d_model|d_ff|d_kv|"
    r"num_\w*heads|num_\w*experts|n_routed_experts|\w*_size)$"
)
"""Settings that a model's memory grows with."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a model that say how images, sounds and films are prepared for it."""
LONGEST = 300
"""Most characters of another library's message."""

MERGE = (
    "merge it into its base model and save that (peft: model.merge_and_unload().save_pretrained(folder)), or "
    "open the base model yourself, attach the adapter and give the live model"
)


# --- errors ---------------------------------------------------------------------------------


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a reader fails with inside the block into one HostError, its cause kept."""
    try:
        yield
    except (ErrataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:
        raise HostError(
            f"cannot open {what}: {first_line(error)} (a quantised model needs: pip install 'errata[quantized]')"
        ) from error
    except BaseException as error:  # a panic in one of the readers written in Rust is no Exception
        raise HostError(f"cannot open {what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message in printable characters, of bounded length."""
    lines = str(error).strip()[: 4 * LONGEST].splitlines()
    text = lines[0].strip() if lines else ""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


# --- folders --------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise HostError unless a folder holds a whole model, as far as its settings and file headers tell."""
    adapter = (folder / "adapter_config.json").exists()
    if not (folder / "config.json").exists():
        if adapter:
            raise HostError(f"{folder} holds a PEFT adapter (adapter_config.json) and no model: {MERGE}")
        raise HostError(f"{folder} holds no config.json; expected a folder written by save_pretrained")
    if adapter:
        raise HostError(
            f"{folder} holds a PEFT adapter (adapter_config.json) beside a model, so it is not clear which of "
            f"the two is meant: move the adapter's files away to open the model alone; else {MERGE}"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise HostError(f"{folder} holds no .safetensors weights; pickled weights are never opened")
    config = _config(folder / "config.json")
    with reading(f"model {str(folder)!r}"):
        tensors, elements = _headers(weights)
    for key, value in _numbers(config):
        _check_number(folder, key, value, tensors, elements)


def _config(path: Path) -> dict[str, Any]:
    with reading(f"model {str(path.parent)!r}"):
        if path.stat().st_size > CONFIG_BYTES:
            raise HostError(f"{path} has {path.stat().st_size} bytes, expected {CONFIG_BYTES} at most")
        settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise HostError(f"{path} holds {type(settings).__name__}, expected an object of settings")
    return settings


def _headers(paths: Iterable[Path]) -> tuple[int, int]:
    """Return how many tensors some files hold, and how many bits of numbers."""
    from safetensors import safe_open

    count, bits = 0, 0
    for path in paths:
        with safe_open(path, "pt") as file:
            count += len(file.keys())
        bits += 8 * path.stat().st_size
    return count, bits


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield all whole numbers of a document with the setting that holds them."""
    pending: list[tuple[str, Any]] = [(key, value)]
    while pending:
        name, item = pending.pop()
        if isinstance(item, Mapping):
            pending += [(str(inner), one) for inner, one in item.items()]
        elif isinstance(item, list):
            pending += [(name, one) for one in item]
        elif isinstance(item, int) and not isinstance(item, bool):
            yield name, item
        elif isinstance(item, float) and math.isfinite(item) and item.is_integer():
            yield name, int(item)


def _check_number(folder: Path, key: str, value: int, tensors: int, bits: int) -> None:
    """Raise HostError for a number that no model of these weights can have."""
    bound, what = None, ""
    if DEPTHS.match(key) and value > tensors:
        bound, what = tensors, f"the weights are {tensors} tensors"
    elif SIZES.search(key) and value > bits:
        bound, what = bits, f"the weights have {bits} bits"
    elif abs(value) > LARGEST and not key.endswith("max_length"):
        bound, what = LARGEST, "no setting of a model is that large"
    if bound is not None:
        text = str(value) if abs(value) < 10**30 else f"a number of {value.bit_length()} bits"
        raise HostError(
            f"{folder / 'config.json'} sets {key!r:.80} to {text}, but {what}; the file is damaged"
        )


def check_loaded(name: str, model: Any, report: Any) -> None:
    """Raise HostError where weights are missing or of another shape than in the configuration.

    transformers makes such weights up at random. ``report``: its loading report. Warns of weights in
    the files that the model does not use.
    """
    fields = report if isinstance(report, Mapping) else vars(report)
    missing = sorted(map(str, fields.get("missing_keys") or ()))
    odd = sorted(
        str(one[0] if isinstance(one, (tuple, list)) else one) for one in fields.get("mismatched_keys") or ()
    )
    unused = sorted(map(str, fields.get("unexpected_keys") or ()))
    if missing or odd:
        bad, what = (
            (missing, "are missing from the files") if missing else (odd, "have another shape in the files")
        )
        raise HostError(
            f"cannot open model {name!r}: {len(bad)} weights, {bad[0]!r:.120} first, {what}; config.json "
            "describes another model than the weights are of"
        )
    patterns = {_pattern(key) for key, _ in model.named_parameters(remove_duplicate=False)}
    owners = {key.rpartition(".")[0] for key in patterns}
    # of a further block, or of a layer that the model has, as a bias that the settings switch off
    alike = [key for key in unused if _pattern(key) in patterns or _pattern(key).rpartition(".")[0] in owners]
    if alike:
        raise HostError(
            f"cannot open model {name!r}: the files hold {len(alike)} weights, {alike[0]!r:.120} first, that "
            "config.json has no place for; it describes a smaller model"
        )
    if unused:
        warnings.warn(
            f"{len(unused)} weights in the files of {name!r}, {unused[0]!r:.120} first, are of no part of the "
            "model and are left out",
            RuntimeWarning,
            stacklevel=2,
        )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "0", name)


# --- names ----------------------------------------------------------------------------------


def refuse_path(name: str) -> None:
    """Raise HostError for a name that can only be a folder's, since there is none."""
    path = Path(name).expanduser()
    parts = name.replace("\\", "/").strip("/").split("/")
    if path.is_absolute() or name[:1] in ("~", ".") or "\\" in name or name.endswith("/") or len(parts) > 2:
        near = next((parent for parent in path.parents if parent.is_dir()), None)
        there = f"; {near} is there, {path.relative_to(near).parts[0]!r} in it is not" if near else ""
        raise HostError(f"no folder {name!r}{there}; expected a folder written by save_pretrained")


def hub_options(name: str, revision: str | None) -> dict[str, Any]:
    """Ask the hub once whether it has a model; options for opening it.

    Without an answer what was downloaded earlier is used, and nothing is tried again. Raises HostError where
    there is neither.
    """
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    unreachable: tuple[type[Exception], ...] = (OSError, getattr(errors, "HTTPError", OSError))
    neither = f"there is no folder {name!r} here"
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
        if constants.HF_HUB_OFFLINE:
            problem = "the hub is not queried (HF_HUB_OFFLINE is set)"
        else:
            HfApi().model_info(name, revision=revision, timeout=10)
            return {}
    except errors.HFValidationError as error:
        raise HostError(f"{neither}, and no model of the hub has such a name: {first_line(error)}") from error
    except errors.RepositoryNotFoundError as error:
        raise HostError(
            f"{neither}, and the hub has no model of that name, or not for you (hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HostError(f"the hub's model {name!r} has no revision {revision!r}") from error
    except unreachable as error:
        if getattr(getattr(error, "response", None), "status_code", None) is not None:
            return {}  # it answers, if only not to this question
        problem = f"the hub cannot be reached ({first_line(error)})"
    if cached:
        return {"local_files_only": True}
    raise HostError(f"{neither}, {problem}, and {name!r} was not downloaded before")


def processor_files(name: str) -> list[Path]:
    """Return the files in which a folder, or a hub model that was downloaded, describes how images and sounds go in."""
    from huggingface_hub import errors, try_to_load_from_cache

    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            paths = [folder / file for file in PROCESSORS]
        else:
            cached = [try_to_load_from_cache(name, file) for file in PROCESSORS]
            paths = [Path(path) for path in cached if isinstance(path, str)]
    except (OSError, ValueError, errors.HFValidationError):  # a label that is no name of a model
        return []
    return [path for path in paths if path.is_file()]


# --- tokenizers -----------------------------------------------------------------------------


def open_tokenizer(name: str, revision: str | None, trust: bool) -> Any:
    """Open a folder's or a hub model's tokenizer and try it out. Raises HostError."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    options = {} if folder.is_dir() else hub_options(name, revision)
    source = str(folder) if folder.is_dir() else name
    with reading(f"the tokenizer of {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust, **options
        )
        check_tokenizer(tokenizer)
    return tokenizer


def open_processor(name: str, model: Any, revision: str | None, trust: bool) -> tuple[Any, str]:
    """Open the processor of text and pictures that a folder or hub model has; None and why prompts have no pictures.

    Only of a model with an image tower beside its language model. Text is read without it, so what it fails with is
    no error before a picture is given.
    """
    config = model.config
    if config.get_text_config(decoder=True) is config or "pixel_values" not in arguments(model):
        return None, ""
    if not processor_files(name):
        return None, "there is no processor beside it, as preprocessor_config.json describes one"
    from transformers import AutoProcessor

    folder = Path(name).expanduser()
    options = {} if folder.is_dir() else hub_options(name, revision)
    try:
        processor = AutoProcessor.from_pretrained(
            str(folder) if folder.is_dir() else name, revision=revision, trust_remote_code=trust, **options
        )
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return None, f"its processor cannot be opened: {first_line(error)}"
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        return None, f"its processor, {type(processor).__name__}, is none of text and pictures"
    return processor, ""


def check_tokenizer(tokenizer: Any) -> None:
    """Raise HostError, or whatever it fails with, where a tokenizer cannot encode and decode."""
    vocabulary = tokenizer.get_vocab()
    if not all(isinstance(token, str) and isinstance(index, int) for token, index in vocabulary.items()):
        raise HostError("the tokenizer's vocabulary is not one of texts with numbers")
    for kind in ("bos_token", "eos_token", "pad_token"):
        token, index = getattr(tokenizer, kind, None), getattr(tokenizer, f"{kind}_id", None)
        if token is not None and not isinstance(index, int):
            raise HostError(f"the tokenizer's {kind} {str(token)!r:.80} has no number")
    template = getattr(tokenizer, "chat_template", None)
    if template is not None and not isinstance(template, (str, dict)):
        raise HostError(f"the tokenizer's chat_template is {type(template).__name__}, expected a text")
    output = tokenizer("Ada was born.", return_offsets_mapping=bool(getattr(tokenizer, "is_fast", False)))
    tokenizer.batch_decode([list(output["input_ids"])], skip_special_tokens=True)
