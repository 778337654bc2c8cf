"""Texts in pictures: prompts, names and answers with dollar signs are drawn as they are."""

from __future__ import annotations

import pytest

from errata.report.bars import write_discovery, write_sources
from errata.report.detection import write_detection
from errata.report.grid import write_reading, write_scope
from errata.report.heatmap import write_heatmap

TEXT = "$a_{b$ or $5"
"""No formula that can be read."""

TRACED = {
    "prompt": TEXT, "answer": TEXT, "tokens": [TEXT, "x"], "subject_tokens": [0], "positions": [0, 1], "layers": 2,
    "deviation": 0.1, "draws": 1, "clean": 0.9, "corrupted": 0.1, "total_effect": 0.8, "window": 1,
    "maps": {"hidden": {"effect": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}},
}  # fmt: skip
SOURCES = {
    "prompt": TEXT, "answer": "x", "method": "bm25",
    "sources": [{"score": 1.0, "text": TEXT}, {"score": 2.0, "text": "b"}],
}  # fmt: skip
FOUND = {
    "model": TEXT, "against": None, "verdict": "no trace", "threshold": 6.0, "subjects": [{"name": TEXT, "ratio": 2.0}],
    "traces": [{"weight": TEXT, "shape": 1.0, "fall": 1.0, "carried": None}],
}  # fmt: skip
READ = {"prompt": TEXT, "probability": [[0.5], [0.9]], "top": [["$5"], [TEXT]], "tokens": [TEXT]}
SCOPE = {
    "answer": {"token": TEXT}, "source": TEXT, "target": TEXT, "probability": [[0.5], [0.9]], "texts": [["$5"], [TEXT]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("write", "document"),
    [(write_heatmap, TRACED), (write_sources, SOURCES), (write_detection, FOUND), (write_reading, READ),
     (write_scope, SCOPE)],
)  # fmt: skip
def test_dollar_signs_are_no_formulas(write, document, tmp_path):
    drawn = write(tmp_path / "a.svg", document).read_text(encoding="utf-8")
    assert TEXT in drawn and "\\$" not in drawn


def test_powers_on_logarithmic_axes_still_are(tmp_path):
    document = {
        "model": TEXT, "texts": 2,
        "discovered": [{"prefix": 4, "suffix": 4, "within": {"1": 0.0, "10": 0.1, "100": 0.2, "1000": 0.4}}],
    }  # fmt: skip
    drawn = write_discovery(tmp_path / "a.svg", document).read_text(encoding="utf-8")
    assert TEXT in drawn and "mathdefault{10^{2}}" in drawn
    assert write_discovery(tmp_path / "b.svg", document).read_text(encoding="utf-8") == drawn
