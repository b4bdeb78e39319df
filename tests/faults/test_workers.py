"""Several workers run each point of a sweep once, even if some are killed, suspended or fail."""

import csv
import json
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict

from jaxflat import main
from jaxflat.config import param
from jaxflat.console import Display
from jaxflat.distributed import leases
from jaxflat.runs import checks, corpus, shared_prefixes
from jaxflat.runs.trajectory import phases
from jaxflat.storage.files import read_lines
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps import points, sweep, sweep_record
from tests.support import worker as worker_module
from tests.support.counts import in_full
from tests.support.folders import owned
from tests.support.sweeps import tiny_config
from tests.support.threads import call_concurrently
from tests.support.worker import PATIENCE, Settings, Worker, holders
from tests.sweeps.test_sweep import contents

BOOT = "/proc/sys/kernel/random/boot_id"
CHECKPOINTS = [(7, 0), (14, 0), (16, 0), (16, 1)]  # step, projected
FEW = pytest.param(5, "probes", id="few")
SIX = pytest.param(6, "train,probes", id="six", marks=pytest.mark.slow)
TWENTY = pytest.param(20, "train,probes", id="twenty", marks=pytest.mark.slow)
TRAINED = pytest.param("train,probes", marks=pytest.mark.slow)


@pytest.fixture
def workdir(tmp_path) -> Path:
    return tmp_path / "sweep"


@pytest.fixture
def start(workdir, monkeypatch):
    """Start a worker; end it after the test if the test has not."""
    started: list[Worker] = []

    def start(*arguments, folder=workdir, **settings):
        started.append(Worker(folder, Settings(*arguments, **settings)))
        return started[-1]

    yield start
    for worker in started:
        worker.send(signal.SIGKILL)
        worker.process.join()


def until(condition):
    """Return what `condition` returns, once that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def states(workdir: Path) -> dict[str, str]:
    return {
        p.parent.name: json.loads(p.read_text())["state"] for p in workdir.glob("*/status.json")
    }


def stopped_with_a_point(workers: list[Worker], workdir: Path) -> tuple[Worker | None, str]:
    """Suspend a worker that has a point; None if it has finished the point meanwhile."""
    for point, pid in holders(workdir).items():
        (worker,) = (worker for worker in workers if worker.pid == pid)
        worker.send(signal.SIGSTOP)
        if holders(workdir).get(point) == pid and states(workdir).get(point) == "running":
            return worker, point
        worker.send(signal.SIGCONT)
    return None, ""


def written(folder: Path, pattern: str = "*=*/**/*") -> dict[str, tuple[bytes, int]]:
    """Return the bytes of the files of points, and when they were written."""
    files = [path for path in folder.glob(pattern) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def assert_done_but(workdir: Path, failed: set[str], num_points: int) -> None:
    """Each point has its results once, a failed point has none, and no file is incomplete."""
    assert {name for name, state in states(workdir).items() if state == "failed"} == failed
    assert len(states(workdir)) == num_points
    for name in states(workdir).keys() - failed:
        lines = read_lines(workdir / name / "probes.jsonl")
        assert [(line["step"], line["projected"]) for line in lines] == CHECKPOINTS
    with (workdir / "results.csv").open() as file:
        rows = csv.DictReader(file)
        measured = Counter(row["point"] for row in rows if row["accuracy"])
    assert measured == dict.fromkeys(states(workdir).keys() - failed, len(CHECKPOINTS))
    assert {path.suffix for path in workdir.glob("locks/*/*")} == {".free"}
    assert not list(workdir.glob("*=*/**/.*"))


@pytest.mark.parametrize(("num_points", "stages"), [FEW, *in_full(SIX, TWENTY)])
def test_three_workers_race(start, workdir, num_points, stages):
    """One worker is killed, one point diverges, one raises: the other points are done once each."""
    workers = [start(num_points, stages, fails=True) for _ in range(3)]
    pid = until(lambda: next(iter(holders(workdir).values()), None))
    time.sleep(random.uniform(0, 0.2 if stages == "probes" else 20))
    (victim,) = (worker for worker in workers if worker.pid == pid)
    victim.send(signal.SIGKILL)
    raising, diverging = "learning_rate=0.001_seed=1_", "learning_rate=1e+30_seed=0_"
    for worker in workers:
        if worker is not victim:
            output = worker.ends_with(3)
            assert output.count(f"/{num_points}] learning_rate=") == num_points
            assert output.count("failed: ") == 2
    failed = {name for name in states(workdir) if name.startswith((raising, diverging))}
    assert_done_but(workdir, failed, num_points)
    reasons = {
        json.loads((workdir / name / "status.json").read_text())["reason"] for name in failed
    }
    assert sorted(reason.partition(":")[0] for reason in reasons) == [
        *("FloatingPointError", "RuntimeError")
    ]
    before = written(workdir)
    assert "Waiting" not in start(num_points, stages).ends_with(3)
    changed = {name for name, content in written(workdir).items() if before.get(name) != content}
    assert {Path(name).relative_to(workdir).parts[0] for name in changed} == failed
    assert_done_but(workdir, {name for name in failed if name.startswith(diverging)}, num_points)
    if stages != "probes":
        alone = workdir.with_name("alone")
        start(num_points, stages, folder=alone).ends_with(3)
        assert contents(workdir) == contents(alone)


@pytest.mark.parametrize("stages", ["probes", TRAINED])
@pytest.mark.slow
def test_a_worker_that_slept_through_its_takeover_writes_nothing(
    start, workdir, stages, worker_trial
):
    """It is suspended while it has a point, for longer than the lease, and then continued."""
    chance = random.Random(worker_trial)
    workers = [start(3, stages, measuring=0.2, lease=2.0) for _ in range(2)]
    asleep, point = None, ""
    while asleep is None:
        until(lambda: holders(workdir))
        time.sleep(chance.uniform(0, 0.5 if stages == "probes" else 3))  # less than a point takes
        asleep, point = stopped_with_a_point(workers, workdir)
    (awake,) = (worker for worker in workers if worker is not asleep)
    awake.ends_with(3)
    before, results = written(workdir), (workdir / "results.csv").read_bytes()
    asleep.send(signal.SIGCONT)
    output = asleep.ends_with(3)
    assert f"{point}: taken over by another worker while this one was suspended" in output
    assert written(workdir) == before
    assert (workdir / "results.csv").read_bytes() == results
    assert_done_but(workdir, {name for name in states(workdir) if "1e+30" in name}, 3)


def test_a_lone_worker_waits_for_no_dead_one_of_its_machine(start, workdir):
    """For a worker of another machine it waits until the lease expires, and says so."""
    first = start(1, measuring=1.0)
    until(lambda: holders(workdir))
    first.send(signal.SIGKILL)
    second = start(1, measuring=1.0)
    (name,) = until(lambda: [n for n, pid in holders(workdir).items() if pid == second.pid])
    second.send(signal.SIGKILL)
    second.process.join()
    assert "Waiting" not in second.printed()
    lease = workdir / "locks" / name / "2"
    lease.write_text(lease.read_text().replace(Path(BOOT).read_text().strip(), "another boot"))
    output = start(1, lease=1.0).ends_with(3)
    assert output.count("Waiting") == 1
    assert f"Waiting for {name}: another worker holds them, or died" in output
    assert_done_but(workdir, {name}, 1)


@pytest.mark.slow
def test_a_signal_to_a_worker_that_waits(start, workdir):
    """It exits immediately with 75; another worker continues the point of a signalled worker."""
    running = start(2, measuring=5.0)  # long enough for the others to start
    until(lambda: holders(workdir))
    waiting, other = start(2), start(2)
    until(lambda: "Waiting for learning_rate=0.001" in waiting.printed())
    waiting.send(signal.SIGINT)
    assert "Interrupted by SIGINT" in waiting.ends_with(75)
    until(lambda: "Waiting for learning_rate=0.001" in other.printed())
    running.send(signal.SIGTERM)
    assert "Interrupted by SIGTERM" in running.ends_with(75)
    other.ends_with(3)
    assert_done_but(workdir, {name for name in states(workdir) if "1e+30" in name}, 2)


def test_one_that_loses_more_than_a_point_stops_with_a_line(tmp_path, monkeypatch, capsys):
    def lose(*_, **__):
        raise leases.LeaseLost("locks/results.csv/3: another process has taken it over")

    monkeypatch.setattr(checks, "check_config", lambda _: None)
    monkeypatch.setattr(sweep, "write_results", lose)
    monkeypatch.setattr(sweep, "_run_or_wait", lambda *_: {})
    config = f"--config={worker_module.__file__}:2"
    assert main.main([config, f"--workdir={tmp_path}", "--stages=probes"]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Stopped: locks/results.csv/3: another process has taken it over. Run")


def test_a_sweep_that_several_extend_at_once_has_all_their_points(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "POLL", 0.01)
    config = tiny_config()
    monkeypatch.setattr(checks, "check_config", lambda _: None)
    parts = [points.expand(config, param("seed", [seed]), tmp_path) for seed in range(3)]

    def record(part):
        sweep_record.record_sweep(config, part, Folder(tmp_path))

    call_concurrently([lambda part=part: record(part) for part in [*parts, *parts]])
    recorded = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert sorted(entry["overrides"]["seed"] for entry in recorded) == list(range(3))


def test_one_of_several_leaves_the_shared_prefix_that_they_trained(tmp_path, monkeypatch):
    config = FrozenConfigDict(tiny_config())
    both_copied = threading.Barrier(2)

    def copy(source, target):
        target.write_text("metrics.jsonl", "the same in both")
        both_copied.wait(30)

    monkeypatch.setattr(shared_prefixes, "_copy_run", copy)
    first, _ = phases(config)

    def keep(name):
        with owned(tmp_path / name) as folder:
            shared_prefixes.save(config, folder, first)

    call_concurrently([lambda name=name: keep(name) for name in "ab"])
    (kept,) = (tmp_path / "trunks").iterdir()
    assert [path.name for path in kept.iterdir()] == ["metrics.jsonl"]


def test_what_a_language_stores_is_made_by_one_while_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "POLL", 0.01)
    config = tiny_config()
    config.language.update({"stored_sentences": 32, "data_dir": str(tmp_path)})
    section, inside, waited = FrozenConfigDict(config).language, [], []

    def build(*_, **__):
        inside.append(0)
        time.sleep(0.1)
        assert len(inside) == 1
        inside.pop()

    monkeypatch.setattr(corpus, "build_dataset", build)
    monkeypatch.setattr(Display, "print_wait", lambda self, text: waited.append(text))
    call_concurrently([lambda: corpus.prepare_language(section, Display(1))] * 3)
    assert waited
    assert all(
        text.startswith("Waiting for another worker that holds the lease on") for text in waited
    )
