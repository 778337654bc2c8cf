"""A writer of a ledger to be killed: started by reliability.py as a program of its own, which loads no torch.

python benchmarks/ledger_writer.py LEDGER NUMBER
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from errata.ledger.store import Ledger


def request_facts(digest: str, subject: str = "Ada", target: str = "Rome") -> dict[str, object]:
    """Return what is proposed of an edit without a file."""
    request = {"prompt": "{} lives in", "subject": subject, "target": target}
    return {
        "method": "m",
        "kind": "weight",
        "requests": [request],
        "blob": "0" * 64,
        "beneath": [],
        "of": digest,
    }


def write(folder: Path, name: str) -> None:
    """Keep files, apply and revert until killed; print what was acknowledged."""
    ledger, number = Ledger(folder), 0
    scratch = Path(tempfile.mkdtemp())
    while True:
        number += 1
        digest = f"{int(name):04x}{number:012x}"
        source = scratch / "file"
        source.write_bytes(os.urandom(200_000))
        blob = ledger.add_file(source)
        body = {**request_facts(digest), "blob": blob}
        ledger.append("proposed", edit=digest, body=body)
        ledger.append("applied", edit=digest)
        print(f"applied {digest} {blob}", flush=True)
        if number % 3 == 0:
            ledger.append("reverted", edit=digest)
            print(f"reverted {digest} {blob}", flush=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
