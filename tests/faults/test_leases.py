"""A lease has one owner at a time, and none for ever: in one process, in threads, after a kill."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import jax.numpy as jnp
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jaxflat.distributed import leases, preemption
from jaxflat.distributed.leases import Lease, LeaseLost
from jaxflat.storage.curve import Curve
from jaxflat.storage.leased_folder import Folder
from tests.support.threads import call_concurrently

NEVER = 3600.0


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "point"


@pytest.fixture
def silent(monkeypatch):
    """Owners that write no heartbeat, and observers that wait for 0.05 seconds."""
    monkeypatch.setattr(leases, "HEARTBEAT", NEVER)
    monkeypatch.setattr(leases, "EXPIRY", 0.05)


def names(target: Path) -> list[str]:
    return sorted(path.name for path in (target.parent / "locks" / target.name).iterdir())


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the inode and the last write of every file in a folder."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def acquire_all_at_once(observers: list[Lease]) -> list[Lease]:
    """Return those that acquired the lease; all try before the first releases it."""
    winners, all_tried = [], threading.Barrier(len(observers))

    def acquire(lease):
        with lease.try_acquire() as acquired:
            winners.extend([lease] * acquired)
            all_tried.wait(30)

    call_concurrently([lambda lease=lease: acquire(lease) for lease in observers])
    return winners


def test_exactly_one_of_many_acquires_the_lease(target):
    for token in range(1, 11):
        observers = [Lease(target) for _ in range(6)]
        assert all([lease.is_available() for lease in observers])
        assert len(acquire_all_at_once(observers)) == 1
        assert names(target) == [f"{token}.free"]


@pytest.mark.parametrize("attempt", range(2))
def test_one_observer_takes_over_a_silent_lease_and_fences_its_owner(target, silent, attempt):
    old, observers = Lease(target), [Lease(target) for _ in range(6)]
    assert old.is_available()
    with old.try_acquire() as acquired:
        assert acquired
        for lease in observers:
            lease.is_available()
        time.sleep(0.1)
        assert all([lease.is_available() for lease in observers])
        old.assert_owned()
        assert len(acquire_all_at_once(observers)) == 1
        with pytest.raises(LeaseLost):
            old.assert_owned()
    assert names(target) == ["2.free"]


def test_an_owner_that_lost_its_lease_writes_nothing(target, silent, tmp_path):
    folder = Folder(target)
    checkpoints = folder / "checkpoints"
    assert folder.lease.is_available()
    with folder.lease.try_acquire():
        folder.make()
        checkpoints.save(3, {"x": jnp.ones(3)})
        checkpoints.save(5, {"x": jnp.ones(3)})
        folder.append_line("metrics.jsonl", {"step": 1})
        folder.write_json("status.json", {"state": "running"})
        leases._rename(tmp_path / "locks/point/1", tmp_path / "locks/point/2")
        before = written(target)
        for write in (
            folder.make,
            lambda: folder.append_line("metrics.jsonl", {"step": 2}),
            lambda: folder.append_bytes("metrics.jsonl", b"2"),
            lambda: folder.write_json("status.json", {"state": "done"}),
            lambda: folder.write_text("error.txt", "no"),
            lambda: folder.write_lines("metrics.jsonl", []),
            lambda: folder.add_lines("metrics.jsonl", [{"step": 2}]),
            lambda: folder.delete("status.json"),
            lambda: Curve(folder, 0),
            lambda: checkpoints.save(5, {"x": jnp.zeros(3)}),
            lambda: checkpoints.save(7, {"x": jnp.zeros(3)}),
            lambda: checkpoints.copy(target / "checkpoints", 3),
            lambda: checkpoints.delete_step(3),
            lambda: (checkpoints / 3).mark_damaged(),
        ):
            with pytest.raises(LeaseLost, match="locks/point/1: another process"):
                write()
        assert written(target) == before
    assert names(target) == ["2"]
    with pytest.raises(LeaseLost, match="locks/point: this process does not hold this lease"):
        folder.append_line("metrics.jsonl", {"step": 2})
    assert written(target) == before


def test_heartbeats_keep_a_lease_beyond_its_expiry(target, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT", 0.05)
    monkeypatch.setattr(leases, "EXPIRY", 0.7)
    holder, observer = Lease(target), Lease(target)
    assert holder.is_available()
    assert observer.is_available()
    with holder.try_acquire():
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert not observer.is_available()
            time.sleep(0.05)
        holder.assert_owned()
    assert observer.is_available()
    assert observer.was_acquired()
    assert not Lease(target).was_acquired()


HOLDER = """
import sys, time
from pathlib import Path
from jaxflat.distributed.leases import Lease
lease = Lease(Path(sys.argv[1]))
assert lease.is_available()
with lease.try_acquire():
    print("taken", flush=True)
    time.sleep(1000)
"""


def test_only_an_owner_known_to_be_dead_frees_its_lease_immediately(target):
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        assert not Lease(target).is_available()
        holder.send_signal(signal.SIGSTOP)
        assert not Lease(target).is_available()
        holder.kill()
        while not Lease(
            target
        ).is_available():  # the signal takes a moment, and the process has no waiting parent
            time.sleep(0.01)
    assert Lease(target).is_available()
    path = target.parent / "locks/point/1"
    token, (boot, space, user, pid, started) = json.loads(path.read_text().splitlines()[0])
    for holder, is_dead in (
        ([token, [boot, space, user, pid, "1"]], True),  # another process has this PID now
        ([token, ["another boot", space, user, pid, started]], False),
        ([token, [boot, "pid:[1]", user, pid, started]], False),
        ([token, [boot, space, user + 1, pid, started]], False),
        ([token, []], False),  # a system without /proc
        ([token + 1, [boot, space, user, pid, started]], False),  # left by the previous owner
    ):
        path.write_text(f"{json.dumps(holder)}\n7\n")
        assert Lease(target).is_available() == is_dead


def test_a_torn_lease_expires_like_a_silent_one(target, silent):
    for content in (b"", b"{", b"\0" * 80, b"\xff", b'[1, ["mach'):
        holder, observer = Lease(target), Lease(target)
        assert holder.is_available()
        with holder.try_acquire():
            (path,) = (path for path in (target.parent / "locks/point").iterdir())
            path.write_bytes(content)
            assert not observer.is_available()
            with pytest.raises(LeaseLost):
                holder.assert_owned()
            time.sleep(0.06)
            assert observer.is_available()


def test_an_old_owner_does_not_overwrite_the_new_owners_file_through_a_cached_name(
    target, monkeypatch
):
    """NFS may resolve the old name for a while after a rename."""
    monkeypatch.setattr(leases, "HEARTBEAT", 0.02)
    holder = Lease(target)
    assert holder.is_available()
    with holder.try_acquire():
        path = target.parent / "locks/point/1"
        path.write_text("the new holder's\n")
        time.sleep(0.2)
        assert path.read_text() == "the new holder's\n"
        with pytest.raises(LeaseLost):
            holder.assert_owned()


def test_hold_waits_for_its_turn(target, monkeypatch):
    monkeypatch.setattr(leases, "POLL", 0.01)
    inside, waits, order = [], itertools.count(), []

    def work(number):
        with leases.acquire_lease(target, lambda _: next(waits)):
            inside.append(number)
            time.sleep(0.05)
            assert inside == [number]
            inside.remove(number)
            order.append(number)

    call_concurrently([lambda number=number: work(number) for number in range(5)])
    assert sorted(order) == list(range(5))
    assert next(waits) > 0


def test_a_signal_ends_the_wait(target, monkeypatch):
    holder = Lease(target)
    assert holder.is_available()

    monkeypatch.setattr(preemption, "_received", [15])
    with holder.try_acquire(), pytest.raises(preemption.Preempted), leases.acquire_lease(target):
        pass


class Workers(RuleBasedStateMachine):
    """Three workers read, acquire, beat, sleep and release in any order, on a fake clock."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now = 0.0
        self.originals = leases.time, leases.HEARTBEAT
        leases.time = SimpleNamespace(monotonic=lambda: self.now)
        leases.HEARTBEAT = NEVER
        self.leases = [Lease(self.folder / "point") for _ in range(3)]
        assert all([lease.is_available() for lease in self.leases])
        self.held = [ExitStack() for _ in self.leases]
        self.mine = [None] * 3
        self.looked = [None] * 3
        self.token = 0

    @rule(worker=st.integers(0, 2))
    def look(self, worker):
        available = self.leases[worker].is_available()
        self.looked[worker] = names(self.folder / "point") if available else None

    @rule(worker=st.integers(0, 2))
    def take(self, worker):
        if self.looked[worker] is None or self.mine[worker] is not None:
            return
        is_as_it_was = self.looked[worker] == names(self.folder / "point")
        acquired = self.held[worker].enter_context(self.leases[worker].try_acquire())
        assert acquired == is_as_it_was
        if acquired:
            self.token += 1
            self.mine[worker] = self.leases[worker]._owned
        self.looked[worker] = None

    @rule(worker=st.integers(0, 2))
    def beat(self, worker):
        if self.mine[worker] is not None and not self.mine[worker].is_lost():
            self.mine[worker].write_heartbeat(int(self.now * 10))

    @rule(worker=st.integers(0, 2))
    def release(self, worker):
        self.held[worker].close()
        self.mine[worker] = None

    @rule(seconds=st.floats(0, 2 * leases.EXPIRY))
    def sleep(self, seconds):
        self.now += seconds

    @invariant()
    def one_owner_and_a_token_that_only_grows(self):
        (name,) = names(self.folder / "point")
        assert name.partition(".")[0] == str(self.token)
        holders = [held for held in self.mine if held is not None and not held.is_lost()]
        assert len(holders) == (not name.endswith(".free"))

    def teardown(self):
        for stack in self.held:
            stack.close()
        leases.time, leases.HEARTBEAT = self.originals
        shutil.rmtree(self.folder)
        assert [lease._owned for lease in self.leases] == [None] * 3


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
