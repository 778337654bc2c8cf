"""The page: alone in the world, safe against what models say, and small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from errata.report.details import LONGEST, judging_protocols
from errata.report.page import document, page, write_page
from errata.report.read import read_run
from tests.browser import Browser, program
from tests.units.report.synthetic import NASTY, case_line, row, write_run, write_small


class Tags(HTMLParser):
    """Collects a document's tags and the text inside its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def parsed(text: str) -> Tags:
    found = Tags()
    found.feed(text)
    return found


def decoded(data: dict, cell: int) -> list[tuple]:
    """Read a cell's probes as the page does."""
    details = data["details"]
    strings = [*details["strings"], None]  # -1 is none
    found = []
    for name, edits, listed, texts, marks, extra in details["cells"][cell]["cases"]:
        for i, place in enumerate(details["lists"][listed]):
            kind, prompt, answers, before, changes, mark = details["probes"][place]
            scores = {}
            for digit, protocol in enumerate(judging_protocols()):
                pair = tuple(m // 3**digit % 3 for m in (mark, marks[i]))
                if any(pair):
                    scores[protocol] = tuple({0: None, 1: 0.0, 2: 1.0}[p] for p in pair)
            for j in range(0, len(extra), 4):
                if extra[j] == i:
                    scores[strings[extra[j + 1]]] = (extra[j + 2], extra[j + 3])
            found.append((strings[name], edits, strings[kind], strings[prompt], tuple(strings[a] for a in answers),
                          strings[before], strings[texts[i]], bool(changes), scores))  # fmt: skip
    return found


def test_packing_loses_nothing(run):
    cell = next(c for c in run.cells if c.method == "memit" and c.sequence)
    data = json.loads(json.dumps(document([run])))
    entry = next(e for board in data["boards"] for e in board["entries"] if e["id"] == cell.id)
    wanted = [
        (asked.case, asked.edits, a.kind, a.prompt, a.answers, a.text_before, a.text_after, a.changes,
         {p: s if p in judging_protocols() else tuple(float(f"{v:.3g}") for v in s) for p, s in a.scores.items()})
        for asked in cell.case_answers() for a in asked.answers
    ]  # fmt: skip
    assert decoded(data, entry["details"]) == wanted


def test_what_models_say_is_never_markup(run):
    text = page([run])
    found = parsed(text)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert not [tag for tag, _ in found.tags if tag in ("img", "b")]
    held, program = found.scripts
    assert "<" not in held and ">" not in held
    assert NASTY in json.loads(held)["details"]["strings"]
    assert "innerHTML" not in program and "document.write" not in program and "eval(" not in program


def test_names_of_runs_are_escaped(tmp_path):
    lines = [case_line("a", row("a", "efficacy", "p", 1.0))]
    place = write_small(
        tmp_path / "run", [{"method": "<i>x</i>", "lines": lines}], name="</title><script>@@DATA@@"
    )
    text = page([read_run(place)])
    assert [tag for tag, _ in parsed(text).tags].count("script") == 2
    assert "&lt;i&gt;x" in text and "<i>x" not in text


def test_nothing_is_fetched(run):
    text = page([run])
    for tag, attributes in parsed(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "src" not in attributes and not attributes.get("href", "#").startswith("http")
    program = parsed(text).scripts[1].replace("http://www.w3.org/2000/svg", "")
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"https?:|fetch\(|XMLHttp|import\(", program)
    assert not re.search(r"url\(|@import|@font-face", style)
    assert "default-src 'none'" in text


def test_size_of_many_probes(tmp_path):
    place = write_run(tmp_path / "run", methods=("rome", "memit", "emmet"), cases=100, absent=False)
    written = write_page(tmp_path / "page.html", [read_run(place)])
    bare = len(page([read_run(place)], cases=0).encode())
    # 30 cells of 100 cases of 20 probes are to stay under 8 MB: 267 kB a cell at most
    assert (written.stat().st_size - bare) / 3 < 250_000
    assert bare < 120_000


def test_only_so_many_cases_and_characters_are_held(tmp_path):
    long = {**row("a", "efficacy", "p", 1.0)}
    long["detail"] = {**long["detail"], "text_after": "x" * 5000}
    lines = [case_line("a", long), case_line("b", row("b", "efficacy", "p", 1.0))]
    run = read_run(write_small(tmp_path / "run", [{"method": "rome", "lines": lines}]))
    details = document([run], cases=1)["details"]
    assert details["cells"][0]["total"] == 2 and len(details["cells"][0]["cases"]) == 1
    assert max(map(len, details["strings"])) == LONGEST
    assert document([run], cases=0)["boards"][0]["entries"][0]["details"] is None


def test_generation_that_was_not_asked_is_no_text(tmp_path):
    forced = {**row("a", "efficacy", "p", 1.0), "protocol": "teacher_forced", "detail": {"changes": True}}
    run = read_run(write_small(tmp_path / "run", [{"method": "rome", "lines": [case_line("a", forced)]}]))
    data = document([run])
    assert decoded(data, 0)[0][5:7] == (None, None)
    assert data["boards"][0]["kinds"] == [] and data["boards"][0]["entries"][0]["headline"] is None
    assert "no headline" in data["boards"][0]["explained"]


def test_infinite_numbers_have_names(run):
    text = json.dumps(document([run]), allow_nan=False)
    assert "Infinity" not in text


def test_an_empty_run_has_a_page(tmp_path):
    text = page([read_run(write_small(tmp_path / "run", []))])
    assert json.loads(parsed(text).scripts[0])["boards"] == []


def test_reports_load_neither_torch_nor_transformers(folder, tmp_path):
    code = (
        "import sys; from errata.report.read import read_runs; from errata.report import page, card, board;"
        f"runs = read_runs([{str(folder)!r}]); page.write_page({str(tmp_path / 'p.html')!r}, runs); card.card(runs);"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LONG = "zsre/alt@/srv/data/collections/zsre_mend_train-10k-of-all-questions-and-answers.json:12"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def texts(tab: Browser, selector: str) -> list[str]:
    """Return the texts of some elements of a page."""
    return tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(one => one.innerText.trim())")


def choose(tab: Browser, place: int, value: str) -> None:
    """Choose an option of one of the lists above the cases."""
    tab.run(
        f"(() => {{ const one = document.querySelectorAll('#cases select')[{place}]; one.value = '{value}'; "
        "one.dispatchEvent(new Event('change')); })()"
    )


@pytest.mark.slow
@pytest.mark.skipif(program() is None, reason="no Chromium; tests/units/serve/chromium.sh installs it")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, False)])
def test_in_a_browser(run, tmp_path, width, dark):
    path = write_page(tmp_path / "page.html", [run])
    path.write_text(path.read_text("utf-8").replace("lab:6", LONG), "utf-8")
    tab = Browser(tmp_path / "profile", width=width, dark=dark)
    try:
        tab.call("Page.navigate", url=path.as_uri())
        tab.wait("document.readyState === 'complete' && document.getElementById('cases') !== null")
        assert tab.run("window.hacked === undefined") and LONG in tab.run("document.body.innerText")
        assert tab.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
        )
        tab.run("document.querySelectorAll('#protocol .choice')[1].click()")
        tab.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert tab.run(OVERFLOW) == 0, "no wider than its window, whatever the names"
        assert tab.run("document.querySelectorAll('#curves figure svg').length") == 4
        tab.run("document.querySelector('#board [data-sort=efficacy]').click()")
        assert texts(tab, "#board th[aria-sort='descending']")[0].startswith("Efficacy")
        column = 1 + texts(tab, "#board thead tr:last-child th").index("Efficacy ↓".rstrip(" ↓"))
        values = texts(tab, f"#board tbody:not(.base) td:nth-child({column}) .value")
        assert values == sorted(values, key=float, reverse=True) and len(values) == 2
        scrolled_away = (
            "[...document.querySelectorAll('.scroll')].map(one => { one.scrollLeft = 200; "
            "const name = one.querySelector('tbody th:first-child'); "
            "return name ? name.getBoundingClientRect().left - one.getBoundingClientRect().left : 0; })"
        )
        assert all(0 <= left < 12 for left in tab.run(scrolled_away)), "methods stay while tables scroll"
        choose(tab, 1, "-1")
        assert not texts(tab, "#cases td[data-label='Before'] .wrong"), "in colour after the edit alone"
        assert (
            "same subject" in texts(tab, "#cases select")[2] and "same_subject" not in texts(tab, "#cases")[0]
        )
        choose(tab, 3, "wrong")
        verdicts = texts(tab, "#cases td[data-label='After'] .verdict")
        assert verdicts and all("wrong" in verdict for verdict in verdicts)
        tab.run("document.getElementById('theme').click(); document.getElementById('theme').click()")
        assert tab.run("document.documentElement.dataset.theme") == "dark"
        assert "[object" not in texts(tab, "main")[0]
        assert tab.problems() == [] and tab.requested() == {path.as_uri()}
    finally:
        tab.close()
