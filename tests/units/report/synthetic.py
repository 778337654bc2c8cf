"""Write run folders of made-up numbers in the documented form, to test reports without a model."""

from __future__ import annotations

import json
import math
import random
import re
import sqlite3
from pathlib import Path

KINDS = {
    "efficacy": (1, True), "paraphrase": (3, True), "question": (1, True), "neighbourhood": (5, False),
    "same_subject": (4, False), "inverse": (1, True), "one_hop": (3, True), "alias": (2, True),
}  # fmt: skip
SKILL = {
    "unedited": (0.0, 1.0), "in_prompt": (0.99, 0.97), "ft": (0.98, 0.35), "rome": (0.97, 0.86),
    "memit": (0.93, 0.94), "alphaedit": (0.95, 0.97), "pmet": (0.9, 0.91), "emmet": (0.94, 0.9),
    "ultraedit": (0.85, 0.95), "lora": (0.99, 0.6), "kn": (0.1, 0.92),
}  # fmt: skip
BASELINES = ("unedited", "in_prompt", "ft")
NASTY = "</script><script>window.hacked = 1</script> \"quoted\" & 'so' <img src=x onerror=window.hacked=1>"


def rows_of(case: int, rng: random.Random, learn: float, keep: float, *, nasty: bool = False) -> list[dict]:
    """Make the rows of one case: about what a method of this skill would give."""
    made = []
    name = f"lab:0:{case}"
    for kind, (count, changes) in KINDS.items():
        for i in range(count):
            old, new = f"Oldtown{case % 17}", f"Newham{case % 13}"
            right = rng.random() < (learn if changes else keep)
            answers = [new] if changes else [old]
            text = (
                answers[0]
                if right
                else rng.choice(["the river", "a violin of some age", old if changes else new])
            )
            before = old if rng.random() < 0.95 else "I do not know"
            known = 0.0 if changes else float(before == old)
            prompt = f"Ada Brenner {case} {kind.replace('_', ' ')} {i} is"
            if nasty and case == 0 and kind == "efficacy":
                prompt, text = NASTY, NASTY
            detail = {"text_before": before, "text_after": text, "answers": answers, "changes": changes}
            head = {"case": name, "kind": kind, "prompt": prompt}
            after = float(right)
            made.append({**head, "protocol": "generate", "before": known, "after": after, "detail": detail})
            made.append({**head, "protocol": "teacher_forced", "before": known, "after": after,
                         "detail": {"tokens_before": known, "tokens_after": after, "changes": changes}})  # fmt: skip
            if kind in ("efficacy", "paraphrase", "neighbourhood"):
                made.append({**head, "protocol": "probability", "before": known, "after": after,
                             "detail": {"rival": old, "changes": changes}})  # fmt: skip
            if kind == "neighbourhood":
                made.append({**head, "protocol": "kl", "before": 0.0, "after": (1 - keep) * rng.random(),
                             "detail": {}})  # fmt: skip
    return made


def summary_of(rows: list[dict]) -> dict[str, dict]:
    """Average rows as the evaluator does; the interval is a normal one, which is enough here."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['kind']}.{row['protocol']}", []).append(row)
    made = {}
    for key, group in groups.items():
        kept = [r for r in group if r["detail"].get("changes", True) or r["before"] > 0]
        after = sum(r["after"] for r in kept) / len(kept) if kept else None
        ci: list = [None, None]
        if after is not None:
            width = 1.96 * math.sqrt(max(after * (1 - after), 0) / len(kept))
            ci = [max(0.0, after - width), min(1.0, after + width)]
        before = sum(r["before"] for r in group) / len(group)
        made[key] = {"before": before, "after": after, "n": len(kept), "ci": ci}
    return made


def tag_of(dataset: str, edits: int, **changed: object) -> dict:
    """Make a protocol tag."""
    return {
        "dataset": dataset, "dataset_sha256": "ab" * 32, "convention": "together" if edits > 1 else "single",
        "prompt_template": "raw", "decode": "greedy, natural stop", "matcher": "alias, first sentence",
        "locality_mode": "right before", "edits": edits, "batch": 1, "max_new_tokens": 24, "dtype": "float32",
        **changed,
    }  # fmt: skip


def write_run(
    folder: Path, *, methods: tuple[str, ...] = tuple(SKILL), cases: int = 12, looks: tuple[int, ...] = (),
    single: bool = True, published: tuple[dict, ...] = (), name: str = "synthetic", nasty: bool = False,
    absent: bool = True, tag: dict | None = None,
) -> Path:  # fmt: skip
    """Write a run folder: every method on ``lab`` single and, given looks, in a sequence."""
    plans, jobs = [], []
    for schedule in [*(["single"] if single else []), *(["sequential:10"] if looks else [])]:
        for method in methods:
            plan = {
                "id": f"{method}-{schedule.replace(':', '-')}-0000", "model": "lab", "method": method,
                "label": None, "settings": {"layer": 3} if method == "rome" else {}, "dataset": f"lab:{cases}",
                "schedule": schedule, "look": list(looks) or None, "seed": 0, "baseline": method in BASELINES,
            }  # fmt: skip
            plans.append(plan)
            jobs.append((plan["id"], "done", ""))
            _cell(folder, plan, cases, looks if schedule != "single" else (), nasty, tag or {})
    if absent:
        for method, state, reason in (
            ("mend", "refused", "mend needs training first; this host has no trained editor"),
            (
                "broken",
                "failed",
                "Traceback (most recent call last):\n  File x\nValueError: <b>matrix</b> is singular",
            ),
            ("late", "open", ""),
        ):
            plan = {"id": f"{method}-0000", "model": "lab", "method": method, "label": None, "settings": {},
                    "dataset": f"lab:{cases}", "schedule": "single", "seed": 0, "baseline": False}  # fmt: skip
            plans.append(plan)
            jobs.append((plan["id"], state, reason))
    document = {
        "schema": 1, "name": name, "recipe": {"name": name}, "recipe_sha256": "cd" * 32,
        "created": "2026-01-02T03:04:05Z", "versions": {"errata": "0.1.0", "torch": "2.13.0"},
        "hardware": {"cpu": "A CPU", "cores": 2, "memory_gb": 7.8, "gpus": []}, "threads": 1,
        "datasets": {f"lab:{cases}": {"sha256": "ab" * 32, "rows": cases, "cases": cases, "check": {}}},
        "published": list(published), "cells": plans,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(document), encoding="utf-8")
    with sqlite3.connect(folder / "jobs.sqlite") as base:
        base.execute("CREATE TABLE jobs (cell TEXT PRIMARY KEY, state TEXT, owner TEXT, lease_until REAL, "
                     "attempts INTEGER, reason TEXT)")  # fmt: skip
        base.executemany("INSERT INTO jobs (cell, state, reason) VALUES (?, ?, ?)", jobs)
    base.close()
    return folder


def _cell(folder: Path, plan: dict, cases: int, looks: tuple[int, ...], nasty: bool, changed: dict) -> None:
    place = folder / "cells" / plan["id"]
    place.mkdir(parents=True)
    learn, keep = SKILL[plan["method"]]
    rng = random.Random(plan["id"])
    lines, points, rows = [], [], []
    for edits in looks or (None,):
        rows = []
        for case in range(edits or cases):
            age = 0 if edits is None else edits - case - 1
            wear = (
                1.0 if plan["method"] in BASELINES[:2] else 1 / (1 + (0.004 if learn < 0.96 else 0.02) * age)
            )
            mine = rows_of(case, rng, learn * wear, keep * wear, nasty=nasty)
            rows += mine
            lines.append({"type": "case", "case": f"lab:0:{case}", "edits": edits, "rows": mine,
                          "cost": {"fit_seconds": 0.5, "observe_seconds": 0.1}})  # fmt: skip
        if edits is not None:
            points.append(_look(edits, learn, plan["method"]))
            lines.append({"type": "look", **points[-1]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (place / "rows.jsonl").write_text(text, encoding="utf-8")
    summary = summary_of(rows)
    scores = {
        short: 100 * summary[f"{kind}.probability"]["after"]
        for short, kind in (("ES", "efficacy"), ("PS", "paraphrase"), ("NS", "neighbourhood"))
    }
    low = min(scores.values())
    scores["S"] = 3 / sum(1 / v for v in scores.values()) if low > 0 else 0.0
    document = {
        "id": plan["id"], "cell": plan, "status": "done", "reason": None, "summary": summary, "looks": points,
        "tag": tag_of(plan["dataset"], max(looks, default=1), **changed), "scores": scores, "retention": None,
        "cost": {
            "setup_seconds": 1.5, "fit": {"median": 0.04 + learn, "p95": 2.25, "total": 61.0},
            "observe": {"total": 20.0, "per_case": 0.2}, "peak_memory_mb": 812.4, "bytes_per_edit": 34700,
            "latency_overhead": {"prefill": 0.021, "decode": 0.0},
        },
        "host": {"name": "lab", "fingerprint": "f" * 16}, "weights_restored": True,
    }  # fmt: skip
    (place / "cell.json").write_text(json.dumps(document), encoding="utf-8")


def _look(edits: int, learn: float, method: str) -> dict:
    grows = {"unedited": 0.0, "in_prompt": 0.0, "ft": 0.03, "lora": 0.02, "rome": 0.012}.get(method, 0.001)
    after = 12.5 * math.exp(grows * edits)
    return {
        "edits": edits, "perplexity_before": 12.5, "perplexity_after": after if after < 4000 else "inf",
        "last_batch_efficacy": learn, "fit_seconds": edits * 0.5, "norm": edits * 0.1,
        "norm_ratio": {"layers.2": 0.001 * edits, "layers.3": 0.002 * edits}, "spectral_ratio": {"layers.3": 1.1},
        "digest": "0" * 16, "bytes": 1000 * edits,
        "collapse": {"alarm": ["perplexity above twice the unedited host's"] if after > 25 else []},
    }  # fmt: skip


def row(
    case: str, kind: str, prompt: str, after: float, *, before: float = 0.0, changes: bool = True
) -> dict:
    """Make one row of free generation."""
    text = "right" if after else "wrong"
    detail = {"text_before": "old", "text_after": text, "answers": ["right"], "changes": changes}
    head = {"case": case, "kind": kind, "protocol": "generate", "prompt": prompt}
    return {**head, "before": before, "after": after, "detail": detail}


def write_small(folder: Path, cells: list[dict], **document: object) -> Path:
    """Write a run of given cells: each with method, lines, and maybe plan, tag, looks, status, reason, scores."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = []
    for i, given in enumerate(cells):
        method = given["method"]
        plan = {
            "id": re.sub(r"[^\w.-]", "_", f"{method}-{i}"),
            "model": "lab", "method": method, "label": method, "settings": {},
            "dataset": "lab:2", "schedule": "single", "look": None, "seed": 0,
            "baseline": method in BASELINES, **given.get("plan", {}),
        }  # fmt: skip
        plans.append(plan)
        place = folder / "cells" / plan["id"]
        place.mkdir(parents=True)
        lines = given["lines"]
        (place / "rows.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        last = max((line["edits"] or 0 for line in lines), default=0)
        rows = [r for line in lines if (line["edits"] or 0) == last for r in line["rows"]]
        (place / "cell.json").write_text(json.dumps({
            "id": plan["id"], "cell": plan, "status": given.get("status", "done"), "reason": given.get("reason"),
            "tag": {**tag_of("lab:2", 1), **given.get("tag", {})}, "summary": summary_of(rows),
            "looks": given.get("looks", []), "scores": given.get("scores", {}), "retention": None, "cost": None,
            "host": {"name": "lab", "fingerprint": "f"}, "weights_restored": True,
            "refused_cases": given.get("refused_cases", []),
        }), encoding="utf-8")  # fmt: skip
    whole = {"schema": 1, "name": "small", "cells": plans, **document}
    (folder / "run.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def case_line(name: str, *rows: dict, edits: int | None = None) -> dict:
    """Make the line of one case."""
    return {"type": "case", "case": name, "edits": edits, "rows": list(rows), "cost": {}}
