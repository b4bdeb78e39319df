"""Several workers on one sweep: every point once, whoever is killed, stopped, woken or fails."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict
from sweeps import tiny_config
from test_locks import all_at_once
from test_sweep import contents, modified

from jaxflat import corpus, locks, points
from jaxflat.config import param
from jaxflat.metrics import Display, read_lines
from jaxflat.stages import trunks
from jaxflat.trajectory import phases

WORKER = Path(__file__).with_name("worker.py")
TRIALS = int(os.environ.get("JAXFLAT_FAULT_TRIALS", "2"))
STEPS = (7, 10, 12, 14)  # of the measured checkpoints of a worker's point
PATIENCE = 900  # seconds, on a machine that has other things to do


class Worker:
    """A process that runs a command; what it prints goes to a file."""

    def __init__(self, workdir: Path, command: list[str], **environment: str):
        workdir.mkdir(exist_ok=True)
        self.log = workdir / f"log_{len(list(workdir.glob('log_*')))}.txt"
        paths = os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parents[1])])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, f"--workdir={workdir}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": ""} | environment,
            )
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ends_with(self, code: int) -> str:
        """Return what it printed, when it has ended with this exit code."""
        found = self.process.wait(PATIENCE)
        assert found == code, self.log.read_text()
        assert "Traceback" not in self.log.read_text()
        return self.log.read_text()


@pytest.fixture
def start(tmp_path):
    """Start a worker on points that take no computing; end it where the test has not."""
    started: list[Worker] = []
    workdir = tmp_path / "sweep"

    def start(num_points: int, seconds: float = 0.1, lease: float = 30.0, fails: str = ""):
        settings = {"POINTS": num_points, "SECONDS": seconds, "LEASE": lease, "FAILS": fails}
        environment = {f"WORKER_{name}": str(value) for name, value in settings.items()}
        started.append(Worker(workdir, [str(WORKER)], **environment))
        return started[-1]

    yield start
    for worker in started:
        worker.send(signal.SIGKILL)
        worker.process.wait()


@pytest.fixture
def workdir(tmp_path) -> Path:
    return tmp_path / "sweep"


def until(condition):
    """Return what `condition` returns, once that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def holders(workdir: Path) -> dict[str, int]:
    """Return who has which point, by the number of its process."""
    found = {}
    for path in workdir.glob("locks/*=*/*"):
        try:
            owner = path.read_text().partition("\n")[0]
            if path.suffix != ".free" and owner and json.loads(owner)["token"] == int(path.name):
                found[path.parent.name] = json.loads(owner)["pid"]
        except (FileNotFoundError, ValueError):  # it changes just now
            pass
    return found


def state(workdir: Path, name: str) -> str:
    """Return the state of a point that has one by now."""
    path = workdir / name / "status.json"
    return json.loads(path.read_text())["state"] if path.exists() else ""


def written(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file's bytes and when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def assert_complete(workdir: Path, num_points: int, failed: tuple[int, ...] = ()) -> None:
    """Every point's results are there once, those of failed ones not at all; no file is torn."""
    expected = Counter((seed, step) for seed in range(num_points) for step in STEPS)
    for seed in failed:
        expected -= Counter((seed, step) for step in STEPS)
    with (workdir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert Counter((int(row["seed"]), int(row["step"])) for row in rows) == expected
    lines = [r for path in workdir.glob("*/probes.jsonl") for r in read_lines(path)]
    assert Counter((line["mean"], line["step"]) for line in lines) == expected
    for name in ("sweep.json", "*/status.json", "*/config.json"):
        assert all(json.loads(path.read_text()) for path in workdir.glob(name))
    assert {path.suffix for path in workdir.glob("locks/*/*")} == {".free"}


def test_three_workers_share_the_points(start, workdir):
    """One is killed, one point fails: the others run the rest, and the next command the failed."""
    num_points = max(TRIALS, 4)
    workers = [start(num_points, fails="1") for _ in range(3)]
    killed = until(lambda: next(iter(holders(workdir).values()), None))
    victim = next(worker for worker in workers if worker.pid == killed)
    time.sleep(random.uniform(0, 0.3))
    victim.send(signal.SIGKILL)
    victim.process.wait()
    for worker in workers:
        if worker is not victim:
            output = worker.ends_with(3)
            assert "RuntimeError: out of luck" in output
            assert output.count(f"/{num_points}] seed=") == num_points
    assert_complete(workdir, num_points, failed=(1,))
    (failed,) = (path.name for path in workdir.glob("seed=1_*"))
    stored = json.loads((workdir / failed / "status.json").read_text())
    assert (stored["state"], stored["reason"]) == ("failed", "RuntimeError: out of luck")
    assert "out of luck" in (workdir / failed / "error.txt").read_text()
    made = Counter((line["point"], line["step"]) for line in read_lines(workdir / "made.jsonl"))
    assert len(made) == 4 * num_points - 3
    assert sum(made.values()) - len(made) <= 3  # what was cut off by the kill, or failed again
    before = len(list(read_lines(workdir / "made.jsonl")))
    start(num_points).ends_with(0)
    assert_complete(workdir, num_points)
    again = list(read_lines(workdir / "made.jsonl"))[before:]
    assert [line["point"] for line in again] == [failed] * 4
    assert not (workdir / failed / "error.txt").exists()


@pytest.mark.parametrize("attempt", range(-(-TRIALS // 2)))
def test_workers_that_slept_through_their_takeover_write_nothing_more(start, workdir, attempt):
    """Two of three are stopped at any moment, for longer than the lease, and woken."""
    chance = random.Random(attempt)
    workers = [start(4, seconds=0.4, lease=2.0) for _ in range(3)]
    asleep: dict[str, Worker] = {}
    while len(asleep) < 2:
        time.sleep(chance.uniform(0, 0.4))
        held = holders(workdir)
        for point in held.keys() - asleep.keys():
            (worker,) = (worker for worker in workers if worker.pid == held[point])
            worker.send(signal.SIGSTOP)
            if holders(workdir).get(point) == worker.pid and state(workdir, point) == "running":
                asleep[point] = worker
                break
            worker.send(signal.SIGCONT)  # it was done with the point by then
    (awake,) = (worker for worker in workers if worker not in asleep.values())
    awake.ends_with(0)
    before = {point: written(workdir / point) for point in asleep}
    assert_complete(workdir, 4)
    for worker in asleep.values():
        worker.send(signal.SIGCONT)
        assert "taken over by another worker" in worker.ends_with(0)
    assert {point: written(workdir / point) for point in asleep} == before
    assert not list(workdir.glob("*/.*"))
    assert_complete(workdir, 4)


def test_a_signal_to_a_worker_that_waits(start, workdir):
    """It ends at once, with exit code 75; one that runs a point leaves it to the others."""
    running = start(1, seconds=5)
    until(lambda: holders(workdir))
    waiting = start(1)
    until(lambda: "waiting for other workers, which run seed=0" in waiting.log.read_text())
    waiting.send(signal.SIGINT)
    assert "stopped by SIGINT" in waiting.ends_with(75)
    other = start(1)
    until(lambda: "waiting for other workers" in other.log.read_text())
    running.send(signal.SIGTERM)
    assert "stopped by SIGTERM" in running.ends_with(75)
    other.ends_with(0)
    assert_complete(workdir, 1)


ARMS = """
from sweeps import tiny_config
from jaxflat.config import chain, param, product

RATE = "phases.drift.schedule.learning_rate"

def get_config(scale=None):
    return tiny_config()

def get_sweep(scale=None):
    arms = product(param("seed", [0, 1]), param(RATE, [1e-3, 1e-2]))
    return chain(arms, product(param("seed", [0]), param(RATE, [1e30])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(-(-TRIALS // 10)))
def test_three_workers_train_what_one_does_bit_for_bit(tmp_path, attempt):
    """One is killed in the midst; two arms begin with one trunk; the rates of a third diverge."""
    (tmp_path / "arms.py").write_text(ARMS)
    command = ["-m", "jaxflat.main", f"--config={tmp_path}/arms.py", "--stages=train"]
    flags = {"JAX_PLATFORMS": "cpu"}
    Worker(tmp_path / "alone", command, **flags).ends_with(3)
    workdir = tmp_path / "shared"
    workers = [Worker(workdir, command, **flags) for _ in range(3)]
    until(lambda: holders(workdir))
    time.sleep(random.Random(attempt).uniform(0, 10))
    workers.pop().send(signal.SIGKILL)
    for worker in workers:
        output = worker.ends_with(3)
        assert re.search(r"failed: learning_rate=1e\+30_seed=0_\w+: FloatingPointError", output)
    assert contents(workdir) == contents(tmp_path / "alone")
    assert [path.parent.name[:19] for path in workdir.glob("*/error.txt")] == [
        "learning_rate=1e+30"
    ]
    before = contents(workdir), modified(workdir, "learning_rate=0*/**/*")
    Worker(workdir, command, **flags).ends_with(3)
    assert (contents(workdir), modified(workdir, "learning_rate=0*/**/*")) == before


def test_a_sweep_that_several_extend_at_once_has_all_their_points(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.01)
    config = tiny_config()
    parts = [points.expand(config, param("seed", [seed]), tmp_path) for seed in range(5)]
    for attempt in range(5):
        workdir = tmp_path / str(attempt)

        def record(part, workdir=workdir):
            points.record_sweep(config, part, workdir)

        all_at_once([lambda part=part: record(part) for part in [*parts, *parts]])
        recorded = json.loads((workdir / "sweep.json").read_text())["points"]
        assert sorted(entry["overrides"]["seed"] for entry in recorded) == list(range(5))


def test_one_of_several_leaves_the_trunk_that_they_trained(tmp_path, monkeypatch):
    config = FrozenConfigDict(tiny_config())
    both_copied = threading.Barrier(2)

    def copy(source, target):
        (target / "metrics.jsonl").write_text("the same in both")
        both_copied.wait(30)

    monkeypatch.setattr(trunks, "_copy", copy)
    first, _ = phases(config)
    all_at_once([lambda name=name: trunks.keep(config, tmp_path / name, first) for name in "ab"])
    (kept,) = (tmp_path / "trunks").iterdir()
    assert [path.name for path in kept.iterdir()] == ["metrics.jsonl"]


def test_what_a_language_stores_is_made_by_one_while_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.01)
    config = tiny_config()
    config.language.update({"stored_sentences": 32, "data_dir": str(tmp_path)})
    section, made, waited = FrozenConfigDict(config).language, [], []
    columns_of = corpus.columns_of

    def count(*arguments):
        made.append(arguments)
        return columns_of(*arguments)

    monkeypatch.setattr(corpus, "columns_of", count)
    monkeypatch.setattr(Display, "wait", lambda self, text: waited.append(text))
    all_at_once([lambda: corpus.prepare(section, Display(1))] * 3)
    assert len(made) == 16  # shards
    assert set(waited) == {"waiting for another worker, which makes the language"}
