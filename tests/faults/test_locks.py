"""One holder of a lock at a time, and none for ever: in one process, by threads, after a kill."""

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
from jaxflat.distributed.leases import Lock, Lost
from jaxflat.storage import checkpoint
from jaxflat.storage.files import Curve, append_line, write_json

NEVER = 3600.0


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "point"


@pytest.fixture
def silent(monkeypatch):
    """Holders that do not beat, and observers of little patience."""
    monkeypatch.setattr(leases, "BEAT", NEVER)
    monkeypatch.setattr(leases, "LEASE", 0.05)


def names(target: Path) -> list[str]:
    return sorted(path.name for path in (target.parent / "locks" / target.name).iterdir())


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return which file is where, and when it was last written."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def all_at_once(functions) -> None:
    """Call each function in a thread of its own, all let loose together; raise what they raise."""
    barrier, errors = threading.Barrier(len(functions)), []

    def call(function):
        try:
            barrier.wait(30)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def take_all_at_once(observers: list[Lock]) -> list[Lock]:
    """Return those that took the lock, all having tried before the first released it."""
    winners, all_tried = [], threading.Barrier(len(observers))

    def take(lock):
        with lock.taken() as taken:
            winners.extend([lock] * taken)
            all_tried.wait(30)

    all_at_once([lambda lock=lock: take(lock) for lock in observers])
    return winners


def test_one_of_many_takes_it_every_time(target):
    for token in range(1, 11):
        observers = [Lock(target) for _ in range(6)]
        assert all([lock.look() for lock in observers])
        assert len(take_all_at_once(observers)) == 1
        assert names(target) == [f"{token}.free"]


@pytest.mark.parametrize("attempt", range(2))
def test_a_silent_lock_goes_to_one_observer_and_its_holder_is_fenced(target, silent, attempt):
    old, observers = Lock(target), [Lock(target) for _ in range(6)]
    assert old.look()
    with old.taken() as taken:
        assert taken
        for lock in observers:
            lock.look()
        time.sleep(0.1)
        assert all([lock.look() for lock in observers])
        leases.check()
        assert len(take_all_at_once(observers)) == 1
        with pytest.raises(Lost):
            leases.check()
    assert names(target) == ["2.free"]


def test_a_fenced_holder_writes_nothing(target, silent, tmp_path):
    other = Lock(target)
    assert other.look()
    with other.taken():
        checkpoint.save(target / "checkpoints", 3, {"x": jnp.ones(3)})
        checkpoint.save(target / "checkpoints", 5, {"x": jnp.ones(3)})
        append_line(target / "metrics.jsonl", {"step": 1})
        write_json(target / "status.json", {"state": "running"})
        leases._rename(tmp_path / "locks/point/1", tmp_path / "locks/point/2")
        before = written(target)
        for write in (
            lambda: append_line(target / "metrics.jsonl", {"step": 2}),
            lambda: write_json(target / "status.json", {"state": "done"}),
            lambda: Curve(target, 0),
            lambda: checkpoint.save(target / "checkpoints", 5, {"x": jnp.zeros(3)}),
            lambda: checkpoint.save(target / "checkpoints", 7, {"x": jnp.zeros(3)}),
            lambda: checkpoint.delete(target / "checkpoints", 3),
            lambda: checkpoint.set_aside(target / "checkpoints" / "3"),
        ):
            with pytest.raises(Lost, match="locks/point/1: another process"):
                write()
        assert written(target) == before
    assert names(target) == ["2"]
    append_line(target / "metrics.jsonl", {"step": 2})  # it holds nothing any more


def test_beats_hold_a_lock_for_longer_than_the_lease(target, monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.05)
    monkeypatch.setattr(leases, "LEASE", 0.7)
    holder, observer = Lock(target), Lock(target)
    assert holder.look()
    with holder.taken():
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert not observer.look()
            time.sleep(0.05)
        leases.check()
    assert observer.look()
    assert observer.was_taken()
    assert not Lock(target).was_taken()


HOLDER = """
import sys, time
from pathlib import Path
from jaxflat.distributed.leases import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.look()
with lock.taken():
    print("taken", flush=True)
    time.sleep(1000)
"""


def test_only_a_holder_known_to_be_dead_is_so_at_once(target):
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        assert not Lock(target).look()
        holder.send_signal(signal.SIGSTOP)
        assert not Lock(target).look()
        holder.kill()
        while not Lock(target).look():  # the signal takes a moment; no one waits for the process
            time.sleep(0.01)
    assert Lock(target).look()
    path = target.parent / "locks/point/1"
    token, (boot, space, user, pid, started) = json.loads(path.read_text().splitlines()[0])
    for holder, is_dead in (
        ([token, [boot, space, user, pid, "1"]], True),  # another process has its number now
        ([token, ["another boot", space, user, pid, started]], False),
        ([token, [boot, "pid:[1]", user, pid, started]], False),
        ([token, [boot, space, user + 1, pid, started]], False),
        ([token, []], False),  # of a system that does not say
        ([token + 1, [boot, space, user, pid, started]], False),  # of the holder before
    ):
        path.write_text(f"{json.dumps(holder)}\n7\n")
        assert Lock(target).look() == is_dead


def test_a_torn_lock_is_left_alone_for_the_lease(target, silent):
    for content in (b"", b"{", b"\0" * 80, b"\xff", b'[1, ["mach'):
        holder, observer = Lock(target), Lock(target)
        assert holder.look()
        with holder.taken():
            (path,) = (path for path in (target.parent / "locks/point").iterdir())
            path.write_bytes(content)
            assert not observer.look()
            with pytest.raises(Lost):
                leases.check()
            time.sleep(0.06)
            assert observer.look()


def test_a_holder_leaves_the_new_one_its_file_also_where_a_cached_name_leads_there(
    target, monkeypatch
):
    """Over NFS the old name may lead to the file for a while after it was renamed."""
    monkeypatch.setattr(leases, "BEAT", 0.02)
    holder = Lock(target)
    assert holder.look()
    with holder.taken():
        path = target.parent / "locks/point/1"
        path.write_text("the new holder's\n")
        time.sleep(0.2)
        assert path.read_text() == "the new holder's\n"
        with pytest.raises(Lost):
            leases.check()


def test_alone_waits_for_its_turn(target, monkeypatch):
    monkeypatch.setattr(leases, "POLL", 0.01)
    inside, waits, order = [], itertools.count(), []

    def work(number):
        with leases.alone(target, lambda _: next(waits)):
            inside.append(number)
            time.sleep(0.05)
            assert inside == [number]
            inside.remove(number)
            order.append(number)

    all_at_once([lambda number=number: work(number) for number in range(5)])
    assert sorted(order) == list(range(5))
    assert next(waits) > 0


def test_a_signal_ends_the_wait(target, monkeypatch):
    holder = Lock(target)
    assert holder.look()

    monkeypatch.setattr(preemption, "_received", [15])
    with holder.taken(), pytest.raises(preemption.Preempted), leases.alone(target):
        pass


class Workers(RuleBasedStateMachine):
    """Three workers who look, take, beat, sleep and release in any order, on a clock of ours."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now = 0.0
        self.originals = leases.time, leases.BEAT
        leases.time = SimpleNamespace(monotonic=lambda: self.now)
        leases.BEAT = NEVER
        self.locks = [Lock(self.folder / "point") for _ in range(3)]
        self.held = [ExitStack() for _ in self.locks]
        self.mine = [None] * 3
        self.looked = [None] * 3
        self.token = 0

    @rule(worker=st.integers(0, 2))
    def look(self, worker):
        may_take = self.locks[worker].look()
        self.looked[worker] = names(self.folder / "point") if may_take else None

    @rule(worker=st.integers(0, 2))
    def take(self, worker):
        if self.looked[worker] is None or self.mine[worker] is not None:
            return
        is_as_it_was = self.looked[worker] == names(self.folder / "point")
        taken = self.held[worker].enter_context(self.locks[worker].taken())
        assert taken == is_as_it_was
        if taken:
            self.token += 1
            self.mine[worker] = leases._held[-1]
        self.looked[worker] = None

    @rule(worker=st.integers(0, 2))
    def beat(self, worker):
        if self.mine[worker] is not None and not self.mine[worker].is_lost():
            self.mine[worker].beat(int(self.now * 10))

    @rule(worker=st.integers(0, 2))
    def release(self, worker):
        self.held[worker].close()
        self.mine[worker] = None

    @rule(seconds=st.floats(0, 2 * leases.LEASE))
    def sleep(self, seconds):
        self.now += seconds

    @invariant()
    def one_holder_and_a_token_that_only_grows(self):
        (name,) = names(self.folder / "point")
        assert name.partition(".")[0] == str(self.token)
        holders = [held for held in self.mine if held is not None and not held.is_lost()]
        assert len(holders) == (not name.endswith(".free"))

    def teardown(self):
        for stack in self.held:
            stack.close()
        leases.time, leases.BEAT = self.originals
        shutil.rmtree(self.folder)
        assert leases._held == []


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
