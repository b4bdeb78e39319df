"""Run one point of a sweep: train it, measure its checkpoints, and record its state on disk.

Stages meet on disk. Each reads the run's checkpoints and writes lines to its own file. A stage
whose lines exist under the present settings is skipped; an interrupted one is resumed.
"""

import json
import platform
import subprocess
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.distributed import ranks
from jaxflat.distributed.compilation_time import Watch
from jaxflat.runs import builders, shared_prefixes, slots, stages
from jaxflat.runs.measurements import Measurement, log_seconds
from jaxflat.runs.recovery import is_trained
from jaxflat.runs.train import train
from jaxflat.storage.files import DISK_FULL
from jaxflat.storage.leased_folder import Folder

PACKAGES = ("jaxflat", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, overrides, resolved config and folder.

    `arm` is the name of its arm, "" if the sweep gives none. Points of one team can be trained in
    one program, each in its own slot, see `runs.slots`.
    """

    name: str
    overrides: dict[str, Any]
    config: Config
    folder: Folder
    team: str
    slot: int
    arm: str = ""

    @property
    def title(self) -> str:
        """The arm, if it has a name, and the point's name, for the console."""
        return f"{self.arm} ({self.name})" if self.arm else self.name


@dataclass(frozen=True)
class Done:
    """Every stage of the point is done."""


@dataclass(frozen=True)
class Failed:
    """The point failed, for this reason."""

    reason: str


@dataclass(frozen=True)
class HeldElsewhere:
    """Another worker holds the lease of the point."""


PointOutcome = Done | Failed | HeldElsewhere


def measurements_of(names: Sequence[str]) -> list[Measurement]:
    """Return the measurements that these stages make."""
    return [m for m in stages.MEASUREMENTS if m.stage in names]


def is_done(point: Point, names: Sequence[str] = stages.STAGES) -> bool:
    """Return whether all results of these stages exist for a point, under its settings.

    A point that was done needs no checkpoints: all of them may have been deleted, or left on
    another machine.
    """

    def read() -> bool:
        trains = "train" in names and point.config.phase_order
        if trains and not (is_trained(point.config, point.folder) or _has_only_results(point)):
            return False
        return all(m.is_done(point.config, point.folder) for m in measurements_of(names))

    return point.folder.on_rank_0(read)


def _has_only_results(point: Point) -> bool:
    """Return whether a point was done, has all its results and no folder of checkpoints."""
    folders = [point.folder.path / name for name in shared_prefixes.FOLDERS]
    state = point.folder.read_json("status.json").get("state")
    measured = (m.is_done(point.config, point.folder) for m in stages.MEASUREMENTS)
    return state == "done" and not any(path.exists() for path in folders) and all(measured)


def was_done(point: Point, names: Sequence[str]) -> bool:
    """Return whether a point is done, after a first read of its lease.

    From then on, `acquire` knows whether another worker has held the lease.
    """

    def read() -> bool:
        point.folder.lease.is_available()
        return is_done(point, names)

    return point.folder.on_rank_0(read)


def acquire(point: Point, names: Sequence[str], leases_held: ExitStack) -> PointOutcome | None:
    """Acquire a point's lease and return None, or return the outcome that prevents running it.

    A point that failed in another worker, since this one first read its lease, is not run again.
    """

    def try_acquire() -> PointOutcome | None:
        lease = point.folder.lease
        is_free = lease.is_available()
        if is_done(point, names):
            return Done()
        if not is_free:
            return HeldElsewhere()
        status = point.folder.read_json("status.json")
        if lease.was_acquired() and status.get("state") == "failed":
            return Failed(status["reason"])
        return None if leases_held.enter_context(lease.try_acquire()) else HeldElsewhere()

    return point.folder.on_rank_0(try_acquire)


def record_start(point: Point) -> None:
    """Make a point's folder; write its config.json, and the state "running" in status.json."""
    content = provenance(point.config)
    point.folder.make()
    point.folder.write_json("config.json", content)
    write_status(point, "running")


def provenance(config: Config) -> dict[str, Any]:
    """Return the content of config.json: the resolved config, versions, commit and devices."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git on this machine
        commit = ""
    return {
        "config": json.loads(config.to_json()),
        "num_params": builders.num_params(config),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "git_commit": commit.strip() or None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def write_status(point: Point, state: str, reason: str = "") -> None:
    """Record a point's state: running, done, partial, failed or preempted."""
    status = point.folder.read_json("status.json") | {"state": state, "reason": reason}
    point.folder.write_json("status.json", status)


def record_failure(point: Point, error: Exception) -> str:
    """Record the reason why a point failed, and return the reason.

    Raises the error instead if the disk is full, or if not all ranks failed.
    """
    if not ranks.all_ranks_failed():
        raise error
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    with suppress(OSError):  # a full disk has no space for these either
        point.folder.write_text("error.txt", "".join(traceback.format_exception(error)))
        write_status(point, "failed", reason)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        raise error  # the other points would fail too
    return reason


def run_point(point: Point, names: Sequence[str], display: Display) -> None:
    """Train and measure a point, as far as `names` include these stages; skip finished work.

    Without the stage "train", a damaged checkpoint is not trained again, and measuring it fails.
    """

    def fail(_: Point, error: Exception) -> None:
        raise error

    if "train" in names and point.config.phase_order:
        train_points([point], display, fail)
    for measurement in measurements_of(names):
        measurement.measure_missing(point.config, point.folder, display)


def train_points(
    points: Sequence[Point], display: Display, fail: Callable[[Point, Exception], object]
) -> None:
    """Train points of one team in one program; call `fail` for each that cannot be trained."""
    by_slot, watch = {point.slot: point for point in points}, Watch()
    trainings = {p.slot: train(p.config, p.folder, display) for p in points}
    folders = [point.folder for point in points]
    slots.train_together(trainings, lambda slot, error: fail(by_slot.pop(slot), error), folders)
    seconds, compiling = watch.read()
    for point in by_slot.values():
        share = seconds / len(points), compiling / len(points)
        display.add_seconds(point.title, *share)
        log_seconds(point.folder, "train", *share)
