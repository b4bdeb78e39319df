"""One point of a sweep: train it, then measure its checkpoints, stage by stage.

Stages meet on disk. Each reads the run's checkpoints and writes lines to its own file. A stage
whose lines exist under the present settings is skipped; an interrupted one is resumed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.distributed import ranks
from jaxflat.runs import slots, stages
from jaxflat.runs.measurements import Measurement, log_seconds, read_status
from jaxflat.runs.recovery import is_trained
from jaxflat.runs.train import train
from jaxflat.storage.files import write_json

TRAINING_KEYS = tuple(
    ["language", "model", "phase_order", "phases", "training", "data_seed", "init_seed"]
)
"""The keys that decide the trained model. Others decide its measurements, or where it runs."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, overrides, resolved config and folder.

    Points of one team can be trained in one program, each in its own slot, see `runs.slots`.
    """

    name: str
    overrides: dict[str, Any]
    config: Config
    directory: Path
    team: str
    slot: int


def measurements_of(names: Sequence[str]) -> list[Measurement]:
    """Return the measurements that these stages make."""
    return [m for m in stages.MEASUREMENTS if m.stage in names]


@ranks.on_rank_0
def is_done(point: Point, names: Sequence[str] = stages.STAGES) -> bool:
    """Return whether all results of these stages exist for a point, under its settings."""
    trains = "train" in names and point.config.phase_order
    if trains and not is_trained(point.config, point.directory):
        return False
    return all(m.is_done(point.config, point.directory) for m in measurements_of(names))


def run_point(point: Point, names: Sequence[str], display: Display) -> None:
    """Train and measure a point, as far as `names` include these stages; skip finished work.

    Without the stage "train", a damaged checkpoint is not trained again, and measuring it fails.
    """

    def fail(_: Point, error: Exception) -> None:
        raise error

    if "train" in names and point.config.phase_order:
        train_points([point], display, fail)
    for measurement in measurements_of(names):
        measurement.measure_missing(point.config, point.directory, display)


def train_points(
    points: Sequence[Point], display: Display, fail: Callable[[Point, Exception], object]
) -> None:
    """Train points of one team in one program; call `fail` for each that cannot be trained."""
    by_slot, seconds = {point.slot: point for point in points}, time.perf_counter()
    trainings = {p.slot: train(p.config, p.directory, display) for p in points}
    slots.train_together(trainings, lambda slot, error: fail(by_slot.pop(slot), error))
    for point in by_slot.values():
        share = (time.perf_counter() - seconds) / len(points)
        display.add_seconds(point.name, share)
        log_seconds(point.directory, "train", share)


@ranks.on_rank_0
def write_status(directory: Path, state: str, reason: str = "") -> None:
    """Record a point's state: running, done, partial, failed or preempted."""
    status = read_status(directory) | {"state": state, "reason": reason}
    write_json(directory / "status.json", status)
