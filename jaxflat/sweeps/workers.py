"""A worker acquires the lease of a point, runs the point and releases the lease.

Several workers share a sweep.
"""

import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from jaxflat.console import Display
from jaxflat.distributed import leases, ranks
from jaxflat.distributed.preemption import Preempted
from jaxflat.runs.measurements import read_status
from jaxflat.runs.provenance import provenance
from jaxflat.runs.recovery import is_trained
from jaxflat.runs.run import Point, is_done, run_point, train_points, write_status
from jaxflat.storage.files import DISK_FULL, write_json, write_whole
from jaxflat.sweeps.results import write_results


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


def train_team(
    points: list[Point], point_leases: dict[str, leases.Lease], display: Display
) -> None:
    """Train the free points of a team in one program, if several are not trained yet.

    If a point fails, its status records the reason, and `run_if_free` reads it from there. Raises
    Preempted after a signal, and a point's error if the disk is full or not all ranks failed.
    """
    if len(points) < 2 or not points[0].config.phase_order:
        return
    untrained = [p for p in points if not is_trained(p.config, p.directory)]
    if len(untrained) < 2:
        return
    with ExitStack() as leases_held:
        acquired = [
            p for p in untrained if not _acquire(p, point_leases[p.name], ("train",), leases_held)
        ]
        running = list(acquired)

        def fail(point: Point, error: Exception) -> None:
            running.remove(point)
            display.print_line(f"{point.name}: failed, {_record_failure(point, error)}")

        try:
            for point in acquired:
                _record_start(point)
            if acquired:
                slots = f"program of {acquired[0].config.training.together} slots"
                display.print_line(
                    f"training {len(acquired)} points in one {slots}: {list_names(acquired)}"
                )
            train_points(acquired, display, fail)
            for point in running:
                write_status(point.directory, "partial")
        except leases.LeaseLost:
            display.print_line(
                f"{list_names(acquired)}: taken over by other workers while this one was suspended"
            )
        except (Preempted, OSError):
            with suppress(OSError):  # a full disk has no space for a status either
                for point in running:
                    write_status(point.directory, "preempted")
            raise


def run_if_free(
    point: Point, lease: leases.Lease, stages: Sequence[str], display: Display
) -> PointOutcome:
    """Run a point unless it has ended or another worker holds its lease; return its outcome.

    A point that failed in another worker is not run again. Raises Preempted after a signal, and the
    point's error if the disk is full or not all ranks failed.
    """
    with ExitStack() as leases_held:
        try:
            not_run = _acquire(point, lease, stages, leases_held)
            if not_run is not None:
                return not_run
            outcome = _run_one(point, stages, display)
        except leases.LeaseLost:
            display.print_line(
                f"{point.name}: taken over by another worker while this one was suspended"
            )
            return HeldElsewhere()
    write_results(point.directory.parent)
    return outcome


@ranks.on_rank_0
def _acquire(
    point: Point, lease: leases.Lease, stages: Sequence[str], leases_held: ExitStack
) -> PointOutcome | None:
    """Acquire a point's lease and return None, or return the outcome that prevents running it."""
    is_free = lease.is_available()
    if is_done(point, stages):
        return Done()
    if not is_free:
        return HeldElsewhere()
    status = read_status(point.directory)
    if lease.was_acquired() and status.get("state") == "failed":
        return Failed(status["reason"])
    return None if leases_held.enter_context(lease.try_acquire()) else HeldElsewhere()


def _run_one(point: Point, stages: Sequence[str], display: Display) -> Done | Failed:
    """Run a point whose lease this worker holds."""
    if not display.console.is_terminal:  # there is no progress bar
        display.print_line(f"{point.name}: started")
    _record_start(point)
    try:
        run_point(point, stages, display)
    except Preempted:
        write_status(point.directory, "preempted")
        raise
    except leases.LeaseLost:
        raise
    except Exception as error:
        return Failed(_record_failure(point, error))
    ranks.on_rank_0(leases.assert_owned)()
    (point.directory / "error.txt").unlink(missing_ok=True)
    write_status(point.directory, "done" if is_done(point) else "partial")
    return Done()


def _record_start(point: Point) -> None:
    """Make a point's folder; write its config.json, and the state "running" in status.json."""
    _make_folder(point.directory)
    write_status(point.directory, "running")
    write_json(point.directory / "config.json", provenance(point.config))


def _record_failure(point: Point, error: Exception) -> str:
    """Record the reason why a point failed, and return the reason.

    Raises the error instead if the disk is full, or if not all ranks failed.
    """
    if not ranks.all_ranks_failed():
        raise error
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    with suppress(OSError):  # a full disk has no space for these either
        write_whole(point.directory / "error.txt", "".join(traceback.format_exception(error)))
        write_status(point.directory, "failed", reason)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        raise error  # the other points would fail too
    return reason


@ranks.on_rank_0
def _make_folder(directory: Path) -> None:
    """Make a point's folder, and delete incomplete files of a process that died."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(".*.*"):  # temporary files of `files.write_whole`
        path.unlink(missing_ok=True)


def list_names(points: list[Point]) -> str:
    """Return the names of the first three points, and the number of the others, for a message."""
    more = f" and {len(points) - 3} more" if len(points) > 3 else ""
    return ", ".join(point.name for point in points[:3]) + more
