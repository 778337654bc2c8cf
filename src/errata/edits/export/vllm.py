"""A PEFT adapter for vLLM, in a folder named by its content, and the command that serves a model with it.

vLLM remembers what it computed with an adapter by the adapter's name and path, so that another adapter at the same path
would be answered for with the old one's results: the path has the hash of the files in it.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any

from errata.edits.edit import Edit
from errata.edits.export import _verify as verifying
from errata.edits.export import _weights as weights
from errata.edits.export._adapter import Adapter, adapter
from errata.edits.export._exporter import Exporter, Options, Plan
from errata.errors import EditError
from errata.host.base import ModelHost
from errata.host.engines import VLLM_RANKS, without_lora_in_vllm

SCRIPT = "serve.sh"
DIGITS = 16
"""Hex digits of the content's hash in the folder's name."""
TEXT = """#!/bin/sh
# Serves {base} with vLLM; requests name the edited model as "model": "{name}", the unedited one as the base model.
# More options may follow the script's name. Another copy of the base model: BASE=... sh {script}
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
exec vllm serve "${{BASE:-{quoted}}}" --enable-lora --max-lora-rank {rank} --lora-target-modules {modules} \\
  --lora-modules {name}="$here/{folder}" "$@"
"""


def plan(edit: Edit, host: ModelHost, options: Options) -> Plan:
    """Make the adapter's files and the script."""
    weights.refuse_pipeline(host, "an adapter for vLLM")
    reason = without_lora_in_vllm(host)
    if reason is not None:
        raise EditError(
            f"{reason}; export the edit to a checkpoint (--to checkpoint), which vLLM serves as a model"
        )
    made = adapter(edit, host, options.rank)
    largest = next((rank for rank in VLLM_RANKS if rank >= made.rank), None)
    if largest is None:
        raise EditError(
            f"the adapter has rank {made.rank}, and vLLM serves ranks up to {VLLM_RANKS[-1]}; approximate it with "
            f"--rank {VLLM_RANKS[-1]}, with the error reported, or export the edit to a checkpoint"
        )
    folder = f"edit-{_hash(made.files(host))}"
    modules = sorted({module.rpartition(".")[2] for module in made.factors})
    text = TEXT.format(
        base=" ".join(host.name.split()), name=folder, script=SCRIPT, quoted=_inside_quotes(host.name),
        rank=largest, modules=shlex.join(modules), folder=folder,
    )  # fmt: skip

    def write(target: Path) -> None:
        (target / folder).mkdir()
        made.write(target / folder, host)
        (target / SCRIPT).write_text(text, encoding="utf-8", newline="\n")

    facts = {
        **made.facts(host), "adapter": folder, "max_lora_rank": largest, "lora_target_modules": modules,
        "serve": f"sh {SCRIPT}",
    }  # fmt: skip
    return Plan(facts, write, lambda target: _verify(target, made, host, folder, text))


def _verify(target: Path, made: Adapter, host: ModelHost, folder: str, text: str) -> dict[str, Any]:
    """Compare the adapter with the edit, its folder's name with its content, and the script with the adapter."""
    found = {path.name: path.read_bytes() for path in sorted((target / folder).iterdir())}
    if folder != f"edit-{_hash(found)}":
        raise verifying.refuse_unlike(f"the folder {folder}")
    if (target / SCRIPT).read_text(encoding="utf-8") != text:
        raise verifying.refuse_unlike(SCRIPT)
    return made.verify(target / folder, host)


def _hash(contents: dict[str, bytes]) -> str:
    """Return the beginning of the hash of some files, names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name} {len(contents[name])}\n".encode() + contents[name])
    return digest.hexdigest()[:DIGITS]


def _inside_quotes(text: str) -> str:
    """Return a text as it stands inside double quotes of a shell, in the default value of a variable."""
    return "".join(f"\\{char}" if char in '\\"$`}' else char for char in text)


EXPORTER = Exporter(
    name="vllm",
    title="a LoRA adapter and the command that serves it with vLLM",
    takes=(
        "what peft takes, up to rank 512, of causal models whose architecture has adapters in vLLM (not GPT-2, GPT-J, "
        "Bloom, Falcon, StableLM)",
    ),
    plan=plan,
    options=frozenset({"rank", "foreign"}),
)
