"""Break what can break and count what was lost: kills, full disks, damaged files, wrong models, hostile names, texts.

    python benchmarks/reliability.py --quick     a small share of each, in a few minutes
    python benchmarks/reliability.py             500 kills, 10,000 damaged files, 1,000 sequences

Each line gives a fault, how often it was brought about, what is counted, the count, and the bound that it has to keep.
Exit code 1 if one does not. Kills and full disks need a POSIX system.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

import errata
from errata.edits import Edit, Provenance, WeightEdit
from errata.errors import ErrataError
from errata.host.host import Host
from errata.ledger import blobs, folders, reverting
from errata.ledger.contents import facts_of, keep, load_edit
from errata.ledger.guard import Measurement, judge
from errata.ledger.recording import Order, record
from errata.ledger.settings import Bounds, LedgerSettings
from errata.ledger.state import check_tag
from errata.ledger.state import revision as revision_of
from errata.ledger.store import DATABASE, Ledger
from errata.ledger.working import Working, describe
from errata.linalg.lowrank import LowRank
from errata.types import Request

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, it is found beside the others
from benchmarks import exports, ledger_writer
from benchmarks.ledger_writer import request_facts

MODEL = {"name": "none", "fingerprint": "f" * 16, "weights": "0" * 64, "dtype": "float32"}
"""What a ledger that never opens its model says of it."""


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    fault: str
    tried: int
    counted: str
    count: int
    bound: int = 0
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether the count keeps its bound."""
        return self.count <= self.bound


def main() -> int:
    """Measure everything and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small share of each, in a few minutes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--only", nargs="+", choices=[one.__name__ for one in FAULTS], help="these alone", metavar="FAULT"
    )
    options = parser.parse_args()
    share = 0.04 if options.quick else 1.0
    host = errata.load("lab")
    figures: list[Figure] = []
    for measure in FAULTS:
        if options.only and measure.__name__ not in options.only:
            continue
        begin = time.perf_counter()
        figures += measure(host, share)
        print(f"{measure.__name__}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    if options.json:
        print(json.dumps([{**vars(one), "kept": one.kept} for one in figures], indent=2))
    else:
        print(f"{'fault':42} {'tried':>7}  {'counted':44} {'count':>6} {'bound':>6}")
        for one in figures:
            mark = "" if one.kept else "  EXCEEDED"
            print(
                f"{one.fault:42} {one.tried:7,}  {one.counted:44} {one.count:6,} {one.bound:6,}{mark}  {one.note}"
            )
    return 0 if all(one.kept for one in figures) else 1


# --- making edits and ledgers ---------------------------------------------------------------


def some_edit(host: Host, number: int) -> WeightEdit:
    """Return a small random edit of two weights, another one for each number."""
    draw = torch.Generator().manual_seed(number)
    deltas = {}
    for site in host.layout.sites[1:3]:
        out, into = site.d_out, site.d_in
        factors = torch.randn(out, 1, generator=draw), torch.randn(1, into, generator=draw)
        deltas[site.parameter] = LowRank(0.01 * factors[0], 0.01 * factors[1])
    request = Request(f"{{}} number {number} is", "Ada Brenner", f"target {number}")
    provenance = Provenance(
        "benchmark", (request,), {}, host.fingerprint, host.name, versions={"errata": "0"}
    )
    return WeightEdit(deltas, frozenset(), provenance)


def add(ledger: Ledger, edit: Edit) -> None:
    """Keep an edit and apply it."""
    ledger.append(
        "proposed", edit=edit.digest, body=facts_of(edit, keep(ledger, edit), ledger.state().active)
    )
    ledger.append("applied", edit=edit.digest)


# --- 1, 12: kills and writers ---------------------------------------------------------------


def kills(host: Host, share: float) -> list[Figure]:
    """Kill two writers at a time at random moments; what was acknowledged must be there."""
    rounds, draw = max(10, round(250 * share)), random.Random(0)
    lost = unreadable = damaged_files = acknowledged = 0
    with tempfile.TemporaryDirectory() as place:
        ledger = folders.create(place, LedgerSettings(), MODEL)
        expected: dict[str, str] = {}
        for turn in range(rounds):
            both = [
                subprocess.Popen(
                    [sys.executable, ledger_writer.__file__, str(ledger.folder), str(2 * turn + i)],
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                ) for i in range(2)
            ]  # fmt: skip
            for one in both:
                assert one.stdout is not None
                _note(expected, one.stdout.readline())
            time.sleep(draw.random() * 0.2)
            for one in both:
                one.send_signal(signal.SIGKILL)
                one.wait()
            for one in both:
                assert one.stdout is not None
                for line in one.stdout:
                    _note(expected, line)
            try:
                again = folders.find(place)
                active = set(again.state().active)
            except ErrataError:
                unreadable += 1
                continue
            acknowledged = len(expected)
            # one that was applied may have been reverted since, without its acknowledgement having been read
            state = again.state()
            for digest, line in expected.items():
                word, blob = line.split()
                there = digest in state.edits and (
                    digest in active or word == "reverted" or _reverted(again, digest)
                )
                lost += not there
                with suppress(ErrataError):
                    blobs.check(again.edits_folder, blob)
                    continue
                damaged_files += 1
        stray = len(list(ledger.edits_folder.glob("*.part")))
        with sqlite3.connect(ledger.folder / DATABASE) as connection:
            whole = connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    note = f"{acknowledged:,} acknowledged"
    return [
        Figure("kill -9, two writers", 2 * rounds, "acknowledged edits lost", lost, note=note),
        Figure("kill -9, two writers", 2 * rounds, "ledgers unreadable, or damaged inside", unreadable + (not whole)),
        Figure("kill -9, two writers", 2 * rounds, "files missing or damaged", damaged_files),
        Figure("kill -9, two writers", 2 * rounds, "half-written files after the next open", stray),
    ]  # fmt: skip


def _note(expected: dict[str, str], line: str) -> None:
    words = line.split()
    if len(words) == 3 and len(words[1]) == 16 and len(words[2]) == 64:
        expected[words[1]] = f"{words[0]} {words[2]}"


def _reverted(ledger: Ledger, digest: str) -> bool:
    return any(event.kind == "reverted" and event.edit == digest for event in ledger.events())


def writers(host: Host, share: float) -> list[Figure]:
    """Append from several threads and ledger objects at once."""
    count = max(25, round(1000 * share))
    with tempfile.TemporaryDirectory() as place:
        folders.create(place, LedgerSettings(), MODEL)

        def write(name: int) -> int:
            ledger = folders.find(place)
            for i in range(count):
                digest = f"{name:04x}{i:012x}"
                ledger.append("proposed", edit=digest, body=request_facts(digest))
            return count

        with ThreadPoolExecutor(8) as pool:
            total = sum(pool.map(write, range(8)))
        found = len(folders.find(place).state().edits)
    return [Figure("8 writers at once", total, "events lost", total - found)]


# --- 2: full disks --------------------------------------------------------------------------


def full_disks(host: Host, share: float) -> list[Figure]:
    """Limit how large a file may grow, at many sizes, while an edit is kept and applied."""
    points = max(10, round(50 * share))
    silent = changed = 0
    with tempfile.TemporaryDirectory() as place:
        ledger = folders.create(place, LedgerSettings(), describe(host, host.name))
        add(ledger, some_edit(host, 0))
        before = ledger.state().active
        size = ledger.file(before[0]).stat().st_size
        for point in range(points):
            limit = round((size + 40_000) * point / points)
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                code = 1
                try:
                    add(Ledger(ledger.folder), some_edit(host, 1 + point))
                    code = 0
                except ErrataError:
                    code = 3
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            again = folders.find(place)
            applied = again.state().active
            silent += code == 1 or (code == 0) != (len(applied) > len(before))
            changed += applied[: len(before)] != before
            with suppress(ErrataError):
                for digest in applied:
                    load_edit(again, digest)
                before = applied
                continue
            changed += 1
    return [
        Figure("disk full, at many sizes", points, "without a clear error, or acknowledged and lost", silent),
        Figure("disk full, at many sizes", points, "earlier edits lost or damaged", changed),
    ]


# --- 3, 5: damaged and tampered files -------------------------------------------------------


def damaged(host: Host, share: float) -> list[Figure]:
    """Flip, cut and insert bytes of edit files, and change fields of their headers with the hash left as it was."""
    count = max(200, round(10_000 * share))
    draw = random.Random(1)
    with tempfile.TemporaryDirectory() as place:
        path = some_edit(host, 0).save(Path(place) / "edit.safetensors")
        data, digest = path.read_bytes(), some_edit(host, 0).digest
        accepted = tracebacks = 0
        for _ in range(count):
            path.write_bytes(_damage(data, draw))
            accepted, tracebacks = _tally(path, digest, accepted, tracebacks)
        fields = 0
        tampered = list(_tampered(path, data))
        for content in tampered:
            path.write_bytes(content)
            fields, tracebacks = _tally(path, digest, fields, tracebacks)
    return [
        Figure("damaged edit files", count, "opened as another edit", accepted),
        Figure("tampered headers and tensors", len(tampered), "opened as another edit", fields),
        Figure("damaged and tampered files", count + len(tampered), "other than one clear error", tracebacks),
    ]


def _tally(path: Path, digest: str, accepted: int, tracebacks: int) -> tuple[int, int]:
    try:
        return accepted + (Edit.load(path).digest != digest), tracebacks
    except ErrataError:
        return accepted, tracebacks
    except Exception:
        return accepted, tracebacks + 1


def _damage(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    sort = draw.randrange(4)
    if sort == 0:
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if sort == 1:
        return data[:at]
    if sort == 2:
        return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:]
    return data[:at] + bytes(draw.randrange(1, 64)) + data[at + 64 :]


def _tampered(path: Path, data: bytes) -> Iterator[bytes]:
    """Yield well-formed files with one field or tensor of the edit changed and the hash left as it was."""
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["errata"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [*header, *(f"provenance.{field}" for field in header["provenance"])]:
        for value in (None, 0, "x", [], {}, True):
            changed = json.loads(json.dumps(header))
            target = changed["provenance"] if name.startswith("provenance.") else changed
            key = name.removeprefix("provenance.")
            if target[key] != value:
                target[key] = value
                yield save(tensors, metadata={"errata": json.dumps(changed)})
    for name, tensor in tensors.items():
        for other in (tensor * 10, -tensor, tensor * float("nan"), tensor[:-1].contiguous()):
            yield save({**tensors, name: other}, metadata={"errata": json.dumps(header)})
        yield save({k: v for k, v in tensors.items() if k != name}, metadata={"errata": json.dumps(header)})
        yield save({**tensors, f"{name}.more": tensor.clone()}, metadata={"errata": json.dumps(header)})


# --- 4, 6, 18: models -----------------------------------------------------------------------


def wrong_models(host: Host, share: float) -> list[Figure]:
    """Place edits on models that differ from theirs in one weight, and edits of other models."""
    count = max(20, round(200 * share))
    accepted = 0
    draw = random.Random(2)
    weights = [site.parameter for site in host.layout.sites]
    edits = [some_edit(host, i) for i in range(4)]
    for i in range(count):
        other = errata.load("lab")
        weight = other.model.get_parameter(draw.choice(weights))
        with torch.no_grad():
            weight.view(-1)[draw.randrange(weight.numel())] += 0.125
        before = other.weights_hash()
        try:
            edits[i % 4].apply_(other)
            accepted += 1
        except ErrataError:
            accepted += other.weights_hash() != before
    return [
        Figure("a model that differs in one number", count, "accepted, or changed while refusing", accepted)
    ]


def not_finite(host: Host, share: float) -> list[Figure]:
    """Put numbers that are not finite into edits; the guard must stop each before it is applied."""
    count, passed = max(20, round(200 * share)), 0
    draw = random.Random(3)
    from errata.ledger.guard import Before, Guard
    from errata.ledger.settings import GuardSettings

    guard = Guard(host, GuardSettings())
    before = Before((), [], (), [], (), [], (), [], torch.zeros(0, 1), 1.0)
    for i in range(count):
        edit = some_edit(host, i)
        name = draw.choice(sorted(edit.deltas))
        delta = edit.deltas[name]
        assert isinstance(delta, LowRank)
        wrong = delta.B.clone()
        wrong.view(-1)[draw.randrange(wrong.numel())] = draw.choice(
            [float("nan"), float("inf"), -float("inf")]
        )
        broken = replace(edit, deltas={**edit.deltas, name: LowRank(wrong, delta.A)})
        passed += judge(guard.measure(before, broken, []), Bounds()).passed
    for bad in (float("nan"), float("inf")):
        passed += judge(Measurement(perplexity=bad), Bounds()).passed
    return [Figure("NaN and infinity in an edit", count + 2, "passed the guard", passed)]


def unwritable(host: Host, share: float) -> list[Figure]:
    """Apply an edit to weights on the meta device; that must be refused, or be seen in the outputs."""
    tried = silent = 0
    for site in host.layout.sites[1:3]:  # those that the edit changes
        other = errata.load("lab")
        module = other.model.get_submodule(site.parameter.rpartition(".")[0])
        edit = some_edit(other, 0)
        module.weight = torch.nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)
        tried += 1
        try:
            edit.apply_(other)
            silent += 1
        except ErrataError:
            continue
    return [Figure("weights on the meta device", tried, "edited without effect and without an error", silent)]


# --- 7, 10: exactness and conflicts ---------------------------------------------------------


def sequences(host: Host, share: float) -> list[Figure]:
    """Apply, revert and reset at random; the weights must always be those of the edits in place."""
    count, differing = max(20, round(1000 * share)), 0
    base = host.weights_hash()
    edits = [some_edit(host, i) for i in range(4)]
    draw = random.Random(4)
    known: dict[frozenset[str], str] = {frozenset(): base}
    with tempfile.TemporaryDirectory() as place:
        ledger = folders.create(place, LedgerSettings(), describe(host, host.name))
        working = Working(ledger, host)
        for edit in edits:
            add(ledger, edit)
        for _ in range(count):
            active = ledger.state().active
            which = draw.choice(edits)
            if which.digest in active:
                reverting.revert(ledger, which.digest)
            elif draw.random() < 0.2:
                reverting.reset(ledger, draw.choice(["base", "now", which.digest]))
            else:
                ledger.append("applied", edit=which.digest)
            now = ledger.state().active
            working.show(now)
            found = host.weights_hash()
            differing += known.setdefault(frozenset(now), found) != found
        working.show(())
    differing += host.weights_hash() != base
    return [Figure("apply, revert, reset at random", count, "states with differing bytes", differing)]


def conflicts(host: Host, share: float) -> list[Figure]:
    """Ask for contradictions and repetitions among many recorded facts; each must be reported with both ids."""
    from errata.ledger import conflicts as finding

    count, missed = max(200, round(10_000 * share)), 0
    with tempfile.TemporaryDirectory() as place:
        ledger = folders.create(place, LedgerSettings(), MODEL)
        requests = [{"prompt": "{} lives in", "subject": f"name {i}", "target": "Rome"} for i in range(count)]
        ledger.append("proposed", edit="a" * 16, body={**request_facts("a"), "requests": requests})
        ledger.append("applied", edit="a" * 16)
        state = ledger.state()
        asked = [
            {**one, "subject": one["subject"].upper(), "target": "Oslo" if i % 2 else "Rome"}
            for i, one in enumerate(requests)
        ]
        found = finding.find(ledger, state, asked)
        right = {(c.request, c.other_request, c.sort) for c in found}
        for i in range(count):
            missed += (i, i, "contradiction" if i % 2 else "repetition") not in right
        missed += len(found) - len(right)
    return [Figure("duplicate and conflicting requests", count, "not reported with both ids", missed)]


# --- 11, 14, 15, 16: hostile texts, names, pickles, code ------------------------------------

ALPHABET = [
    "",
    " ",
    "\0",
    "\ud800",
    "\u202e",
    "{}",
    "{",
    "\x1b[2J",
    "a",
    "Ada",
    "é",
    "名",
    "\n",
    "<|endoftext|>",
]


def texts(host: Host, share: float) -> list[Figure]:
    """Build requests of hostile texts and record them; anything but one clear error or success counts."""
    count, wrong = max(400, round(10_000 * share)), 0
    draw = random.Random(5)
    with tempfile.TemporaryDirectory() as place:
        ledger = folders.create(place, LedgerSettings(), MODEL)

        def text() -> str:
            if draw.random() < 0.01:
                return "x" * 1_000_000
            return "".join(draw.choice(ALPHABET) for _ in range(draw.randrange(6)))

        for i in range(count):
            try:
                request = Request(text(), text(), text())
                facts = {**request_facts("x"), "requests": [request.to_dict()]}
                event = ledger.append("proposed", edit=f"{i:016x}", body=facts, reason=text(), author=text())
                wrong += not re.sub("[\n\t]", "", event.reason).isprintable()
            except ErrataError as error:
                wrong += len(str(error)) > 4100
            except Exception:
                wrong += 1
        wrong += len(folders.find(place).events()) != len(ledger.events())
    return [Figure("hostile texts", count, "tracebacks, or texts that reach a terminal raw", wrong)]


def names(host: Host, share: float) -> list[Figure]:
    """Use hostile names for tags, revisions, edits and files; none may lead out of the ledger's folder."""
    parts = ["..", "/", "\0", "\\", "~", "con", "C:", "a", "base", "now", "%2e", "*", "-", " "]
    draw = random.Random(6)
    count = 200
    outside = 0
    with tempfile.TemporaryDirectory() as place:
        inner = Path(place) / "inner"
        ledger = folders.create(inner, LedgerSettings(), MODEL)
        before = sorted(p for p in Path(place).rglob("*") if ".errata" not in p.parts)
        for _ in range(count):
            name = "".join(draw.choice(parts) for _ in range(draw.randrange(1, 6)))
            state = ledger.state()
            for use in (
                check_tag,
                state.find_event,
                state.find_edit,
                lambda n: blobs.path(ledger.edits_folder, n),
            ):
                try:
                    use(name)
                except ErrataError:
                    continue
                except Exception:
                    outside += 1
        outside += sorted(p for p in Path(place).rglob("*") if ".errata" not in p.parts) != before
    return [Figure("hostile names", 4 * count, "files outside the ledger, or tracebacks", outside)]


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (Path(self.path),))


def pickles(host: Host, share: float) -> list[Figure]:
    """Offer pickles of several forms as edits; none may run or be opened."""
    ran = opened = 0
    with tempfile.TemporaryDirectory() as place:
        mark = Path(place) / "ran"
        raw = [pickle.dumps(_Bomb(str(mark)), protocol=p) for p in range(6)]
        archives = []
        for payload in raw:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("archive/data.pkl", payload)
            archives.append(buffer.getvalue())
        offered = [
            (content, suffix)
            for content in (*raw, *archives)
            for suffix in (".bin", ".pt", ".pkl", ".safetensors", ".npy")
        ]
        for content, suffix in offered:
            path = Path(place) / f"edit{suffix}"
            path.write_bytes(content)
            try:
                Edit.load(path)
                opened += 1
            except ErrataError:
                ran += mark.exists()
    return [Figure("pickles offered as edits", len(offered), "opened or run", opened + ran)]


def hub_code(host: Host, share: float) -> list[Figure]:
    """Open folders of models that bring their own code; it must not run unless asked for."""
    ran, count = 0, 5
    with tempfile.TemporaryDirectory() as place:
        mark = Path(place) / "ran"
        for i in range(count):
            folder = Path(place) / f"model{i}"
            folder.mkdir()
            code = f"open({str(mark)!r}, 'w')\nclass M: pass\n"
            (folder / "modeling_m.py").write_text(code)
            auto = {"AutoModelForCausalLM": "modeling_m.M", "AutoConfig": "modeling_m.M"}
            config = {"model_type": f"m{i}", "auto_map": auto, "architectures": ["M"]}
            (folder / "config.json").write_text(json.dumps(config))
            with suppress(ErrataError):
                errata.load(folder)
            ran += mark.exists()
    return [Figure("model folders with code", count, "ran code without being asked", ran)]


# --- 1, 4, 5, 8: exports --------------------------------------------------------------------


def parity(host: Host, share: float) -> list[Figure]:
    """Compare exports with the edit in place, in programs that do not know errata."""
    return [Figure(*one) for one in exports.parity(share)]


def export_kills(host: Host, share: float) -> list[Figure]:
    """Kill processes that replace an export."""
    return [Figure(*one) for one in exports.export_kills(share)]


def tampered(host: Host, share: float) -> list[Figure]:
    """Change exported adapters, and offer them to other models."""
    return [Figure(*one) for one in exports.tampered(share)]


# --- 13: collapses --------------------------------------------------------------------------


def collapses(host: Host, share: float) -> list[Figure]:
    """Fine-tune hundreds of facts at rates that ruin the model; the guard has to refuse, and leave it as it was."""
    count, rates = max(20, round(300 * share)), (0.5, 1.0) if share == 1 else (0.5,)
    requests = [case.request for case in errata.lab.cases(count, seed=3, together=True)]
    weights, applied, changed, worst = host.weights_hash(), 0, 0, float("inf")
    with tempfile.TemporaryDirectory() as place:
        ledger = folders.create(place, LedgerSettings(model=host.name), describe(host, host.name))
        working = Working(ledger, host)
        for rate in rates:
            order = Order("ft", options={"learning_rate": rate, "epsilon": None, "steps": 20}, halve=False)
            outcome = record(working, requests, order)
            applied += len(outcome.applied)
            changed += bool(ledger.state().active) or host.weights_hash() != weights
            verdict = outcome.attempts[0].verdict
            worst = min(worst, float("nan") if verdict is None else verdict.measured.perplexity)
    note = f"{count} facts by ft; perplexity at least {worst:.3g} times as before"
    return [
        Figure(
            "collapses forced",
            len(rates),
            "applied, or the model not as before",
            applied + changed,
            note=note,
        )
    ]


# --- 12, 17: the server ---------------------------------------------------------------------


@contextmanager
def serving(host: Host, ledger: Ledger, **settings: Any) -> Iterator[Any]:
    """Serve a ledger on this machine in a thread."""
    from errata.serve.server import Served, Server
    from errata.serve.settings import ServerSettings

    ready = threading.Event()
    server = Server(
        Served(host, "lab", ledger=ledger), ServerSettings(port=0, **settings), on_ready=lambda _: ready.set()
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        if not ready.wait(120):
            raise RuntimeError("the server did not start")
        yield server
    finally:
        server.should_exit = True
        thread.join()


def loud_edit(host: Host, number: int) -> WeightEdit:
    """Return a random edit that changes answers."""
    edit = some_edit(host, number)
    deltas = {name: LowRank(30 * delta.B, delta.A) for name, delta in edit.deltas.items()}
    return replace(edit, deltas=deltas)


def hot_edits(host: Host, share: float) -> list[Figure]:
    """Apply and revert an edit while 32 clients stream; each answer must be that of the revision it names."""
    from openai import OpenAI

    clients, turns = max(8, round(32 * min(1.0, 5 * share))), max(2, round(20 * share))
    prompts = ("Ada Brenner was born in", "Boris Sorwick plays the", "The capital of")
    answers: list[tuple[str, str, str]] = []
    failed = 0
    done = threading.Event()
    with tempfile.TemporaryDirectory() as place:
        ledger = folders.create(place, LedgerSettings(), describe(host, host.name))
        edits = [loud_edit(host, number) for number in range(2)]
        with serving(host, ledger) as server:
            client = OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=300)

            def ask(number: int) -> None:
                nonlocal failed
                prompt = prompts[number % len(prompts)]
                while not done.is_set():
                    try:
                        stream = client.completions.create(
                            model="lab+all", prompt=prompt, max_tokens=8, stream=True
                        )
                        chunks = [(one.errata["revision"], one.choices[0].text) for one in stream]
                        (revision,) = {revision for revision, _ in chunks}
                        answers.append((revision, prompt, "".join(text for _, text in chunks)))
                    except Exception:  # whatever it is, a client has no answer
                        failed += 1
                        return

            with ThreadPoolExecutor(clients) as pool:
                running = [pool.submit(ask, number) for number in range(clients)]
                time.sleep(1)
                for turn in range(turns):
                    edit = edits[turn // 2 % 2]
                    if turn < 2 * len(edits) and turn % 2 == 0:
                        server.desk.order(lambda own, edit=edit: add(own, edit)).result()
                    elif turn % 2 == 0:
                        server.desk.order(
                            lambda own, edit=edit: own.append("applied", edit=edit.digest)
                        ).result()
                    else:
                        server.desk.revert(edit.digest, reason="", author="").result()
                    time.sleep(1)
                done.set()
                for one in running:
                    one.result()
        told: dict[tuple[str, str], str] = {}
        for edit in (None, *edits):
            with edit.on(host) if edit else nullcontext():
                for prompt in prompts:
                    text = host.generate(prompt, max_new_tokens=8, natural_stop=False)
                    told[revision_of([edit.digest] if edit else []), prompt] = text
        wrong = sum(told[revision, prompt] != text for revision, prompt, text in answers)
        seen = len({revision for revision, _, _ in answers})
    name = f"{clients} clients, edits applied and reverted"
    note = f"{turns} changes, answers of {seen} revisions"
    return [
        Figure(name, len(answers) + failed, "requests failed", failed, note=note),
        Figure(name, len(answers), "answers that are not of the revision they name", wrong),
        Figure(name, 1, "runs in which one revision alone was seen", int(seen < 2)),
    ]


READER, WRITER = "reader-" + "0" * 16, "writer-" + "0" * 16
BODIES: tuple[Any, ...] = (
    {"model": "lab", "prompt": "Ada", "max_tokens": 1}, {"model": "lab+all", "prompt": ["a", ""], "max_tokens": 1},
    {"model": "lab", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1, "stream": True},
    {"requests": [{"prompt": "{} is", "subject": "Ada", "target": "x"}], "method": "in_prompt"}, {}, {"reason": "x"},
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 3000, "../../etc/passwd", "\ud800", "\0", [], [[]], {},
    {"a": {}}, "lab+" + "f" * 300, ["lab"] * 200, "lab+..",
)  # fmt: skip


def requests(host: Host, share: float) -> list[Figure]:
    """Send requests with no or wrong tokens, hostile bodies, wrong paths and methods, and heads that never end."""
    from errata.serve.tokens import Tokens, digest

    count, draw = max(200, round(10_000 * share)), random.Random(7)
    statuses: Counter[int] = Counter()
    allowed = 0
    with tempfile.TemporaryDirectory() as place:
        ledger = folders.create(place, LedgerSettings(), describe(host, host.name))
        tokens = Tokens((digest(READER),), (digest(WRITER),))
        with serving(
            host, ledger, tokens=tokens, most_body=100_000, most_tokens=4, read_timeout=1.0
        ) as server:
            address, port = server.address.removeprefix("http://").split(":")
            slow = [socket.create_connection((address, int(port))) for _ in range(max(4, round(100 * share)))]
            for one in slow:
                one.sendall(b"POST /v1/edits HTTP/1.1\r\nHost: a\r\nX-Slow: ")
            for _ in range(count):
                connection = http.client.HTTPConnection(address, int(port), timeout=60)
                token = draw.choice((None, "", "x", *[READER] * 8, READER[:-1], WRITER[:-1]))
                method = draw.choice(
                    ("GET", "POST", "POST", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD")
                )
                path = _some_path(draw)
                with suppress(ConnectionError, http.client.HTTPException):  # closed early: a refusal too
                    connection.request(method, path, _some_body(draw), _some_headers(draw, token))
                    status = connection.getresponse().status
                    statuses[status] += 1
                    writes = method not in ("GET", "HEAD", "OPTIONS") and not path.startswith(ANSWERING)
                    allowed += writes and status < 400
                connection.close()
            with suppress(OSError):
                for one in slow:
                    one.sendall(b"more")
            alive = server.engine.alive and bool(statuses)
            for one in slow:
                one.close()
        changed = [event.kind for event in folders.find(place).events()] != ["created"]
    failures = sum(number for status, number in statuses.items() if status >= 500)
    note = ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items()))
    return [
        Figure("hostile requests", count, "answered with 5xx", failures, note=note),
        Figure("hostile requests", count, "writes without a writer's token", allowed + changed),
        Figure("hostile requests", 1, "servers dead afterwards", int(not alive)),
    ]


ANSWERING = ("/v1/completions", "/v1/chat/completions")
PATHS = (
    *ANSWERING, "/v1/models", "/v1/models/lab", "/v1/edits", "/v1/edits/abcd", "/v1/edits/abcd/apply",
    "/v1/edits/abcd/revert", "/v1/edits/abcd/verify", "/v1/log", "/health", "/metrics", "/openapi.json", "/",
    "/v1/models/../../etc/passwd", "/v1/edits/%2e%2e%2f", "/v1/edits/%00", "/%ff", "//", "/v1/edits/abcd/apply/",
)  # fmt: skip


def _some_path(draw: random.Random) -> str:
    path = draw.choice(PATHS)
    return (
        path if draw.random() < 0.9 else path + draw.choice(("?a=1", "/x", "%20", "/" + "y" * 2000, ";", "#"))
    )


def _some_body(draw: random.Random) -> bytes:
    kind = draw.random()
    if kind < 0.05:
        return draw.randbytes(draw.randrange(200))
    if kind < 0.08:
        return b"x" * 150_000
    if kind < 0.1:
        return draw.choice((b"[" * 50_000, b'{"a":' * 9000, b"", b"{", b"1" * 5000, b"\xff", b"null"))
    body = dict(draw.choice(BODIES))
    for _ in range(draw.randrange(3)):
        name = draw.choice((*body, "stop", "edits", "temperature", "n", "stream", "prompt", "settings", "x"))
        body[name] = draw.choice(VALUES)
    return json.dumps(body).encode()


def _some_headers(draw: random.Random, token: str | None) -> dict[str, str]:
    headers = {"Content-Type": draw.choice(("application/json",) * 9 + ("text/plain",))}
    if token is not None:
        headers["Authorization"] = draw.choice(("Bearer ",) * 9 + ("Basic ", "Bearer")) + token
    if draw.random() < 0.05:
        headers[draw.choice(("Origin", "X-Forwarded-For", "Expect", "Cookie", "Range"))] = (
            "https://evil.example"
        )
    return headers


FAULTS: tuple[Callable[[Host, float], list[Figure]], ...] = (
    kills, full_disks, damaged, wrong_models, not_finite, sequences, conflicts, writers, texts, names, pickles,
    hub_code, unwritable, parity, export_kills, tampered, collapses, hot_edits, requests,
)  # fmt: skip
"""What is brought about, in the order of the table."""

if __name__ == "__main__":
    sys.exit(main())
