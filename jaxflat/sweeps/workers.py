"""A worker takes a point, runs it and releases it; several workers share a sweep."""

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
from jaxflat.sweeps.results import gather


@dataclass(frozen=True)
class Done:
    """Every stage of the point is done."""


@dataclass(frozen=True)
class Failed:
    """The point failed, for this reason."""

    reason: str


@dataclass(frozen=True)
class HeldElsewhere:
    """Another worker holds the point."""


PointOutcome = Done | Failed | HeldElsewhere


def train_team(points: list[Point], point_locks: dict[str, leases.Lease], display: Display) -> None:
    """Train the free points of a team in one program, if at least two are untrained.

    The reason of a failed point is in its status, where `run_if_free` finds it.
    """
    if len(points) < 2 or not points[0].config.phase_order:
        return
    untrained = [p for p in points if not is_trained(p.config, p.directory)]
    if len(untrained) < 2:
        return
    with ExitStack() as held:
        taken = [p for p in untrained if not _take(p, point_locks[p.name], ("train",), held)]
        going = list(taken)

        def fail(point: Point, error: Exception) -> None:
            going.remove(point)
            display.line(f"{point.name}: failed, {_fail(point, error)}")

        try:
            for point in taken:
                _begin(point)
            if taken:
                num_slots = taken[0].config.training.together
                text = f"training {len(taken)} in one program of {num_slots} slots"
                display.line(f"{text}: {names(taken)}")
            train_points(taken, display, fail)
            for point in going:
                write_status(point.directory, "partial")
        except leases.LeaseLost:
            display.line(f"{names(taken)}: other workers took over while this one was stopped")
        except (Preempted, OSError):
            with suppress(OSError):  # the disk may be full
                for point in going:
                    write_status(point.directory, "preempted")
            raise


def run_if_free(
    point: Point, lock: leases.Lease, stages: Sequence[str], display: Display
) -> PointOutcome:
    """Run a point unless it has ended or another worker holds it; return what came of it.

    A point that failed with another worker is not tried again.
    """
    with ExitStack() as held:
        try:
            ended = _take(point, lock, stages, held)
            if ended is not None:
                return ended
            outcome = _run_one(point, stages, display)
        except leases.LeaseLost:
            display.line(f"{point.name}: another worker took over while this one was stopped")
            return HeldElsewhere()
    gather(point.directory.parent)
    return outcome


@ranks.on_rank_0
def _take(
    point: Point, lock: leases.Lease, stages: Sequence[str], held: ExitStack
) -> PointOutcome | None:
    """Take a point's lock and return None, or return why the point is not to run here."""
    is_free = lock.is_available()
    if is_done(point, stages):
        return Done()
    if not is_free:
        return HeldElsewhere()
    status = read_status(point.directory)
    if lock.was_acquired() and status.get("state") == "failed":
        return Failed(status["reason"])
    return None if held.enter_context(lock.try_acquire()) else HeldElsewhere()


def _run_one(point: Point, stages: Sequence[str], display: Display) -> Done | Failed:
    """Run a point whose lock is held."""
    if not display.console.is_terminal:  # there are no bars
        display.line(f"{point.name}: begins")
    _begin(point)
    try:
        run_point(point, stages, display)
    except Preempted:
        write_status(point.directory, "preempted")
        raise
    except leases.LeaseLost:
        raise
    except Exception as error:
        return Failed(_fail(point, error))
    ranks.on_rank_0(leases.assert_owned)()
    (point.directory / "error.txt").unlink(missing_ok=True)
    write_status(point.directory, "done" if is_done(point) else "partial")
    return Done()


def _begin(point: Point) -> None:
    """Write the config of a point, and that it runs."""
    _make_folder(point.directory)
    write_status(point.directory, "running")
    write_json(point.directory / "config.json", provenance(point.config))


def _fail(point: Point, error: Exception) -> str:
    """Record why a point failed, and return the reason.

    Raises the error if the disk is full, or if other processes of the run did not fail.
    """
    if not ranks.all_ranks_failed():
        raise error
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    with suppress(OSError):  # the disk may be full
        write_whole(point.directory / "error.txt", "".join(traceback.format_exception(error)))
        write_status(point.directory, "failed", reason)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        raise error  # the other points would find no room
    return reason


@ranks.on_rank_0
def _make_folder(directory: Path) -> None:
    """Make a point's folder, or delete the unfinished files of a process that died."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(".*.*"):  # of `files.write_whole`
        path.unlink(missing_ok=True)


def names(points: list[Point]) -> str:
    """Return the names of points for a line of text: the first three, and how many more."""
    more = f" and {len(points) - 3} more" if len(points) > 3 else ""
    return ", ".join(point.name for point in points[:3]) + more
