"""Exports against the edit in place, in programs that do not know errata; and exports that are killed or tampered with.

What :mod:`benchmarks.reliability` counts of them: (fault, how often it was tried, what is counted, the count).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import errata
from errata.edits import Edit, WeightEdit
from errata.edits.export._folder import RECORD, check_folder
from errata.errors import ErrataError
from errata.host.build import new_model, new_tokenizer
from errata.host.engines import GGUF, gguf_rows
from errata.host.host import Host
from errata.linalg.lowrank import LowRank
from errata.types import Request

Count = tuple[str, int, str, int]
CLOSE = 1e-5
"""Largest difference of logits in float32, as a share of the largest one."""
TEXTS = ["Ada Brenner was born in Tallow.", "Bruno Holner plays the cello (or the harp) in Merrin."] * 10
REQUESTS = [
    Request("{} was born in", "Ada Brenner", "Merrin"), Request("{} plays the", "Bruno Holner", "harp"),
    Request("The town of {} is", "Bruno Holner", "Tallow"), Request("{} plays the", "Ada Brenner", "cello"),
]  # fmt: skip
PROMPTS = [one.text for one in REQUESTS] + ["The rain fell on the"]
COMMON = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ROTARY = {
    **COMMON, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 80},
    "gpt_neox": {name: value for name, value in ROTARY.items() if name != "num_key_value_heads"},
    "opt": {
        **COMMON, "hidden_size": 32, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32,
    },
    "llama": ROTARY, "mistral": ROTARY, "qwen2": ROTARY, "qwen3": {**ROTARY, "head_dim": 8},
    "gemma2": {**ROTARY, "head_dim": 8, "sliding_window": 64}, "phi3": ROTARY,
}  # fmt: skip
PLAIN = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for case in sorted(Path(sys.argv[1]).glob("case*")):
    expected = load_file(case / "expected.safetensors")
    source = case / "checkpoint" if (case / "checkpoint").exists() else case.parent / (case / "base").read_text()
    model = AutoModelForCausalLM.from_pretrained(source)
    if (case / "peft").exists():
        model = PeftModel.from_pretrained(model, case / "peft")
    worst = 0.0
    with torch.no_grad():
        for name in {one.partition(" ")[0] for one in expected}:
            right = expected[f"{name} logits"]
            found = model.eval()(input_ids=expected[f"{name} ids"]).logits
            worst = max(worst, float((found - right).abs().max()) / max(1.0, float(right.abs().max())))
    print(json.dumps([case.name, worst, "errata" in sys.modules]))
"""
"""Run in a process of its own: opens what was exported with transformers and peft alone."""


@dataclass(frozen=True)
class Case:
    """A method, an architecture and a rank."""

    family: str
    seed: int
    method: str
    """Of errata; ``random``: factors at all linear maps of the blocks."""
    rank: int = 0
    to: str = "peft"
    sequence: int = 1
    """How many edits are made one after the other."""


def cases() -> list[Case]:
    """Return all combinations, architectures in turn."""
    kinds: list[tuple[str, int, str, int]] = [
        ("rome", 0, "peft", 1), ("memit", 1, "peft", 1), ("memit", 4, "peft", 1), ("alphaedit", 1, "peft", 3),
        ("lora", 1, "peft", 1), ("lora", 4, "peft", 1), ("ft", 32, "peft", 1), ("random", 1, "peft", 1),
        ("random", 5, "peft", 1), ("random", 20, "peft", 1), ("memit", 4, "checkpoint", 1), ("ft", 0, "checkpoint", 1),
    ]  # fmt: skip
    return [
        Case(family, seed, method, rank, to, sequence)
        for seed, (method, rank, to, sequence), family in itertools.product(range(2), kinds, FAMILIES)
    ]


def parity(share: float) -> list[Count]:
    """Export edits of several methods, architectures and ranks, and compare what other programs make of the files."""
    every = cases()
    step = max(1, round(1 / share) // 4)
    chosen = every[::step] if share < 1 else every
    wrong_scales = gguf_wrong = gguf_tried = 0
    hosts: dict[tuple[str, int], Host] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number, case in enumerate(chosen):
            key = case.family, case.seed
            if key not in hosts:
                hosts[key] = _host(*key)
                hosts[key].model.save_pretrained(root / f"base {case.family} {case.seed}")
            host, folder = hosts[key], root / f"case{number:04}"
            edit = _edit(case, host)
            folder.mkdir()
            (folder / "base").write_text(f"base {case.family} {case.seed}")
            rank = case.rank if case.method == "ft" and case.to == "peft" else None
            errata.export(edit, folder / case.to, to=case.to, host=host, rank=rank, verify=False)
            _expected(edit, host, folder / "expected.safetensors", merge=case.to != "peft")
            if case.to == "peft":
                wrong_scales += _wrong_scale(folder / "peft")
                if case.family in GGUF:
                    gguf_tried += 1
                    errata.export(edit, folder / "gguf", to="gguf", host=host, rank=rank, verify=False)
                    gguf_wrong += _gguf_error(folder / "gguf" / "adapter.gguf", edit, host) > 1e-6
        done = subprocess.run(
            [sys.executable, "-c", PLAIN, str(root)], capture_output=True, text=True, check=True
        )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    off = {name for name, worst, knows in lines if not worst <= CLOSE or knows}
    off |= {f"case{i:04}" for i in range(len(chosen))} - {name for name, _, _ in lines}
    adapters = [i for i, case in enumerate(chosen) if case.to == "peft"]
    count = len(adapters)
    return [
        ("adapters in peft, method x architecture x rank", count, "logits off by more than 1e-5",
         sum(f"case{i:04}" in off for i in adapters)),
        ("the same", count, "not of one rank with alpha equal to it", wrong_scales),
        ("merged folders in transformers", len(chosen) - count, "logits off by more than 1e-5",
         len(off) - sum(f"case{i:04}" in off for i in adapters)),
        ("adapters as GGUF", gguf_tried, "change off by more than 1e-6", gguf_wrong),
    ]  # fmt: skip


def _host(family: str, seed: int) -> Host:
    model = new_model(family, FAMILIES[family], seed=seed).float()
    return Host(model, new_tokenizer(TEXTS, 400), name=f"tiny {family}")


def _edit(case: Case, host: Host) -> Edit:
    """Fit an edit; its strength is that of its method's, so of a random model nothing is learned."""
    if case.method == "random":
        return _random_edit(host, case.rank)
    layers = (1,) if case.family == "gemma2" else (0, 1)  # one, where what feed-forwards write is normalised
    options = {
        "lora": {"rank": case.rank, "steps": 10, "scale": "published"}, "ft": {"steps": 4},
        "memit": {"tokens": 400, "steps": 6, "layers": layers},
        "alphaedit": {"tokens": 400, "steps": 6, "layers": layers}, "rome": {"tokens": 400, "steps": 6},
    }[case.method]  # fmt: skip
    count = case.rank if case.method == "memit" else 1
    edit = errata.edit(host, REQUESTS[:count], method=case.method, **options)
    for turn in range(1, case.sequence):
        edit = errata.edit(host, REQUESTS[turn], method=case.method, after=edit, **options)
    return edit


def _random_edit(host: Host, rank: int) -> WeightEdit:
    draw = torch.Generator().manual_seed(rank)
    deltas, transposed = {}, set()
    for site in host.layout.sites:
        b, a = torch.randn(site.d_out, rank, generator=draw), torch.randn(rank, site.d_in, generator=draw)
        deltas[site.parameter] = LowRank(0.1 * b, 0.1 * a)
        if site.transposed:
            transposed.add(site.parameter)
    record = errata.edit(host, REQUESTS[0], method="in_prompt").provenance
    return WeightEdit(deltas, frozenset(transposed), replace(record, method="random"))


@torch.no_grad()
def _expected(edit: Edit, host: Host, path: Path, *, merge: bool) -> None:
    """Keep the ids and the logits of some prompts with the edit in place."""
    held: dict[str, torch.Tensor] = {}
    with edit.on(host, merge=merge):
        for i, prompt in enumerate(PROMPTS):
            ids = host.encode_prompt(prompt)
            held[f"{i} ids"] = torch.tensor([ids])
            held[f"{i} logits"] = host.forward(host.batch([ids])).float().contiguous()
    save_file(held, path)


def _wrong_scale(folder: Path) -> bool:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = {len(value) if "lora_A" in name else value.shape[1] for name, value in tensors.items()}
    patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    return bool(patterns) or ranks != {config["r"]} or config["lora_alpha"] != config["r"]


def _gguf_error(path: Path, edit: Any, host: Host) -> float:
    """Return the largest difference of a change as llama.cpp adds it from the edit's, over its largest number."""
    import gguf

    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {one.name: torch.tensor(one.data.copy()) for one in reader.tensors}
    table = gguf.get_tensor_name_map(
        {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[GGUF[host.family]],
        len(host.layout.blocks),
    )
    worst = 0.0
    for name, delta in edit.deltas.items():
        right = delta.dense() if isinstance(delta, LowRank) else delta
        module = name.removesuffix(".weight")
        key = table.get_name(name, try_suffixes=(".weight",))
        a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
        found = alpha / b.shape[1] * (b @ a)
        order = gguf_rows(host, module, len(right))
        expected = right if order is None else right[order]
        worst = max(worst, float((found - expected).abs().max()) / float(right.abs().max()))
    return worst


# --- kills, tampering, other models -----------------------------------------------------------


def export_kills(share: float) -> list[Count]:
    """Kill processes that replace an export again and again; what is there must always be one whole export."""
    rounds, draw = max(8, round(500 * share)), random.Random(0)
    edits = [errata.edit(_host("llama", 0), one, method="in_prompt") for one in REQUESTS[:2]]
    broken = strays = 0
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        for _ in range(rounds):
            child = os.fork()
            if child == 0:
                for edit in itertools.cycle(edits):
                    errata.export(edit, out, to="prompts", force=True)
            time.sleep(0.02 + draw.random() * 0.05)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            check_folder(out, force=True)
            broken += out.exists() and not _whole(out)
            strays += len([path for path in Path(place).iterdir() if path != out])
    return [
        ("kill -9 of a process that exports", rounds, "no whole export in the folder", broken),
        ("the same", rounds, "staged folders after the next look", strays),
    ]


def _whole(folder: Path) -> bool:
    try:
        names = json.loads((folder / RECORD).read_text())["files"]
        present = {path.name for path in folder.iterdir()}
        right = all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == one for name, one in names.items()
        )
    except (OSError, ValueError, KeyError):
        return False
    return right and present == {*names, RECORD}


def tampered(share: float) -> list[Count]:
    """Change settings and bytes of an exported adapter, and offer it to models that differ in one number."""
    host = _host("llama", 0)
    edit = _random_edit(host, 2)
    count, pairs, draw = max(40, round(500 * share)), max(20, round(200 * share)), random.Random(1)
    accepted = others = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        errata.export(edit, folder, to="peft", host=host)
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        changes = _changes(whole, draw)
        for _ in range(count):
            name, content = next(changes)
            (folder / name).write_bytes(content)
            accepted += _imported(folder, host)
            (folder / name).write_bytes(whole[name])
        for _ in range(pairs):
            other = _host("llama", 0)
            weight = other.model.get_parameter(draw.choice(sorted(edit.deltas)))
            with torch.no_grad():
                weight.view(-1)[draw.randrange(weight.numel())] += 0.125
            others += _imported(folder, other)
    return [
        ("tampered adapters", count, "imported", accepted),
        ("adapters of a model that differs in one number", pairs, "imported", others),
    ]


def _changes(whole: dict[str, bytes], draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield files of an adapter with a setting changed, a bit flipped, or an end cut off."""
    config = json.loads(whole["adapter_config.json"])
    values = (0, 1, 16, -1, 0.5, "x", None, [], {}, True, ["q_proj"], {"q_proj": 9})
    while True:
        name = draw.choice(sorted(config))
        value = draw.choice(values)
        if config[name] != value:
            yield "adapter_config.json", json.dumps({**config, name: value}).encode()
        data = whole["adapter_model.safetensors"]
        at = draw.randrange(len(data))
        yield (
            "adapter_model.safetensors",
            data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
        )
        yield "adapter_model.safetensors", data[:at]


def _imported(folder: Path, host: Host) -> bool:
    try:
        errata.import_edit(folder, host)
    except ErrataError:
        return False
    return True
