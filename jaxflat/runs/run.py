"""The story of one run, stage by stage: train, evaluate, measure flatness, probe.

Stages meet on disk. Each reads the run's checkpoints and writes lines of its own; a stage whose
lines are there under the same settings is skipped, and one that was cut off goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.distributed import leases, preemption, ranks
from jaxflat.runs import slots, trajectory
from jaxflat.runs.measure_flatness import flatness
from jaxflat.runs.measure_loss import evaluate
from jaxflat.runs.measure_probes import probe
from jaxflat.runs.records import Record, keeping
from jaxflat.runs.recovery import is_trained
from jaxflat.runs.train import train
from jaxflat.runs.trajectory import Snapshot
from jaxflat.storage.files import append_line, read_lines, write_json, write_lines

STAGES = ("train", "flatness", "probes", "report")

TRAINING_KEYS = tuple(
    ["language", "model", "phase_order", "phases", "training", "data_seed", "init_seed"]
)
"""What decides the trained model. All other keys decide how it is measured, or where it runs."""

MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "evaluation": evaluate,
    "flatness": flatness,
    "probes": probe,
}
"""The files of measurements, each named as the config section that decides what is in it."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, its overrides, its resolved config and its folder.

    Points of one team may be trained at once, each in its lane, see `runs.slots`.
    """

    name: str
    overrides: dict[str, Any]
    config: Config
    directory: Path
    team: str
    lane: int


def files_of(point: Point, stages: Sequence[str]) -> list[str]:
    """Return the files of measurements that these stages make of a point."""
    of_stage = {"train": "evaluation", "flatness": "flatness", "probes": "probes"}
    files = [of_stage[stage] for stage in stages if stage in of_stage]
    return [name for name in files if point.config.phase_order or name != "flatness"]


@ranks.on_rank_0
def is_done(point: Point, stages: Sequence[str] = STAGES) -> bool:
    """Say whether all that `stages` make of a point is there, under its present settings."""
    trains = "train" in stages and point.config.phase_order
    if trains and not is_trained(point.config, point.directory):
        return False
    measured = read_status(point.directory).get("measured", {})
    snapshots = set(trajectory.snapshots(point.config))
    return all(
        measured.get(name) == settings_of(point.config, name)
        and snapshots <= _measured(point.directory / f"{name}.jsonl")
        for name in files_of(point, stages)
    )


def run_point(point: Point, stages: Sequence[str], display: Display) -> None:
    """Bring a point up to date with its config, as far as `stages` go.

    Where it may not train, a measurement of a damaged checkpoint fails.
    """

    def fail(_: Point, error: Exception) -> None:
        raise error

    if "train" in stages and point.config.phase_order:
        train_points([point], display, fail)
    for name in files_of(point, stages):
        measure(point, name, display)


def train_points(
    points: Sequence[Point], display: Display, fail: Callable[[Point, Exception], object]
) -> None:
    """Train points of one team at once, unless they are trained; `fail` is told which cannot be."""
    of_lane, seconds = {point.lane: point for point in points}, time.perf_counter()
    trainings = {p.lane: train(p.config, p.directory, display) for p in points}
    slots.drive(trainings, lambda lane, error: fail(of_lane.pop(lane), error))
    for point in of_lane.values():
        share = (time.perf_counter() - seconds) / len(points)
        display.spend(point.name, share)
        _log_time(point, "train", share)


def measure(point: Point, name: str, display: Display) -> None:
    """Bring <name>.jsonl up to date: the records of each measured checkpoint.

    Records made under other settings are dropped first. Those of a checkpoint are written when all
    are there; what a signal cut off has its parts in <name>.unfinished.json. Matrix products run
    at full float32 precision, also where an accelerator's default is less.
    """
    path = point.directory / f"{name}.jsonl"
    unfinished = path.with_suffix(".unfinished.json")
    done, snapshots = _measured_before(point, name), trajectory.snapshots(point.config)
    display.start_stage(name, len(snapshots))
    for number, snapshot in enumerate(snapshots, start=1):
        if snapshot not in done:
            preemption.stop_if_requested()
            seconds = time.perf_counter()
            keep = keeping(unfinished, snapshot)
            with jax.default_matmul_precision("highest"):
                new = MEASUREMENTS[name](point.config, point.directory, snapshot, keep)
            _add(path, new)
            _log_time(point, name, time.perf_counter() - seconds)
        display.advance_stage(number, name)


@ranks.on_rank_0
def _measured_before(point: Point, name: str) -> set[Snapshot]:
    """Return what <name>.jsonl has, once what was made under other settings is dropped from it."""
    path, status = point.directory / f"{name}.jsonl", read_status(point.directory)
    settings = settings_of(point.config, name)
    if status.get("measured", {}).get(name) != settings:
        leases.assert_owned()
        path.unlink(missing_ok=True)
        path.with_suffix(".unfinished.json").unlink(missing_ok=True)
        measured = status.get("measured", {}) | {name: settings}
        write_json(point.directory / "status.json", status | {"measured": measured})
    return _measured(path)


@ranks.on_rank_0
def _add(path: Path, new: list[Record]) -> None:
    """Add a checkpoint's records; its parts are not needed any more."""
    write_lines(path, [*read_lines(path), *new])
    leases.assert_owned()
    path.with_suffix(".unfinished.json").unlink(missing_ok=True)


def read_status(directory: Path) -> dict[str, Any]:
    """Return a point's status: state, reason, and the settings its measurements were made under."""
    path = directory / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


@ranks.on_rank_0
def write_status(directory: Path, state: str, reason: str = "") -> None:
    """Record a point's state: running, done, failed or preempted."""
    status = read_status(directory) | {"state": state, "reason": reason}
    write_json(directory / "status.json", status)


def settings_of(config: Config, name: str) -> dict[str, Any]:
    """Return what a file of measurements depends on besides the trained model.

    `section` is a hash of its config section; rows are comparable only where it is the same.
    """
    section = hashlib.sha256(config[name].to_json(sort_keys=True).encode()).hexdigest()[:16]
    seeds = {} if name == "evaluation" else {"probe_seed": config.probe_seed}
    return {"section": section} | seeds


def _measured(path: Path) -> set[Snapshot]:
    return {snapshot_of(record) for record in read_lines(path)}


def snapshot_of(record: dict[str, Any]) -> Snapshot:
    """Return which checkpoint a record of a measurement is of."""
    return Snapshot(record["step"], bool(record["projected"]))


def _log_time(point: Point, stage: str, seconds: float) -> None:
    append_line(point.directory / "timing.jsonl", {"stage": stage, "seconds": round(seconds, 3)})
