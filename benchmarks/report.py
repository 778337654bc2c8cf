"""Put measurements into words and tables. Reads what ``measure.run`` returned; runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]

GIGA = 1e9
HEAD = (
    "workload", "s", "floor s", "times floor", "GFLOP", "floor GFLOP", "of which s", "once s", "peak GiB",
    "less weights GiB",
)  # fmt: skip

REFERENCE_RATE = 77.0
"""Matrix rate of the machine that the absolute goals and the reference figures are from, GFLOP/s."""
REFERENCE = (
    ("ROME, one edit (19 steps, 22 rows)", "31", "2,440", "290"),
    ("MEMIT, layers 3-8, 10 together, an edit", "13.0", "", ""),
    ("MEMIT, layers 3-8, 100 together, an edit", "13.6 (values 10.8, keys 2.6)", "700 + 136", "49.5 + 4.3"),
    ("second moments, one pass a layer, 1,000 texts of 100 tokens, a layer", "153", "", ""),
    ("AlphaEdit, null space, a layer", "9", "", ""),
    ("a solve in float64, a layer and batch", "0.7", "", ""),
    ("FT, one edit", "4.6", "", ""),
)
"""Public code at the GPT-2-small shape, one thread, measured elsewhere: what, CPU seconds, operations
done, operations unavoidable."""


def page(results: Sequence[Result], machine: Mapping[str, Any]) -> str:
    """Return the tables of all shapes, and how they compare with the goals, as Markdown."""
    rates = [result["rate"] for result in results if "rate" in result]
    rate = f"{statistics.median(rates) / GIGA:,.0f} GFLOP/s" if rates else "not measured"
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    parts = [
        f"{machine['processor']}, {threads}, device {machine['device']}, Python {machine['python']}"
        f"{', quick' if machine['quick'] else ''}. Matrix rate {rate} (median over the workloads; each is "
        f"held against its own). Times are {machine['seconds']}, an edit; of statistics, 1,000 tokens.",
    ]
    for shape in dict.fromkeys(result["task"]["shape"] for result in results):
        mine = [result for result in results if result["task"]["shape"] == shape]
        parts += [
            f"**{shape}**",
            table(HEAD, [cells(result) for result in mine]),
            "\n".join(f"* {goal}" for goal in goals(mine)),
        ]
    parts += [
        "**Reference**, measured elsewhere: public code at the GPT-2-small shape, one thread, matrix rate "
        f"{REFERENCE_RATE:.0f} GFLOP/s",
        table(("workload", "CPU s", "GFLOP", "unavoidable GFLOP"), REFERENCE),
    ]
    return "\n\n".join(part for part in parts if part)


def sentence(result: Result) -> str:
    """Return a result as one line of text."""
    name, *rest = cells(result)
    return f"{name}: " + "; ".join(
        f"{head} {cell}" for head, cell in zip(HEAD[1:], rest, strict=True) if cell
    )


def cells(result: Result) -> list[str]:
    """Return a result's row of the table."""
    task = result["task"]
    if "missing" in result:
        return [task["name"], f"not run: {result['missing']}", *[""] * (len(HEAD) - 2)]
    scale = unit(result)
    seconds, least = result["seconds"] * scale, floor_seconds(result)
    spent = {name: s * scale for name, s in result.get("phases", {}).items()}
    shares = [
        f"{name} {figure(s)}" for name, s in sorted(spent.items(), key=lambda p: -p[1]) if s > seconds / 200
    ]
    if task.get("early"):
        shares.append(f"steps taken at most: {result['notes'].get('steps')}")
    held, weights = result["peak_bytes"], result["model_bytes"]
    return [
        task["name"],
        figure(seconds),
        figure(least and least * scale),
        figure(least and result["seconds"] / least),
        figure(total(result, "executed") / GIGA * scale) if result.get("executed") else "",
        figure(total(result, "floor") / GIGA * scale) if result.get("floor") else "",
        ", ".join(shares),
        figure(result.get("prepare_seconds")),
        f"{held / 2**30:.2f}",
        f"{(held - weights) / 2**30:.2f}",
    ]


def unit(result: Result) -> float:
    """Return how many of the things measured one by one a line is about."""
    return 1000.0 if result["task"]["kind"] == "statistics" else 1.0


def total(result: Result, what: str) -> float:
    """Return operations over all phases, executed or of the floor."""
    return sum(result[what].values())


def floor_seconds(result: Result) -> float | None:
    """Return the time the unavoidable operations take at the rate measured beside the workload."""
    return total(result, "floor") / result["rate"] if result.get("floor") else None


def figure(value: float | None) -> str:
    """Write a number with three significant digits, or nothing."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if abs(value) >= 0.001 or not value else f"{value:.2e}"


def goals(results: Sequence[Result]) -> Iterator[str]:
    """Compare the results of one shape with what is to be reached, a line each."""
    yield from _searches(results)
    yield from _descents(results)
    chain = pick(results, "edit", "alphaedit", sequential=True)
    if chain is not None:
        share = chain["phases"].get("solve", 0.0) / sum(chain["phases"].values())
        yield verdict(f"{chain['task']['name']}: share of all solves", share, 0.1)
    moments = pick(results, "statistics", "")
    if moments is None:
        return
    name, seconds = moments["task"]["name"], moments["seconds"]
    yield verdict(
        f"{name}: tokens/s over those of one whole pass a layer", moments["naive_seconds"] / seconds, 5.0,
        least=True,
    )  # fmt: skip
    if moments["apart_seconds"]:
        apart = figure(moments["apart_seconds"] / seconds)
        yield f"{name}: tokens/s over those of errata's own passes, one a layer: {apart}"
    yield f"{name}: {1 / seconds:,.0f} tokens/s"


def _descents(results: Sequence[Result]) -> Iterator[str]:
    """Compare the methods that descend on weights with passes of the host and with the plain way of MEMIT."""
    plain = pick(results, "naive", "memit")
    for batch in (1, 100):
        mine = pick(results, "edit", "keel", batch=batch)
        if mine is None:
            continue
        task = mine["task"]
        passes = total(mine, "executed") / mine["forward"]
        yield verdict(f"{task['name']}: operations in passes over one request", passes, 10)
        if batch == 100 and task["device"] == "cpu" and task["shape"] == "gpt2":
            here = 0.15 * REFERENCE_RATE * GIGA / mine["rate"]
            what = f"{task['name']}: CPU s an edit (0.15 at {REFERENCE_RATE:.0f} GFLOP/s)"
            yield verdict(what, mine["seconds"], here)
        if plain is not None:
            times = plain["seconds"] * plain["rate"] / (mine["seconds"] * mine["rate"])
            yield f"{task['name']}: {figure(times)} times as fast as memit plainly, one edit a batch"


def _searches(results: Sequence[Result]) -> Iterator[str]:
    """Compare the methods that search for values with their floors and with the plain way."""
    for method, ratio, seconds in (("memit", 1.6, 1.1), ("rome", None, 6.0)):
        mine, plain = pick(results, "edit", method), pick(results, "naive", method)
        if mine is None:
            continue
        task = mine["task"]
        if ratio:
            yield verdict(f"{task['name']}: times its floor", mine["seconds"] / floor_seconds(mine), ratio)
        if task["device"] == "cpu" and task["shape"] == "gpt2":
            here = seconds * REFERENCE_RATE * GIGA / mine["rate"]
            what = f"{task['name']}: CPU s an edit ({seconds} at {REFERENCE_RATE:.0f} GFLOP/s)"
            yield verdict(what, mine["seconds"], here)
        if plain is not None:
            # one solve serves all requests of a batch, in the plain way too
            spent = plain["seconds"] - plain["phases"].get("solve", 0.0) * (1 - 1 / task["batch"])
            times = spent * plain["rate"] / (mine["seconds"] * mine["rate"])
            work = total(plain, "executed") - plain["executed"].get("solve", 0.0) * (1 - 1 / task["batch"])
            yield (
                f"{task['name']}: {figure(times)} times as fast as plainly, with "
                f"{figure(work / total(mine, 'executed'))} times fewer operations"
            )


def pick(results: Sequence[Result], kind: str, method: str, **wanted: Any) -> Result | None:
    """Return the largest workload of a kind that ran with all its steps, or None."""
    fits = [
        result
        for result in results
        if "missing" not in result
        and result["task"]["kind"] == kind
        and result["task"]["method"] == method
        and not result["task"]["early"]
        and all(result["task"][name] == value for name, value in wanted.items())
    ]
    return max(fits, key=lambda result: result["task"]["count"], default=None)


def verdict(what: str, value: float, bound: float, *, least: bool = False) -> str:
    """Say whether a number is where it should be."""
    met = value >= bound if least else value <= bound
    sign = ">=" if least else "<="
    return f"{what}: {figure(value)} (goal {sign} {figure(bound)}: {'met' if met else 'missed'})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
