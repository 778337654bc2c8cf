"""A LoRA adapter as GGUF, for llama.cpp and what is built on it.

Names are those of the ``gguf`` package's own tables. llama.cpp scales by ``alpha`` over the rank of each tensor, so all
have one rank. Of some architectures it keeps the outputs of queries and keys in another order, and so does the adapter.
What was written is read back with gguf's reader and compared with the edit.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from errata import extras
from errata.edits.edit import Edit
from errata.edits.export import _verify as verifying
from errata.edits.export import _weights as weights
from errata.edits.export._adapter import Adapter, adapter
from errata.edits.export._exporter import Exporter, Options, Plan
from errata.errors import EditError, HostError
from errata.host.base import ModelHost
from errata.host.engines import gguf_architecture, gguf_rows
from errata.linalg.lowrank import LowRank

FILE = "adapter.gguf"
INSTEAD = "export it to a checkpoint and convert that (llama.cpp: convert_hf_to_gguf.py)"


def plan(edit: Edit, host: ModelHost, options: Options) -> Plan:
    """Make the adapter's tensors under their names in GGUF."""
    (gguf,) = extras.need("an export to gguf", "gguf", "gguf")
    weights.refuse_pipeline(host, "an adapter for llama.cpp")
    try:
        architecture = gguf_architecture(host)
    except HostError as error:
        raise EditError(f"{error}; {INSTEAD}") from error
    made = adapter(edit, host, options.rank)
    names = _names(gguf, architecture, made, host)
    facts = {
        **made.facts(host), "architecture": architecture,
        "use": f"llama-server -m MODEL.gguf --lora {FILE}, with MODEL.gguf converted from {host.name}",
    }  # fmt: skip
    return Plan(
        facts, lambda folder: _write(gguf, folder / FILE, architecture, names, made, host),
        lambda folder: _verify(gguf, folder / FILE, architecture, names, made, host),
    )  # fmt: skip


def _names(gguf: ModuleType, architecture: str, made: Adapter, host: ModelHost) -> dict[str, str]:
    """Return the names of modules' weights in GGUF. Raises EditError for one that has none in a block."""
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], len(host.layout.blocks))
    names: dict[str, str] = {}
    for module in made.factors:
        name = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None or not name.startswith("blk."):
            raise EditError(
                f"the edit changes {module}.weight, and no weight of a block in GGUF is known to be that; {INSTEAD}"
            )
        names[module] = name
    return names


def _write(
    gguf: ModuleType, path: Path, architecture: str, names: dict[str, str], made: Adapter, host: ModelHost
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(made.rank))
    writer.add_name(f"errata edit {made.edit.digest}")
    for module, factors in made.factors.items():
        order = gguf_rows(host, module, factors.shape[0])
        left = factors.B if order is None else factors.B[order]
        writer.add_tensor(f"{names[module]}.lora_a", factors.A.numpy())
        writer.add_tensor(f"{names[module]}.lora_b", left.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _verify(
    gguf: ModuleType, path: Path, architecture: str, names: dict[str, str], made: Adapter, host: ModelHost
) -> dict[str, Any]:
    """Read the file, scale as llama.cpp does and compare with the edit. Raises EditError where it differs."""
    reader = gguf.GGUFReader(path)
    expected = {
        "general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora",
        "adapter.lora.alpha": float(made.rank),
    }  # fmt: skip
    found = {name: field.contents() for name, field in reader.fields.items() if name in expected}
    if found != expected:
        raise verifying.refuse_unlike(f"the description in {path.name}")
    tensors = {one.name: torch.tensor(one.data.copy()) for one in reader.tensors}
    read: dict[str, LowRank] = {}
    for module, name in names.items():
        a, b = (tensors.pop(f"{name}.lora_{part}", None) for part in "ab")
        if a is None or b is None:
            raise verifying.refuse_unlike(f"{name} in {path.name}")
        read[module] = LowRank(_in_order(b, host, module) * (found["adapter.lora.alpha"] / len(a)), a)
    if tensors:
        raise verifying.refuse_unlike(f"{min(tensors)} in {path.name}")
    return {
        "compared": "changes, read back with gguf's reader",
        "change": made.compare(read),
        "weights": len(read),
    }


def _in_order(left: Tensor, host: ModelHost, module: str) -> Tensor:
    """Return a left factor ``[d_out, r]`` with the outputs in transformers' order."""
    order = gguf_rows(host, module, len(left))
    return left if order is None else left[order.argsort()]


EXPORTER = Exporter(
    name="gguf",
    title="a LoRA adapter for llama.cpp (needs the extra gguf)",
    takes=("what peft takes, of Llama, Mistral, Qwen2 and Qwen3",),
    plan=plan,
    options=frozenset({"rank", "foreign"}),
)
