"""The points of a sweep: expand, check, share out, run, resume, gather.

A point is its overrides, not its place in the list: the same overrides find the same folder again.
"""

import hashlib
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxflat import corpus, experiment, hosts, locks, preemption
from jaxflat.checkpoint import NO_ROOM
from jaxflat.config import Config, Sweep
from jaxflat.metrics import Display, write_json, write_whole
from jaxflat.points import expand, record_sweep, select
from jaxflat.preemption import Preempted, deferred
from jaxflat.results import gather, summary
from jaxflat.run import STAGES, Point, is_done, read_status, run_point, write_status
from jaxflat.validation import InputError

PACKAGES = ("jaxflat", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@deferred()
def run(
    config: Config,
    points: Sweep,
    workdir: Path | str,
    *,
    stages: Sequence[str] = STAGES,
    selection: str = "",
) -> dict[str, str]:
    """Run the points of a sweep that are not done yet; return the reasons of those that failed.

    Everything is checked before anything starts. `selection` as in the command's --points. Other
    processes may run the same sweep at the same time: each point is run by one of them, and all
    return when all points have ended. Raises InputError on unusable input, Preempted where a signal
    came, OSError where the disk is full: it then goes on like one that was preempted, as it does
    after Lost: this process slept, and another took over a file or language that it was writing.
    """
    workdir = Path(workdir)
    expanded = expand(config, points, workdir)
    chosen = select(expanded, selection)
    _check_agreed(chosen, stages)
    record_sweep(config, expanded, workdir)
    with Display(len(chosen)) as display:
        undone = [point for point in chosen if not is_done(point, stages)]
        for section in dict.fromkeys(point.config.language for point in undone):
            _prepare(section, display)
        failures = _share(chosen, stages, display)
    gather(workdir)
    return failures


def _check_agreed(points: list[Point], stages: Sequence[str]) -> None:
    """Raise InputError where the processes that make this run are not told to do the same."""
    told = repr((stages, [(point.name, point.config.to_json()) for point in points]))
    digest = hashlib.sha256(told.encode()).hexdigest()
    if any(other != digest for other in hosts.gather(digest, "points")):
        raise InputError(
            "--config, --points or --stages: the processes of this run have different ones; start "
            "the same command in all"
        )


@hosts.first
def _prepare(language: Config, display: Display) -> None:
    try:
        corpus.prepare(language, display)
    except (ValueError, FloatingPointError, OSError) as error:
        raise InputError(str(error)) from error


def _share(points: list[Point], stages: Sequence[str], display: Display) -> dict[str, str]:
    """Run each point, or see another worker run it; return the reasons of those that failed."""
    point_locks = {point.name: locks.Lock(point.directory) for point in points}
    reasons: dict[str, str] = {}
    while left := [point for point in points if point.name not in reasons]:
        num_ended = len(reasons)
        for point in left:
            preemption.check()
            reason = _attempt(point, point_locks[point.name], stages, display)
            if reason is not None:
                reasons[point.name] = reason
                outcome = f"failed, {reason}" if reason else summary(point.directory)
                display.finish_point(f"{point.name}: {outcome}")
        if len(reasons) == num_ended:
            names = ", ".join(point.name for point in left[:3]) + ", ..." * (len(left) > 3)
            display.wait(
                f"waiting for {names}: with another worker, or one that died; "
                f"taken over after {locks.LEASE:g} seconds without a sign of life"
            )
            time.sleep(locks.POLL)
    return {name: reason for name, reason in reasons.items() if reason}


def _attempt(point: Point, lock: locks.Lock, stages: Sequence[str], display: Display) -> str | None:
    """Run a point unless it has ended; return why it failed, or "" where it did not.

    None where it is with another worker. One that failed there is not tried again.
    """
    with ExitStack() as held:
        try:
            taken, ended = _take(point, lock, stages, held)
            if not taken:
                return ended
            reason = _run_one(point, stages, display)
        except locks.Lost:
            display.line(f"{point.name}: taken over by another worker, while this one slept")
            return None
    gather(point.directory.parent)
    return reason


@hosts.first
def _take(
    point: Point, lock: locks.Lock, stages: Sequence[str], held: ExitStack
) -> tuple[bool, str | None]:
    """Return whether the point is to run here, its lock held; if not, what `_attempt` returns."""
    is_free = lock.look()
    if is_done(point, stages):
        return False, ""
    if not is_free:
        return False, None
    status = read_status(point.directory)
    if lock.was_taken() and status.get("state") == "failed":
        return False, status["reason"]
    return held.enter_context(lock.taken()), None


def _run_one(point: Point, stages: Sequence[str], display: Display) -> str:
    """Run a point; return why it failed, or "" where it did not."""
    _make_folder(point.directory)
    if not display.console.is_terminal:  # where no bars show it
        display.line(f"{point.name}: begins")
    write_status(point.directory, "running")
    write_json(point.directory / "config.json", _provenance(point.config))
    try:
        run_point(point, stages, display)
    except Preempted:
        write_status(point.directory, "preempted")
        raise
    except locks.Lost:
        raise
    except Exception as error:
        if not hosts.failed_together():
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        with suppress(OSError):  # a full disk has no room for these either
            write_whole(point.directory / "error.txt", traceback.format_exc())
            write_status(point.directory, "failed", reason)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise  # nor would the other points find any
        return reason
    hosts.first(locks.check)()
    (point.directory / "error.txt").unlink(missing_ok=True)
    write_status(point.directory, "done" if is_done(point) else "partial")
    return ""


@hosts.first
def _make_folder(directory: Path) -> None:
    """Make a point's folder, or clear it of what was half written when a process died."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(".*.*"):  # of `metrics.write_whole`
        path.unlink(missing_ok=True)


def _provenance(config: Config) -> dict[str, Any]:
    """Return what config.json holds: the resolved config and what it runs on."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git on this machine
        commit = ""
    return {
        "config": json.loads(config.to_json()),
        "num_params": experiment.num_params(config),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "git_commit": commit.strip() or None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
