"""What reads exports: transformers, peft, and a client that knows the exported JSON alone; edits to export."""

from __future__ import annotations

import copy
import json
import re
import sqlite3
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.always import Always
from errata.errors import ErrataError
from errata.host.host import Host

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp")


def open_checkpoint(folder: Path, host: Host, **options: Any) -> Host:
    """Open a folder with transformers alone; the host only runs what was opened."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    text = "Ada Brenner was born in Tallow. Éric said: «oui»."
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == host.tokenizer(text)["input_ids"]
    return Host(model, host.tokenizer, name=f"{host.name} exported")


def open_adapter(folder: Path, host: Host) -> Host:
    """Open an adapter with peft on a copy of the host's model."""
    import peft

    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(host.model), folder)
    return Host(adapted.get_base_model(), host.tokenizer, name=f"{host.name} adapted")


def open_vllm(folder: Path, host: Host) -> Host:
    """Open the adapter that an export for vLLM names, with peft, after what vLLM itself demands of it."""
    script = (folder / "serve.sh").read_text()
    name, path = re.search(r'--lora-modules (\S+)="\$here/(\S+)"', script).groups()
    config = json.loads((folder / path / "adapter_config.json").read_text())
    assert name == path and config["r"] <= int(re.search(r"--max-lora-rank (\d+)", script)[1])
    assert not any(config.get(key) for key in ("use_dora", "lora_bias", "modules_to_save", "rank_pattern"))
    allowed = re.search(r"--lora-target-modules (.*?) \\", script)[1].split()
    assert {module.rpartition(".")[2] for module in config["target_modules"]} == set(allowed)
    return open_adapter(folder / path, host)


def open_delta(folder: Path, host: Host) -> Host:
    """Do what the README of an export of differences says, by running its code."""
    model = copy.deepcopy(host.model)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = re.sub(r"(?m)^model = .*$", "", code).replace(
        '"delta.safetensors"', f"{str(folder / 'delta.safetensors')!r}"
    )
    exec(code, {"model": model})
    return Host(model, host.tokenizer, name=f"{host.name} changed")


def open_gguf(folder: Path, host: Host) -> Host:
    """Add what llama.cpp adds, ``alpha / rank * B @ A``, to a copy of the model, outputs put back in their order."""
    import gguf

    reader = gguf.GGUFReader(folder / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {one.name: torch.tensor(one.data.copy()) for one in reader.tensors}
    model = copy.deepcopy(host.model)
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for name in {one.rpartition(".")[0] for one in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        _, layer, part, _ = name.split(".")
        weight = model.get_submodule(f"model.layers.{layer}.{parts[part]}").weight
        change = alpha / b.shape[1] * (b @ a)
        if part in ("attn_q", "attn_k") and host.family in ("llama", "mistral"):
            config = host.config
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            size = len(change) // heads
            change = change.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(len(change), -1)
        with torch.no_grad():
            weight += change
    return Host(model, host.tokenizer, name=f"{host.name} with GGUF")


OPENERS = {
    "checkpoint": open_checkpoint, "peft": open_adapter, "vllm": open_vllm, "delta": open_delta, "gguf": open_gguf,
}  # fmt: skip
"""What opens each export that changes a model."""


class Client:
    """Does what an export's ``prompts.json`` says, with the standard library."""

    def __init__(self, folder: Path, generate: Callable[[str, int], str] | None = None) -> None:
        self.document = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        lines = (folder / "entries.jsonl").read_text(encoding="utf-8").splitlines()
        self.entries = [json.loads(line) for line in lines]
        self.generate = generate
        assert [entry["entry"] for entry in self.entries] == list(range(self.document["entries"]["count"]))

    def rewrite(self, prompt: str) -> str:
        steps = self.document["procedure"]
        if not self.entries:
            return prompt
        if steps["name"] == "decompose":
            return self._decompose(prompt, steps, steps["templates"])
        chosen = self._in_scope(prompt)[: steps["count"]][::-1]
        if not chosen:
            return prompt
        texts = "".join(entry["context"] for entry in chosen)
        if steps["name"] == "put":
            return f"{texts}{prompt}{chosen[-1].get('suffix', '')}"
        if steps["name"] == "fill":
            asked = steps["templates"]["prompt"].replace("{texts}", texts).replace("{prompt}", prompt)
            return asked if texts else prompt
        asked = steps["templates"]["select"].replace("{texts}", texts).replace("{prompt}", prompt)
        lines = self.generate(asked, steps["tokens"]).strip().splitlines()
        sentence = lines[0].strip() if lines else ""
        if not sentence or sentence.casefold().startswith("none"):
            return prompt
        return steps["templates"]["answer"].replace("{text}", sentence).replace("{prompt}", prompt)

    def _decompose(self, prompt: str, steps: dict[str, Any], templates: dict[str, str]) -> str:
        text = templates["examples"] + templates["question"].replace("{prompt}", prompt)
        for _ in range(steps["hops"]):
            new = self.generate(text, steps["tokens"]).split(templates["fact"])[0]
            text += new.split(templates["answer"])[0]
            asked = [line for line in new.split("\n") if line.startswith(templates["subquestion"])]
            if templates["answer"] in new or not asked:
                break
            found = self._in_scope(asked[-1].removeprefix(templates["subquestion"]).strip())
            if not found:
                break
            text = f"{text.rstrip()}\n{templates['fact']} {found[0]['context'].strip()}\n"
        return f"{text.rstrip()}\n{templates['answer']}"

    def _in_scope(self, prompt: str) -> list[dict[str, Any]]:
        router = self.document["router"]
        text = _folded(prompt)
        if router["name"] == "always":
            return self.entries[:1]
        if router["name"] == "lexical":
            named = [
                entry
                for entry in self.entries
                if re.search(rf"(?<!\w){re.escape(_folded(entry['phrase']))}(?!\w)", text)
            ]
            return sorted(named, key=lambda entry: (-len(_folded(entry["phrase"])), -entry["entry"]))
        assert router["name"] == "fulltext", router
        table = sqlite3.connect(":memory:")
        table.execute("create virtual table t using fts5(text)")
        for entry in self.entries:
            table.execute(
                "insert into t(rowid, text) values (?, ?)", (entry["entry"] + 1, _folded(entry["passage"]))
            )
        words = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", text)))
        rows = table.execute("select rowid, -bm25(t) from t where t match ?", (words,)) if words else ()
        scores = sorted(((score, number - 1) for number, score in rows), reverse=True)
        return [self.entries[number] for score, number in scores if score > router["threshold"]]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def refused(edit: errata.Edit, folder: Path, match: str, **options: object) -> str:
    """Nothing is written, and the host is as it was."""
    host = options.get("host")
    before = host.weights_hash() if isinstance(host, Host) else None
    with pytest.raises(ErrataError, match=match) as caught:
        errata.export(edit, folder, **options)
    assert not folder.exists() and not list(folder.parent.glob(f"{folder.name}*"))
    assert before is None or host.weights_hash() == before
    return str(caught.value)


def neurons(host: Host, layers: dict[int, int], activation: str, *, seed: int = 0) -> MemoryEdit:
    """Random neurons beside feed-forwards, so many by layer."""
    generator = torch.Generator().manual_seed(seed)
    width = host.layout.width
    interventions = tuple(
        Intervention(
            host.layout.feed_forward(layer), "slots",
            {
                "keys": torch.randn(1, count, width, generator=generator),
                "biases": torch.randn(1, count, generator=generator),
                "values": torch.randn(1, count, width, generator=generator),
            },
            "all", activation,
        )
        for layer, count in layers.items()
    )  # fmt: skip
    record = errata.edit(host, ADA, method="in_prompt").provenance
    return MemoryEdit(interventions, Always(), record)
