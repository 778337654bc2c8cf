"""The job table: leases, heartbeats, takeovers; and journals that survive a torn line."""

from __future__ import annotations

import os
import socket
import time

import pytest

from errata.bench.jobs import MOST_ATTEMPTS, Jobs, Lease, LeaseLost, new_owner
from errata.bench.results import Journal, row_of
from errata.errors import DataError


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def jobs(tmp_path, clock):
    table = Jobs(tmp_path / "jobs.sqlite", lease=60, clock=clock)
    table.create(["a", "b", "c"])
    return table


def states(jobs: Jobs) -> dict[str, str]:
    return {job.cell: job.state for job in jobs.all()}


def test_a_cell_is_taken_once_and_in_order(jobs):
    assert [jobs.take(f"w{i}", ["b", "c", "a"]) for i in range(4)] == ["a", "b", "c", None]
    jobs.end("b", "w1", "done")
    jobs.end("c", "w2", "refused", "not today")
    assert states(jobs) == {"a": "leased", "b": "done", "c": "refused"}
    assert [job.reason for job in jobs.all()] == [None, None, "not today"]
    jobs.create(["a", "b", "c"])
    assert states(jobs)["b"] == "done", "making the table again changes nothing"


def test_only_some_cells_are_taken(jobs):
    assert jobs.take("w", ["c"]) == "c" and jobs.take("w", ["c"]) is None


def test_an_expired_lease_is_taken_over_and_its_old_owner_is_told(jobs, clock):
    assert jobs.take("slow", ["a"]) == "a"
    clock.now += 59
    assert jobs.take("other", ["a"]) is None
    assert jobs.renew("a", "slow")
    clock.now += 59
    assert jobs.take("other", ["a"]) is None, "renewed"
    clock.now += 2
    assert jobs.take("other", ["a"]) == "a"
    assert not jobs.renew("a", "slow")
    with pytest.raises(LeaseLost):
        jobs.end("a", "slow", "done")
    jobs.end("a", "other", "done")


def test_what_kills_every_worker_is_given_up(jobs, clock):
    for _ in range(MOST_ATTEMPTS):
        assert jobs.take("w", ["a"]) == "a"
        clock.now += 61
    assert jobs.take("w", ["a", "b"]) == "b"
    job = jobs.all()[0]
    assert job.state == "failed" and "3 workers" in (job.reason or "")
    jobs.reopen(["failed"], ["a"])
    assert jobs.take("w", ["a"]) == "a", "a new start forgets"


def test_a_dead_worker_of_this_machine_is_known_at_once(jobs):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert jobs.take(f"{socket.gethostname()}:{child}:x", ["a"]) == "a"
    assert jobs.take(new_owner(), ["b"]) == "b"
    assert jobs.take("elsewhere:1:x", ["c"]) == "c"
    jobs.release_dead()
    assert states(jobs) == {"a": "open", "b": "leased", "c": "leased"}


def test_a_heartbeat_holds_a_lease_and_notices_when_it_is_lost(tmp_path):
    jobs = Jobs(tmp_path / "jobs.sqlite", lease=0.6)
    jobs.create(["a"])
    assert jobs.take("mine", ["a"]) == "a"
    with Lease(jobs, "a", "mine") as lease:
        time.sleep(1.5)
        lease.check()
        assert jobs.take("other", ["a"]) is None
        jobs.reopen(["leased"], ["a"])
        assert jobs.take("other", ["a"]) == "a"
        time.sleep(0.5)
        with pytest.raises(LeaseLost, match="taken over"):
            lease.check()


def test_who_slept_through_a_lease_asks_before_writing(jobs, clock):
    """A suspended machine wakes with a heart that has not beaten yet."""
    assert jobs.take("mine", ["a"]) == "a"
    with Lease(jobs, "a", "mine") as lease:
        clock.now += 61
        lease.check()  # nobody took it: held again
        assert jobs.take("other", ["a"]) is None
        clock.now += 61
        assert jobs.take("other", ["a"]) == "a"
        with pytest.raises(LeaseLost, match="taken over"):
            lease.check()


def test_a_file_that_is_no_table_is_told(tmp_path):
    path = tmp_path / "jobs.sqlite"
    path.write_text("no database at all, but a text that is long enough to be read as one")
    with pytest.raises(DataError, match=r"jobs\.sqlite"):
        Jobs(path).create(["a"])


def test_a_torn_last_line_is_no_line(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    assert list(journal) == []
    journal.append({"n": 1, "x": float("nan")}, {"n": 2, "x": float("-inf")})
    whole = journal.path.read_bytes()
    for torn in (b'{"n": 3', b'{"n": 3}', b"\xff\xfe{", b'{"n": "\xc3'):
        journal.path.write_bytes(whole + torn)
        lines = list(journal)
        assert [line.record["n"] for line in lines] == [1, 2] and lines[-1].end == len(whole)
        journal.cut(lines[-1].end)
        assert journal.path.read_bytes() == whole
    journal.append({"n": 3})
    assert [record["n"] for record in journal.records()] == [1, 2, 3]
    journal.path.write_bytes(b"garbage\n" + whole)
    with pytest.raises(DataError, match="line 1"):
        list(journal)


def test_rows_come_back_with_numbers_that_are_not_finite(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    row = {"case": "c", "kind": "k", "protocol": "kl", "prompt": "p", "before": 0.1, "detail": {}}
    journal.append({"rows": [{**row, "after": float("inf")}, {**row, "after": 1 / 3}]})
    rows = [row_of(record) for record in next(journal.records())["rows"]]
    assert [r.after for r in rows] == [float("inf"), 1 / 3] and rows[0].before == 0.1
