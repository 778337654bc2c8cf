"""A PEFT adapter: the changes of linear maps as LoRA factors beside them, with scaling 1.

Written without peft; ``peft.PeftModel.from_pretrained(model, folder)`` opens it. What was written is read back and
compared with the edit; where peft is installed, it also runs the adapter on a copy of the model that shares the
model's weights.
"""

from __future__ import annotations

from errata.edits.edit import Edit
from errata.edits.export._adapter import adapter
from errata.edits.export._exporter import Exporter, Options, Plan
from errata.host.base import ModelHost


def plan(edit: Edit, host: ModelHost, options: Options) -> Plan:
    """Make an adapter's tensors and its configuration."""
    made = adapter(edit, host, options.rank)
    return Plan(
        made.facts(host), lambda folder: made.write(folder, host), lambda folder: made.verify(folder, host)
    )


EXPORTER = Exporter(
    name="peft",
    title="a LoRA adapter that peft opens",
    takes=(
        "weight edits whose changes of linear maps are low-rank; others with a rank, approximated",
        "memories that add low-rank matrices to linear maps on all prompts",
    ),
    plan=plan,
    options=frozenset({"rank", "foreign"}),
    card=True,
)
