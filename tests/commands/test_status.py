"""The status command, on the files of a sweep."""

import json
import os
import time
from types import SimpleNamespace

import pytest

from jaxflat import status
from jaxflat.distributed import leases
from jaxflat.storage.files import write_json, write_lines

CONFIG = {"phase_order": ["a", "b"], "phases": {"a": {"steps": 10}, "b": {"steps": 30}}}


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    """Do not flush to disk: a sweep of 200 points would take seconds."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def hold(workdir, name, worker):
    """Write the lease of a point as if a process of another machine held it."""
    (workdir / "locks" / name).mkdir(parents=True)
    owner = ["another boot", "its processes", 0, worker, "then"]
    (workdir / "locks" / name / "1").write_text(f"{json.dumps([1, owner])}\n")


def make_sweep(workdir, states):
    """Write a sweep's files; in state "running 3" worker 3 holds the point, in "running" none."""
    names = [f"seed={seed}" for seed in range(len(states))]
    listed = [{"name": name, "overrides": {"seed": seed}} for seed, name in enumerate(names)]
    write_json(workdir / "sweep.json", {"points": listed})
    for name, state in zip(names, states, strict=True):
        state, _, worker = state.partition(" ")
        if worker:
            hold(workdir, name, int(worker))
        if state != "waiting":
            directory = workdir / name
            directory.mkdir()
            reason = "FloatingPointError: the loss is nan" if state == "failed" else ""
            write_json(directory / "status.json", {"state": state, "reason": reason})
            write_json(directory / "config.json", {"config": CONFIG})
            curve = [{"phase": "a", "step": 10, "loss": 2.5}]
            curve.append({"phase": "a", "step": 15, "branch": 10, "loss": 1.5})
            write_lines(directory / "metrics.jsonl", curve)
            share = 1.0 if state == "done" else 0.25
            spent = [{"stage": "train", "seconds": 10.0 * share}] * 2
            write_lines(directory / "timing.jsonl", spent)


def test_each_points_state_step_loss_and_time(tmp_path):
    make_sweep(tmp_path, ["done", "running 1", "failed", "waiting", "running"])
    now = (tmp_path / "seed=1" / "timing.jsonl").stat().st_mtime + 60
    done, running, failed, waiting, died = status.read_points(tmp_path, now)
    assert (done.state, done.step, done.num_steps, done.loss) == ("done", 10, 40, 2.5)
    assert (done.seconds, running.seconds) == (20, pytest.approx(5 + 60))
    assert 50 <= running.idle <= 60
    assert failed.reason == "FloatingPointError: the loss is nan"
    assert (waiting.state, waiting.step, waiting.idle) == ("waiting", 0, None)
    assert (died.state, died.worker, died.seconds) == ("died", None, 5)


def test_points_of_one_worker_share_its_time(tmp_path):
    make_sweep(tmp_path, ["running 1", "running 1", "running 2"])
    now = (tmp_path / "seed=2" / "timing.jsonl").stat().st_mtime + 60
    points = status.read_points(tmp_path, now)
    assert [point.seconds for point in points] == pytest.approx([35, 35, 65], abs=1)


def test_a_running_point_without_a_lease_has_died(tmp_path):
    make_sweep(tmp_path, ["running"])
    lease = leases.Lease(tmp_path / "seed=0")
    assert lease.is_available()
    with lease.try_acquire():
        assert status.read_points(tmp_path, time.time())[0].state == "running"
    assert status.read_points(tmp_path, time.time())[0].state == "died"


def test_a_point_whose_process_has_ended_has_died(tmp_path):
    make_sweep(tmp_path, ["running 1"])
    *here, _ = leases.process_identity(os.getpid())
    for started, state in (("1", "died"), (leases.process_identity(os.getpid())[-1], "running")):
        owner = json.dumps([1, [*here, started]])
        (tmp_path / "locks/seed=0/1").write_text(f"{owner}\n")
        assert status.read_points(tmp_path, time.time())[0].state == state


def test_a_point_whose_worker_is_silent_for_minutes_has_died(tmp_path):
    make_sweep(tmp_path, ["running 1"])
    now = (tmp_path / "locks/seed=0/1").stat().st_mtime
    assert status.read_points(tmp_path, now + leases.SILENCE - 10)[0].state == "running"
    (point,) = status.read_points(tmp_path, now + leases.SILENCE + 10)
    assert (point.state, point.seconds) == ("died", 5)


def test_a_late_clock_subtracts_no_time(tmp_path):
    make_sweep(tmp_path, ["running 1"])
    assert status.read_points(tmp_path, now=0.0)[0].seconds == 5


def test_a_point_that_just_started_has_no_config(tmp_path):
    make_sweep(tmp_path, ["running 1"])
    for name in ("config.json", "timing.jsonl", "metrics.jsonl"):
        (tmp_path / "seed=0" / name).unlink()
    (point,) = status.read_points(tmp_path, time.time())
    assert (point.state, point.seconds, point.num_steps) == ("running", 0, 0)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["waiting", "running 1"], None),  # no point is done yet
        (["done", "done", "failed"], 0),
        (["done", "waiting", "waiting"], None),  # no worker is running
        (["done", "running 1", "waiting"], 15 + 20),
        (["done", "running 1", "running 1", "waiting"], 15 + 15 + 20),
        (["done", "running 1", "running 2", "waiting"], (15 + 15 + 20) / 2),
        (["done", "running", "running 2", "waiting"], 15 + 15 + 20),
    ],
)
def test_workers_share_the_time_of_the_remaining_points(states, expected, tmp_path):
    make_sweep(tmp_path, states)
    points = status.read_points(tmp_path, now=0.0)  # no time has passed since their last stages
    assert status.remaining_seconds(points) == expected


def test_the_remaining_time_is_by_kind_with_compilation_apart(tmp_path):
    make_sweep(tmp_path, ["done", "done", "running 1", "waiting", "waiting"])
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    for point, width in zip(sweep["points"], (8, 16, 8, 16, 32), strict=True):
        point["overrides"] |= {"model.width": width}
    write_json(tmp_path / "sweep.json", sweep)
    for name, seconds, compiling in (("seed=0", 70.0, 40.0), ("seed=1", 12.0, 2.0)):
        line = {"stage": "train", "seconds": seconds, "compiling": compiling}
        write_lines(tmp_path / name / "timing.jsonl", [line])
    points = status.read_points(tmp_path, now=0.0)
    assert [point.seconds - point.compiling for point in points[:3]] == [30, 10, 5]
    # Of width 32 nothing is known: the mean over the other widths, and of their compilations.
    assert status.remaining_seconds(points) == (30 - 5) + 10 + (20 + 21)


def test_the_printed_table_and_the_json_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(status, "time", SimpleNamespace(time=lambda: 0.0))
    make_sweep(tmp_path, ["done"] * 150 + ["running 1", "failed", "preempted"] + ["waiting"] * 47)
    assert status.main([str(tmp_path), f"--json={tmp_path}/new/status.json"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "150 done, 47 waiting, 1 running, 1 failed, 1 preempted; about 0:16:10 left" in printed
    assert "failed: seed=151: FloatingPointError: the loss is nan" in printed
    written = json.loads((tmp_path / "new" / "status.json").read_text())
    assert [point["state"] for point in written[149:154]] == [
        *("done", "running", "failed", "preempted", "waiting")
    ]


def test_points_are_listed_with_the_names_of_their_arms(tmp_path, capsys):
    make_sweep(tmp_path, ["done", "done"])
    assert status.main([str(tmp_path)]) == 0
    assert "Arm" not in capsys.readouterr().out
    named = [
        {"name": "seed=0", "overrides": {"seed": 0}, "arm": "[SAM]"},
        {"name": "seed=1", "overrides": {"seed": 1}},
    ]
    write_json(tmp_path / "sweep.json", {"points": named})
    assert status.main([str(tmp_path), f"--json={tmp_path}/status.json"]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["[SAM]", "seed=0", "done"] in rows
    assert ["seed=1", "done", "10/40"] in rows
    written = json.loads((tmp_path / "status.json").read_text())
    assert [point["arm"] for point in written] == ["[SAM]", ""]


@pytest.mark.parametrize("states", [["done", "running"], ["done", "waiting"], ["preempted"]])
def test_a_sweep_without_workers_has_no_remaining_time(states, tmp_path, capsys):
    make_sweep(tmp_path, states)
    assert status.main([str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ". No worker is running; rerun the original command to continue." in printed


def test_a_folder_without_a_sweep_is_one_line(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == 2
    assert f"error: WORKDIR={tmp_path} has no sweep.json" in capsys.readouterr().err
