"""Where a model's weights are and in what form: what can be written, and what only edited beside.

A weight that lies on the meta device, is fetched for each forward pass, or is one piece of many takes
a write without complaint and forgets it. A packed weight holds codes, so adding to it means nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import HostError

WHOLE = "load the whole model into memory: no device_map, or one that names only devices that hold weights"
GATHER = "gather the weights into one process first"


# --- packed weights ---------------------------------------------------------------------------


def packed(tensor: Tensor) -> bool:
    """Whether a tensor ``[...]`` holds something else than its values: integer codes, eight bits, a wrapper's parts."""
    plain = type(tensor) in (Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor))
    return not plain or not tensor.is_floating_point() or tensor.element_size() < 2


def is_packed(module: nn.Module) -> bool:
    """Whether a module without children keeps its numbers packed, in parameters or in buffers."""
    if next(module.children(), None) is not None:
        return False
    weights = list(module.parameters(recurse=False))
    if any(packed(weight) for weight in weights):
        return True
    if any(weight.ndim > 1 for weight in weights):
        return False
    # counters, positions and masks are integers, too, but not codes of few bits in rows
    codes = [t for t in module.buffers(recurse=False) if t.ndim > 1 and packed(t)]
    return any(t.dtype not in (torch.bool, torch.int64) for t in codes)


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def named_tensors(model: nn.Module, *, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    """Name the plain tensors ``[...]`` a model consists of, packed weights with their codes and scales.

    ``buffers``: also those of modules that are not packed. Raises HostError for weights that are away.
    """
    plain: list[tuple[str, Tensor]] = []
    inside: set[str] = set()
    others: list[tuple[str, Tensor]] = []
    for path, module in model.named_modules():  # one walk for all, since a large model has many modules
        prefix = f"{path}." if path else ""
        own = [(prefix + name, p) for name, p in module._parameters.items() if p is not None]
        beside = [(prefix + name, b) for name, b in module._buffers.items() if b is not None]
        plain += own
        others += beside
        if is_packed(module):
            inside.update(name for name, _ in (*own, *beside))
            saved = {prefix + name: tensor for name, tensor in _saved(module).items()}
            for name, tensor in sorted({**dict(own), **dict(beside), **saved}.items()):
                yield from _parts(name, tensor)
    for name, tensor in (*_once(plain), *(_once(others) if buffers else ())):
        if tensor.is_meta:
            raise HostError(f"weight {name} is on the meta device or offloaded and cannot be read; {WHOLE}")
        if name not in inside:
            yield name, tensor.detach()


def _once(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Leave out tensors that an earlier name has named, as of tied weights."""
    ids: set[int] = set()
    for name, tensor in tensors:
        if id(tensor) not in ids:
            ids.add(id(tensor))
            yield name, tensor


def _saved(module: nn.Module) -> dict[str, Tensor]:
    """What a packed module would save, scales included that are neither parameter nor buffer."""
    clone = copy.copy(module)
    # bitsandbytes rearranges the weight itself when its state dict is read
    clone.__dict__["_parameters"] = copy.deepcopy(module._parameters)
    return {name: value for name, value in clone.state_dict().items() if isinstance(value, Tensor)}


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Open tensors that wrap others, such as torchao's."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor.detach()
        return
    opened: Any = tensor
    names, _ = opened.__tensor_flatten__()
    for part in names:
        inner = getattr(tensor, part)
        if isinstance(inner, Tensor):
            yield from _parts(f"{name}.{part}", inner)


def keep_gradients_(model: nn.Module) -> None:
    """Have bitsandbytes' 4-bit layers compute on the CPU in the way that passes gradients on.

    Where the processor allows, they rearrange their weight at the first run without gradients, and
    from then on pass none; a search for values through them would go on half blind.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # puts a rearranged weight back
            module.__dict__["support_avx512bf16_for_cpu"] = False


def runs_on(module: nn.Module) -> torch.device:
    """Return where a module computes: where its tensors lie, or are fetched to when they are offloaded."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    for hook in _offloading(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return torch.device("cpu")


# --- weights that are elsewhere ---------------------------------------------------------------


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor ``[...]`` is one process's piece of a larger one."""
    pieces = hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")
    return pieces or hasattr(tensor, "ds_id") or type(tensor).__name__ == "FlatParameter"


def offloaded(module: nn.Module) -> bool:
    """Whether a module's weights are fetched for each forward pass and dropped after it (accelerate)."""
    return bool(_offloading(module))


def _offloading(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [one for one in (hook, *getattr(hook, "hooks", ())) if getattr(one, "offload", False)]


def refuse_away(model: nn.Module) -> None:
    """Raise HostError unless every weight is whole and in memory.

    An edit is bound to all weights by their fingerprint, so all of them must be readable.
    """
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise HostError(f"the model is wrapped for sharding (FSDP) at {path or 'its root'}; {GATHER}")
    pieces = [name for name, p in model.named_parameters() if sharded(p)]
    if pieces:
        raise HostError(f"{len(pieces)} weights, {pieces[0]} first, are sharded over processes; {GATHER}")
    away = [name for name, p in model.named_parameters() if p.is_meta]
    if away:
        mapped = _mapped(model)
        raise HostError(
            f"{len(away)} weights, {away[0]} first, are on the meta device or offloaded"
            f"{f' ({mapped})' if mapped else ''}; {WHOLE}"
        )
    fetched = [path for path, module in model.named_modules() if offloaded(module)]
    if fetched or _mapped(model):
        where = _mapped(model) or f"{fetched[0] or 'the model'} fetches its weights for each forward pass"
        raise HostError(f"weights are offloaded: {where}; {WHOLE}")


def _mapped(model: nn.Module) -> str:
    """Word what a device map keeps away from the device that computes; empty where nothing."""
    device_map: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    devices = {str(device) for device in device_map.values()}
    idle = {"disk"} | ({"cpu"} if devices - {"cpu", "disk"} else set())
    rests = [
        f"{path or 'the model'} on {device}" for path, device in device_map.items() if str(device) in idle
    ]
    return f"hf_device_map keeps {rests[0]}" if rests else ""


def obstacle(model: nn.Module, name: str, *, beside: bool = False) -> str | None:
    """Say why a weight cannot be written, or not edited ``beside``, and what to do; None where it can.

    ``name``: dotted path of the parameter. Raises AttributeError for a module that is not there.
    """
    path, _, leaf = name.rpartition(".")
    chain = _chain(model, path)
    weight = chain[-1]._parameters.get(leaf)
    tensors = list(_own(chain[-1])) if weight is None else [weight]
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in chain):
        return f"it is wrapped for sharding (FSDP); {GATHER}"
    if any(sharded(tensor) for tensor in tensors):
        return f"it is sharded over processes; {GATHER}"
    if beside:
        return None
    if any(tensor.is_meta for tensor in tensors) or any(offloaded(module) for module in chain):
        return f"it is offloaded or on the meta device, where a write is lost; use merge=False, or {WHOLE}"
    codes = [tensor for tensor in tensors if packed(tensor)]
    if codes:
        kind = f"{type(codes[0]).__name__}, {str(codes[0].dtype).removeprefix('torch.')}"
        return f"it is packed ({kind}), so nothing can be added; use merge=False"
    if weight is not None and weight.is_inference():
        return "it was made in inference mode and cannot be written; use merge=False, or load it outside"
    return None


def _chain(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules from the model down to a path."""
    chain = [model]
    for part in path.split(".") if path else ():
        chain.append(chain[-1].get_submodule(part))
    return chain


def sharing(model: nn.Module, names: Sequence[str]) -> tuple[str, str] | None:
    """Find a weight among ``names`` whose memory another name of the model reaches too: both names."""
    reach = {n: _memory(p) for n, p in model.named_parameters(remove_duplicate=False)}
    for name in names:
        mine = reach.get(name) or _memory(model.get_parameter(name))
        for other, theirs in reach.items():
            if other != name and mine and theirs and _overlap(mine, theirs):
                return name, other
    return None


def _memory(tensor: Tensor) -> tuple[torch.device, int, int] | None:
    """Device, first and past-last address of a plain tensor in memory."""
    if tensor.is_meta or not tensor.numel() or hasattr(tensor, "__tensor_flatten__"):
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.device, start, start + (last + 1) * tensor.element_size()


def _overlap(one: tuple[torch.device, int, int], two: tuple[torch.device, int, int]) -> bool:
    return one[0] == two[0] and one[1] < two[2] and two[1] < one[2]


# --- adapters ---------------------------------------------------------------------------------


def identities(model: nn.Module) -> tuple[int, ...]:
    """Name the modules that a model consists of at present."""
    # looked at before every pass: model.modules() would spend most of its time on their paths
    found, waiting = dict[int, None](), [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = None
            waiting.extend(child for child in module._modules.values() if child is not None)
    return tuple(found)


def adapters(model: nn.Module) -> str:
    """Word which PEFT adapters act in a model and how: active, merged or off; empty where there are none."""
    states: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            off = bool(getattr(module, "disable_adapters", False))
            active, merged = (
                list(getattr(module, key, ()) or ()) for key in ("active_adapters", "merged_adapters")
            )
            states[path] = f"{'off' if off else active} {merged}"
    return repr(sorted(states.items())) if states else ""
