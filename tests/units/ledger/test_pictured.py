"""A ledger of edits about pictures asks their requests again, after the image files are gone and by a new host."""

from __future__ import annotations

from pathlib import Path

import pytest

import errata
from errata.data.pictures import read_picture
from errata.errors import LedgerError
from errata.evaluation.check import answer_requests
from errata.host.host import Host
from errata.ledger import folders
from errata.ledger.contents import PICTURES, facts_of, keep, load_edit
from errata.ledger.working import Working, earlier_requests
from errata.types import Request
from tests import pictures
from tests.units.ledger.small import add, of_host

NAMES = ("red", "blue")


def opened() -> Host:
    model, processor = pictures.model("llava")
    host = errata.load(model, processor)
    assert isinstance(host, Host)
    return host


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, str]:
    """A ledger's folder with an edit in place about two pictures, whose files are gone, and its digest."""
    for name in NAMES:
        (tmp_path / f"{name}.png").write_bytes(pictures.picture(name, 56).data or b"")
    first, second = (read_picture(tmp_path / f"{name}.png") for name in NAMES)
    request = Request("Is {} older than <image>?", "<image>", "Merrin", image=first, more_images=(second,))
    host = opened()
    edit = errata.edit(host, [request, Request("Ada lives in", "Ada", "Esk")], method="ft", steps=2)
    ledger = of_host(tmp_path / "ledger", host)
    add(ledger, edit)  # type: ignore[arg-type]
    for name in NAMES:
        (tmp_path / f"{name}.png").unlink()
    return ledger.folder, edit.digest


def test_earlier_requests_are_asked_with_their_pictures(recorded):
    folder, digest = recorded
    host = opened()
    working = Working(folders.find(folder), host)
    asked = earlier_requests(working, [digest])
    assert [len(one.pictures) for one in asked] == [2, 0]
    assert [picture.data for picture in asked[0].pictures] == [
        pictures.picture(name, 56).data for name in NAMES
    ]
    with working.showing([digest]):
        assert len(answer_requests(working.host, asked)) == 2
    edit = load_edit(working.ledger, digest)
    assert edit.digest == digest and b"PNG" not in working.ledger.file(digest).read_bytes()
    other = of_host(folder.parent / "other", host)  # as a merge brings an edit into another ledger
    other.append("proposed", edit=digest, body=facts_of(edit, keep(other, edit), ()))
    assert load_edit(other, digest).provenance.requests == edit.provenance.requests
    assert sorted(path.name for path in (other.folder / PICTURES).iterdir()) == sorted(
        picture.sha256 for picture in asked[0].pictures
    )


def test_a_picture_that_was_changed_is_refused_by_name(recorded):
    folder, digest = recorded
    file = next((folder / PICTURES).iterdir())
    file.write_bytes(pictures.picture("green", 56).data or b"")
    with pytest.raises(LedgerError, match=f"{file.name} was changed"):
        load_edit(folders.find(folder), digest)
    file.unlink()  # as in a copy without pictures: the edit is there, its request cannot be asked
    assert load_edit(folders.find(folder), digest).digest == digest
