"""The page: alone in the world, safe against what models say, and small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from errata.report.details import LONGEST, judging_protocols
from errata.report.page import document, page, write_page
from errata.report.read import read_run
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


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync.sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=found, args=options)
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(browser, run, tmp_path, width):
    path = write_page(tmp_path / "page.html", [run])
    tab = browser.new_page(viewport={"width": width, "height": 800})
    errors: list[str] = []
    asked: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.locator("#protocol .choice").nth(1).click()
    assert tab.locator("#curves figure svg").count() == 4
    tab.locator("#board [data-sort='efficacy']").click()
    assert tab.locator("#board th[aria-sort='descending']").inner_text().startswith("efficacy")
    shown = [
        float(t) for t in tab.locator("#board tbody:not(.base) td:nth-child(4) .value").all_inner_texts()
    ]
    assert shown == sorted(shown, reverse=True) and len(shown) == 2
    tab.locator("#cases select").nth(1).select_option("-1")
    tab.locator("#cases select").nth(3).select_option("wrong")
    verdicts = tab.locator("#cases td[data-label='After'] .verdict").all_inner_texts()
    assert verdicts and all("wrong" in verdict for verdict in verdicts)
    tab.locator("#theme").click(click_count=2)
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    assert "[object" not in tab.locator("main").inner_text()
    assert errors == [] and asked == [path.as_uri()]
