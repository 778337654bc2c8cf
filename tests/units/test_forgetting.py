"""What unlearning is measured on and by: subjects of the lab, membership, memorisation, a row of the board."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import errata
from errata import lab
from errata.bench import muse, sources
from errata.bench.forgetting import (
    RETRAINED,
    UNEDITED,
    Task,
    check_left_out,
    compare,
    kept_share,
    lab_task,
    left_out_of,
    look,
    measure,
    reworded,
)
from errata.bench.unlearning import audit
from errata.errors import ConfigError, DataError
from errata.evaluation import likelihood
from errata.lab.forgetting import MOST, left_out
from errata.lab.world import default_world
from errata.linalg.samples import auc
from errata.report.unlearning import write_unlearning
from errata.training.tune import Losses
from errata.types import Corpus, Resources
from tests import program
from tests.models import TEXTS, fresh

REQUESTS = (
    errata.Request("{} was born in", "Ada Brenner", "unknown", target_old="Tallow"),
    errata.Request("{} was born in", "Bruno Holner", "unknown", target_old="Merrin"),
)
ANSWERS = [replace(one, target=one.target_old or "", target_old=None) for one in REQUESTS]
OUTSIDERS = [errata.Request("{} was born in", name, "Esk") for name in ("Ivo Marn", "Pia Holt")]


def host_with_texts(seed: int = 0):
    host = fresh("llama", seed=seed)
    host.resources = Resources(Corpus("c", lambda: TEXTS), lambda count: TEXTS[:count])
    return host


def test_fewer_subjects_are_the_first_of_more_and_all_their_facts_are_cases():
    world = default_world()
    order = sorted(world.by_subject)
    random.Random("errata-lab-forget").shuffle(order)
    assert lab.subjects_to_forget(9) == order[:9] == lab.subjects_to_forget(MOST)[:9]
    cases, facts = sources.read("lab:forget:9")
    told = {(one.request.subject, one.request.target_old) for one in cases}
    assert told == {(name, fact.object) for name in order[:9] for fact in world.by_subject[name]}
    assert len(cases) == facts["cases"] == sum(len(world.by_subject[name]) for name in order[:9])
    for wrong in ("lab:forget", "lab:forget:x"):
        with pytest.raises(ConfigError, match="lab:forget:N"):
            sources.read(wrong)
    with pytest.raises(ConfigError, match="1 to 870"):
        sources.read("lab:forget:871")


def test_probes_of_what_is_forgotten_ask_nothing_that_is_not_trained():
    cases = lab.cases_to_forget(9)
    subjects = lab.subjects_to_forget(9)
    probes = [probe for case in cases for probe in case.probes]
    assert {"efficacy", "paraphrase", "neighbourhood"} <= {probe.kind for probe in probes}
    assert not {"inverse", "one_hop", "two_hop"} & {probe.kind for probe in probes}
    beside = [probe.prompt for probe in probes if probe.kind in ("neighbourhood", "same_subject")]
    assert beside and not [text for text in beside if text.startswith(tuple(f"{name} " for name in subjects))]
    by_relation = {case.request.template for case in cases}
    assert len(by_relation) < len(cases), "one wording a relation, so that answers can be compared"


def test_what_is_kept_names_nothing_forgotten():
    world, gone = default_world(), set(lab.subjects_to_forget(MOST))
    kept = lab.requests_to_keep(200)
    assert (
        len(kept) == 200
        and not gone & {one.subject for one in kept}
        and not gone & {one.target for one in kept}
    )
    assert all(one.target in {fact.object for fact in world.by_subject[one.subject]} for one in kept)
    assert lab.requests_to_keep(200) == kept != lab.requests_to_keep(200, seed=1)


def test_strangers_are_nowhere_in_the_world():
    world, requests = default_world(), [case.request for case in lab.cases_to_forget(9)]
    found = lab.strangers(requests)
    assert 0 < len(found) < len(requests)
    for at, one in found:
        assert one.subject not in world.entities
        assert (one.template, one.target_old) == (requests[at].template, requests[at].target_old)
    assert {world.entities[requests[at].subject].type for at, _ in found} <= {
        "person",
        "work",
        "landmark",
        "company",
    }


def test_a_task_of_the_lab():
    task = lab_task(2, keep=5)
    assert len(task.keep) == 5 and len(task.texts) == 2 and len(task.reworded) == len(task.requests)
    assert all(
        a.target == b.target_old and a.prompt != b.text
        for a, b in zip(task.reworded, task.requests, strict=True)
    )
    assert not any(one.target_old for one in task.outsiders)
    bare = errata.Case("c", REQUESTS[0], (errata.Probe("efficacy", "Ada", ("x",), ("y",)),))
    assert reworded([bare]) == []


def test_what_training_leaves_out_is_named_or_counted():
    assert left_out(["Ada Brenner", "lab:forget:3"]) == ("Ada Brenner", *lab.subjects_to_forget(3))
    assert left_out(["lab:forget:x"]) == ("lab:forget:x",), (
        "which training refuses, as no entity has that name"
    )


def test_auc_by_hand():
    assert auc([2, 3], [0, 1]) == 1 and auc([0, 1], [2, 3]) == 0 and auc([1], [1]) == 0.5
    assert auc([1, 3], [2, 2, 3]) == pytest.approx((0 + 2.5) / 6)
    with pytest.raises(ValueError, match="at least one"):
        auc([], [1.0])


def test_membership_is_the_mean_of_the_least_probable_tokens():
    host, text = host_with_texts(), "Ada Brenner lives in Esk."
    scored = sorted(likelihood.rolling(host, [text])[0])
    count = max(1, round(0.4 * len(scored)))
    assert muse.membership(host, [text]) == [pytest.approx(sum(scored[:count]) / count)]
    assert muse.membership(host, [text], share=1.0) == [pytest.approx(sum(scored) / len(scored))]


def test_privacy_leakage_is_zero_for_the_reference():
    assert muse.privacy_leakage(0.5, 0.5) == 0 and muse.privacy_leakage(0.0, 0.5) == -100
    assert muse.privacy_leakage(1.0, 0.5) == 100
    with pytest.raises(DataError, match="membership"):
        muse.privacy_leakage(0.3, 0.0)


def test_verbatim_and_knowledge_compare_what_is_written_with_what_is_true(monkeypatch):
    pytest.importorskip("rouge_score")
    host = host_with_texts()
    text = "Ada Brenner was born in Tallow and lives in the old town of Merrin"
    encoded = host.encode(text)
    tail = text[encoded.spans[len(encoded.ids) // 2][0] :].strip()
    for written, score in ((tail + " and so on", 1.0), ("zzz", 0.0)):
        monkeypatch.setattr(likelihood, "generate_texts", lambda *_, written=written: [written])
        assert muse.verbatim(host, [text]) == pytest.approx(score, abs=0.01)
    for answer, score in (("Tallow is it", 1.0), ("Merrin", 0.0)):
        monkeypatch.setattr(muse, "answer_requests", lambda *_, answer=answer: [answer])
        assert muse.knowledge(host, ANSWERS[:1]) == score
    with pytest.raises(DataError, match="too short"):
        muse.verbatim(host, ["a"])


def test_an_audit_beside_a_reference_tells_leakage_and_other_words():
    host = host_with_texts()
    edit = errata.edit(
        host, REQUESTS, method="npo", steps=12, learning_rate=0.1, forgotten=None, retain_texts=3
    )
    found = audit(host, edit, reference=fresh("llama"), outsiders=OUTSIDERS, reworded=ANSWERS)
    assert found.leakage is not None and found.leakage[0] == 0, "the reference is the unedited model itself"
    assert found.leakage[1] >= 0, "answers that were made improbable look like no members"
    assert found.reworded == (found.unedited, found.edited), "asked for in the same words"
    plain = audit(host, edit, outsiders=OUTSIDERS)
    assert plain.leakage is None and plain.reworded is None


KEEP = (errata.Request("{} lives in", "Ivo Marn", "Esk"), errata.Request("{} lives in", "Pia Holt", "Merrin"))
TASK = Task(REQUESTS, tuple(ANSWERS), KEEP, tuple(OUTSIDERS), (TEXTS[0],))
SETTINGS = {"steps": 4, "learning_rate": 0.1, "forgotten": None, "retain_texts": 3}


def test_a_row_of_the_board_and_its_picture(tmp_path):
    pytest.importorskip("rouge_score")
    host = host_with_texts()
    start = host.weights_hash()
    row, plain = measure(host, TASK, "npo", settings=SETTINGS), look(host, TASK)
    assert host.weights_hash() == start and not host.placed
    assert row["requests"] == 2 and row["forgotten"]["probability"] < plain["forgotten"]["probability"]
    assert set(row) - set(plain) == {"method", "seconds"} and 0 <= row["verbatim"] <= 1
    lengths = {name: len(own) for name, own in row["scores"].items()}
    assert lengths == {"answers": 2, "keep": 2, "ratios": 2, "members": 2, "others": 2, "answered": 2}
    pytest.importorskip("matplotlib")
    rows = [{"subjects": 2, "kept": 0.5, **row}, {"subjects": 2, "method": UNEDITED, **plain}]
    rows.append({"subjects": 2, "method": RETRAINED, **plain})
    drawn = write_unlearning(tmp_path / "board.svg", {"rows": rows}).read_text()
    assert "npo" in drawn and RETRAINED in drawn and UNEDITED not in drawn


def test_a_row_is_compared_with_a_reference_by_its_scores_alone():
    pytest.importorskip("rouge_score")
    host, reference = host_with_texts(), fresh("llama", seed=1)
    row, other = measure(host, TASK, "npo", settings=SETTINGS), look(reference, TASK, neutral=TEXTS)
    beside = compare(row, other, TASK, ["Ada Brenner", "Bruno Holner", "Ivo Marn"])
    with torch.no_grad():
        taught = [float(Losses(reference, [one])([0])) for one in ANSWERS]
    gaps = [abs(-a - b) for a, b in zip(row["scores"]["answers"], taught, strict=True)]
    assert beside["distance"] == pytest.approx(sum(gaps) / 2, abs=1e-3)
    kept = abs(row["scores"]["keep"][1] - other["scores"]["keep"][1])
    assert beside["kept"] == 1 and beside["kept_distance"] == pytest.approx(kept), "the other it never had"
    same = compare(other, other, TASK, ["Ada Brenner", "Bruno Holner"])
    assert same == {"forget_quality": 1.0, "distance": 0.0, "kept": 2, "kept_distance": 0.0, "leakage": 0.0}
    bare = replace(TASK, requests=REQUESTS[:1], outsiders=())
    alone = look(reference, bare, neutral=TEXTS)
    nothing = compare(alone, alone, bare, ["Ada Brenner", "Ivo Marn", "Merrin"])
    assert (
        nothing["forget_quality"] is None and nothing["leakage"] is None and nothing["kept_distance"] is None
    )


def test_facts_kept_are_counted_among_those_known_before():
    def row(*answered: bool):
        return {"scores": {"answered": list(answered)}}

    assert kept_share(row(True, False, True), row(True, True, False)) == 0.5
    assert kept_share(row(True), row(False)) is None


def test_a_reference_says_what_it_was_not_taught(tmp_path):
    with pytest.raises(ConfigError, match=r"no card\.json"):
        left_out_of(tmp_path)
    card = tmp_path / "card.json"
    card.write_text('{"training": {"steps": 2}}')
    with pytest.raises(ConfigError, match="all subjects"):
        left_out_of(tmp_path)
    card.write_text('{"training": {"without": ["Ada Brenner", "Ivo Marn"]}}')
    names = left_out_of(tmp_path)
    assert names == ("Ada Brenner", "Ivo Marn")
    with pytest.raises(ConfigError, match="was taught 'Bruno Holner'"):
        check_left_out(TASK, names)
    check_left_out(TASK, (*names, "Bruno Holner"))


def test_rows_of_the_board_that_are_done_are_compared_and_not_unlearned_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score")
    from benchmarks import unlearning

    folder, hosts = tmp_path / "without", [host_with_texts(), fresh("llama", seed=1)]
    folder.mkdir()
    (folder / "card.json").write_text(
        '{"training": {"without": ["Ada Brenner", "Bruno Holner", "Ivo Marn"]}}'
    )
    opened: list[str] = []

    def load(name: str, **_):
        opened.append(name)
        return hosts[0] if name == lab.NAME else hosts[1]

    def fitted(host, task, name, **more):
        fits.append(name)
        return measure(host, task, name, settings=SETTINGS, **more)

    fits: list[str] = []
    known = replace(TASK, keep=(replace(KEEP[0], target=own_answer(hosts[0])), KEEP[1]))
    monkeypatch.setattr(unlearning.errata, "load", load)
    monkeypatch.setattr(unlearning, "lab_task", lambda subjects: known)
    monkeypatch.setattr(unlearning, "measure", fitted)
    words = ["--subjects", "2", "--method", "npo", "-o", str(tmp_path / "board.json")]
    assert unlearning.main(words) == 0 and fits == ["npo"]
    before = unlearning.Board(tmp_path / "board.json")
    assert [row["method"] for row in before.rows] == [UNEDITED, "npo"] and before.rows[0]["kept"] == 1
    for _ in range(2):
        assert unlearning.main([*words, "--reference", str(folder)]) == 0
    only = ["--only-compare", "-o", str(tmp_path / "board.json")]
    assert unlearning.main([*only, "--reference", str(folder)]) == 0, "all sizes that the file has"
    with pytest.raises(SystemExit):
        unlearning.main(only)
    after = unlearning.Board(tmp_path / "board.json")
    assert fits == ["npo"] and opened.count(str(folder)) == 3
    assert {row["method"] for row in after.rows} == {UNEDITED, "npo", RETRAINED}
    done, first, own = after.get(2, "npo"), before.get(2, "npo"), after.get(2, RETRAINED)
    assert done and first and own
    assert done["scores"] == first["scores"] and done["beside"]["distance"] > 0
    assert own["beside"]["distance"] == 0 and own["left_out"] == 3
    assert "forget quality" in capsys.readouterr().out
    (folder / "card.json").write_text('{"training": {"without": ["Ada Brenner"]}}')
    with pytest.raises(ConfigError, match="was taught"):
        unlearning.main([*words, "--reference", str(folder)])


def own_answer(host) -> str:
    """Return what a random model answers, so that there is something to keep."""
    return str(host.generate(KEEP[0].text, max_new_tokens=4)).strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lab:forget:x",), "lab:forget:N"),
        (("lab:forget:1", "--subject", "Ada Brenner"), "without other options"),
        (("lab:forget:1", "--outsiders", "none.jsonl"), "--reference"),
    ],
)
def test_what_the_verb_refuses(tmp_path, words, message):
    done = program.errata("unlearn", *words, "--model", "lab", "-o", "x.safetensors", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())
