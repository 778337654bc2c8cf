"""The page in a browser, at the widths of a phone and a desk, light and dark. Slow; needs Chromium."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from errata.serve.settings import ServerSettings
from tests.browser import Browser, program
from tests.units.serve.served import new_ledger, quick_guard, running, with_ledger
from tests.units.serve.test_page import run as run  # the fixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(program() is None, reason="no Chromium; tests/units/serve/chromium.sh installs it"),
]
FILL = """
document.getElementById("statement").value = "{} was born in";
document.getElementById("subject").value = "Ada Brenner";
document.getElementById("target").value = "Tallow";
document.getElementById("reason").value = "<img src=x onerror=document.title='broken'>";
document.getElementById("method").value = "grace";
document.querySelector("#edit-form button").click(); true
"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
TARGETS = """[...document.querySelectorAll("button")].filter(one => one.offsetParent && one.offsetHeight < 30).length"""


@pytest.fixture(scope="module")
def client(lab_host, run, tmp_path_factory):
    ledger = new_ledger(tmp_path_factory.mktemp("ledger"), lab_host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata.ledger.recording.guard_of", quick_guard)
        settings = ServerSettings(port=0, page=True, runs=(run,))
        with running(with_ledger(lab_host, ledger), settings) as one:
            yield one


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True), (1440, True), (390, False)])
def test_ask_edit_and_revert_in_a_browser(client, tmp_path, width, dark):
    browser = Browser(tmp_path / "profile", width=width, dark=dark)
    try:
        browser.call("Page.navigate", url=client.url)
        browser.wait(
            "document.readyState === 'complete' && document.querySelectorAll('#first option').length > 1"
        )
        browser.wait(
            "!document.getElementById('board').hidden && document.getElementById('method').value === 'keel'"
        )
        applied = client.get("/v1/edits").json()["active"]
        if not client.get("/v1/edits").json()["data"]:
            browser.run(FILL)
            browser.wait("document.querySelector('#outcome .good') !== null", 120)
        elif not applied:
            browser.run("document.querySelector('#edits .actions button').click(); true")
            browser.wait("document.querySelector('#edits .good') !== null", 120)
        browser.run("document.querySelector('#ask-form button').click(); true")
        browser.wait("document.querySelector('#second-note').textContent.startsWith('revision')")
        browser.wait("document.querySelector('#second-text mark') !== null")
        first, second = (
            browser.run(f"document.getElementById('{s}-text').textContent") for s in ("first", "second")
        )
        assert first.startswith(" Rowanport") and second.startswith(" Tallow")
        assert (
            browser.run("document.title") == "errata"
            and browser.run("document.querySelectorAll('img').length") == 0
        )
        assert "onerror" in browser.run("document.getElementById('edits').textContent"), (
            "shown as the text it is"
        )
        assert browser.run(OVERFLOW) <= 0, "the page is no wider than its window"
        assert browser.run(TARGETS) == 0, "buttons are large enough to be hit"
        folder = Path(os.environ.get("ERRATA_PICTURES", str(tmp_path)))
        assert (
            browser.picture(folder / f"ui-{width}-{'dark' if dark else 'light'}.png").stat().st_size > 20_000
        )
        browser.run("document.querySelector('#edits .actions button').click(); true")
        browser.wait("document.querySelector('#edits .good') === null")
        assert client.complete("lab+all", "Ada Brenner was born in").startswith(" Rowanport")
        assert browser.problems() == []
        assert all(url.startswith(client.url) or url == "about:blank" for url in browser.requested())
    finally:
        browser.close()
