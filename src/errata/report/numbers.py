"""Format numbers for people: per cent, seconds, bytes, with significant digits only."""

from __future__ import annotations

import math

from errata.evaluation.metrics import Metric, metric_of
from errata.report.measure import Measure

NONE = "–"


def metric(protocol: str) -> Metric:
    """Return the metric of a protocol; a judge's protocol has the form ``judge by MODEL ...``."""
    return metric_of(protocol.partition(" by ")[0])


def is_share(protocol: str) -> bool:
    """Whether a protocol's scores lie between 0 and 1 and are shown in per cent."""
    return metric(protocol).unit == "share"


def percent(value: float | None, digits: int = 1) -> str:
    """Show a share as per cent without the sign: 0.9643 is "96.4"."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{100 * value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def plain(value: float | None) -> str:
    """Show a number with three significant digits, without an exponent where it is readable."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def seconds(value: float | None) -> str:
    """Show a time: "41 ms", "0.85 s", "3 min 20 s", "2 h 05 min"."""
    if value is None or not math.isfinite(value):
        return NONE
    if value < 0.1:
        return f"{1000 * value:.0f} ms"
    if value < 10:
        return f"{value:.2f} s"
    whole_seconds = round(value)
    if whole_seconds < 120:
        return f"{whole_seconds} s"
    if whole_seconds < 7200:
        return f"{whole_seconds // 60} min {whole_seconds % 60:02d} s"
    return f"{whole_seconds // 3600} h {whole_seconds % 3600 // 60:02d} min"


def size(value: float | None) -> str:
    """Show a number of bytes: "138.8 kB"."""
    if value is None or not math.isfinite(value):
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def share(measure: Measure | None, *, brief: bool = False, signed: bool = False) -> str:
    """Show a share with its interval: "96.4 [93.1, 98.8]"; brief: "96.4 93-99"."""
    if measure is None:
        return NONE
    plus = "+" if signed and measure.value > 0 else ""
    text = plus + percent(measure.value)
    if measure.low is None or measure.high is None:
        return text
    if brief and not signed:
        ends = f"{percent(measure.low, 0)}-{percent(measure.high, 0)}"
        return text if measure.low == measure.high else f"{text} {ends}"
    return f"{text} [{percent(measure.low)}, {percent(measure.high)}]"


def value(measure: Measure | None, protocol: str) -> str:
    """Show a measure in its protocol's unit, without its interval."""
    if measure is None:
        return NONE
    return percent(measure.value) if is_share(protocol) else plain(measure.value)


def quantity(measure: Measure | None, protocol: str, *, brief: bool = False) -> str:
    """Show a measure in its protocol's unit."""
    if measure is None:
        return NONE
    if is_share(protocol):
        return share(measure, brief=brief)
    text = plain(measure.value)
    if measure.low is None or measure.high is None or brief:
        return text
    return f"{text} [{plain(measure.low)}, {plain(measure.high)}]"
