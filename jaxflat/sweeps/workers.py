"""Run the free points of a sweep, one after the other; several workers may share a sweep.

A worker acquires the lease of a point, runs the point and releases the lease.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress

from jaxflat.console import Display
from jaxflat.distributed.leases import LeaseLost
from jaxflat.distributed.preemption import Preempted
from jaxflat.runs.recovery import is_trained
from jaxflat.runs.run import (
    Done,
    Failed,
    HeldElsewhere,
    Point,
    PointOutcome,
    acquire,
    is_done,
    record_failure,
    record_start,
    run_point,
    train_points,
    write_status,
)
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps.results import write_results


def train_team(points: list[Point], display: Display) -> None:
    """Train the free points of a team in one program, if several are not trained yet.

    An error normally fails only its point: the status of the point records the reason, and
    `run_if_free` reads it from there. The error is raised if the disk is full, or if only some
    ranks failed. Raises Preempted after a signal.
    """
    if len(points) < 2 or not points[0].config.phase_order:
        return
    untrained = [p for p in points if not is_trained(p.config, p.folder)]
    if len(untrained) < 2:
        return
    with ExitStack() as leases_held:
        acquired = [p for p in untrained if not acquire(p, ("train",), leases_held)]
        running = list(acquired)

        def fail(point: Point, error: Exception) -> None:
            running.remove(point)
            display.print_line(f"{point.title}: failed, {record_failure(point, error)}")

        try:
            for point in acquired:
                record_start(point)
            if acquired:
                slots = f"program of {acquired[0].config.training.together} slots"
                display.print_line(
                    f"training {len(acquired)} points in one {slots}: {list_names(acquired)}"
                )
            train_points(acquired, display, fail)
            for point in running:
                write_status(point, "partial")
        except LeaseLost:
            display.print_line(
                f"{list_names(acquired)}: taken over by other workers while this one was suspended"
            )
        except (Preempted, OSError):
            with suppress(OSError):  # a full disk has no space for a status either
                for point in running:
                    write_status(point, "preempted")
            raise


def run_if_free(point: Point, stages: Sequence[str], display: Display) -> PointOutcome:
    """Run a point unless it has ended or another worker holds its lease; return its outcome.

    A point that failed in another worker is not run again. An error of the point is raised if the
    disk is full, or if only some ranks failed. Raises Preempted after a signal.
    """
    with ExitStack() as leases_held:
        try:
            not_run = acquire(point, stages, leases_held)
            if not_run is not None:
                return not_run
            outcome = _run_one(point, stages, display)
        except LeaseLost:
            display.print_line(
                f"{point.title}: taken over by another worker while this one was suspended"
            )
            return HeldElsewhere()
    write_results(Folder(point.folder.path.parent))
    return outcome


def _run_one(point: Point, stages: Sequence[str], display: Display) -> Done | Failed:
    """Run a point whose lease this worker holds."""
    if not display.console.is_terminal:  # there is no progress bar
        display.print_line(f"{point.title}: started")
    record_start(point)
    try:
        run_point(point, stages, display)
    except Preempted:
        write_status(point, "preempted")
        raise
    except LeaseLost:
        raise
    except Exception as error:
        return Failed(record_failure(point, error))
    point.folder.delete("error.txt")
    write_status(point, "done" if is_done(point) else "partial")
    return Done()


def list_names(points: list[Point]) -> str:
    """Return the titles of the first three points, and the number of the others, for a message."""
    more = f" and {len(points) - 3} more" if len(points) > 3 else ""
    return ", ".join(point.title for point in points[:3]) + more
