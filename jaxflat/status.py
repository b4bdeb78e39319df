"""The command: python -m jaxflat.status WORKDIR [--json=FILE]"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Column, Table

from jaxflat.config.validation import InputError
from jaxflat.console import (
    CommandParser,
    Kind,
    PointTime,
    command,
    estimate_remaining,
    make_console,
    point_kind,
)
from jaxflat.distributed import leases
from jaxflat.storage.files import read_lines, write_json


@dataclass(frozen=True)
class PointStatus:
    """The progress of a point of a sweep.

    arm: the name of its arm, "" if the sweep gives none. state: waiting, running, done, partial
    (some stages only), preempted, failed, or died (recorded as running, but no process holds its
    lease). worker: the process that runs it. step: finished training steps, of num_steps. loss: at
    that step, in nats. seconds: the time of its finished stages; while it runs, plus
    its share of the worker's time since the last of them, or since the attempt started. compiling:
    those spent on compilation. idle: seconds since its last write; None before the first. kind: see
    `console.Kind`.
    """

    name: str
    arm: str
    state: str
    reason: str
    worker: str | None
    step: int
    num_steps: int
    loss: float | None
    seconds: float
    compiling: float
    idle: float | None
    kind: Kind


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the flags; raise InputError if one is wrong."""
    parser = CommandParser(
        prog="python -m jaxflat.status",
        description="Show the points of a sweep: their progress, which failed and why, and the "
        "remaining time. The command only reads files, so the sweep may be running.",
    )
    parser.add_argument("workdir", type=Path, metavar="WORKDIR", help="directory of a sweep")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the points to FILE")
    return parser.parse_args(arguments)


@command(OSError, ValueError, KeyError)
def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    flags = parse_arguments(arguments)
    points = read_points(flags.workdir, now=time.time())
    if flags.json:
        write_json(flags.json, [asdict(point) for point in points])
    console = make_console()
    console.print(points_table(points))
    for point in points:
        if point.state == "failed":
            console.print(f"failed: {point.name}: {point.reason}", style="red", markup=False)
    console.print(summary(points), highlight=False)
    return 0


def read_points(workdir: Path, now: float) -> list[PointStatus]:
    """Return the points of a sweep in order, from their files at the time `now` (as time.time).

    Raises InputError if the directory holds no sweep.
    """
    path = workdir / "sweep.json"
    if not path.is_file():
        raise InputError(
            f"WORKDIR={workdir} has no sweep.json. A sweep that has just started writes it once "
            "its config is checked; otherwise name a directory of python -m jaxflat.main."
        )
    points = json.loads(path.read_text())["points"]
    directories = [workdir / point["name"] for point in points]
    found = [(directory, *_status_and_worker(directory, now)) for directory in directories]
    num_points = Counter(worker for _, _, worker in found)
    return [
        _read_point(directory, point, status, worker, num_points[worker], now)
        for point, (directory, status, worker) in zip(points, found, strict=True)
    ]


def remaining_seconds(points: list[PointStatus]) -> float | None:
    """Return the estimated time for the remaining points with the workers that run now.

    See `console.estimate_remaining`. None before the first is done, or if points remain and no
    worker runs.
    """
    done = [
        PointTime(point.kind, point.seconds - point.compiling, point.compiling)
        for point in points
        if point.state == "done"
    ]
    workers = {point.worker for point in points if point.worker}
    left = [point for point in points if point.state not in ("done", "failed")]
    if not done or (left and not workers):
        return None
    spent = [(point.kind, point.seconds - point.compiling) for point in left]
    return estimate_remaining(done, spent) / max(len(workers), 1)


def summary(points: list[PointStatus]) -> str:
    """Return one line with the number of points in each state and the remaining time."""
    counts = Counter(point.state for point in points)
    text = ", ".join(f"{number} {state}" for state, number in counts.most_common())
    if counts["done"] + counts["failed"] == len(points):
        return text
    if not any(point.worker for point in points):
        return f"{text}. No worker is running; rerun the original command to continue."
    seconds = remaining_seconds(points)
    left = "" if seconds is None else f"; about {timedelta(seconds=round(seconds))} left"
    return f"{text}{left}"


def points_table(points: list[PointStatus]) -> Table:
    """Return a table with a row for each point that has started; losses in nats.

    It has a column of arms if some have names.
    """
    named = any(point.arm for point in points)
    arm, names = ["Arm"] if named else [], ("State", "Step", "Loss", "Time", "Written")
    columns = [Column(name, overflow="fold") for name in (*arm, "Point")]
    columns += [Column(name, no_wrap=True) for name in names]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for point in points:
        if point.state != "waiting":
            table.add_row(
                *([escape(point.arm)] if named else []),
                escape(point.name),
                point.state,
                f"{point.step:,}/{point.num_steps:,}" if point.num_steps else "–",
                "–" if point.loss is None else f"{point.loss:.4f}",
                str(timedelta(seconds=round(point.seconds))),
                "–" if point.idle is None else f"{timedelta(seconds=round(point.idle))} ago",
            )
    return table


def _status_and_worker(directory: Path, now: float) -> tuple[dict[str, Any], str | None]:
    """Return a point's status, and the process that runs it if there is one."""
    status = _read(directory / "status.json")
    if status.get("state") != "running":
        return status, None
    if worker := leases.find_owner(directory, now):
        return status, worker
    status = _read(directory / "status.json")  # it may have ended since the first read
    return status | ({"state": "died"} if status["state"] == "running" else {}), None


def _read_point(
    directory: Path,
    point: dict[str, Any],
    status: dict[str, Any],
    worker: str | None,
    num_points: int,
    now: float,
) -> PointStatus:
    """Return the progress of a point whose worker runs `num_points` points."""
    config = _read(directory / "config.json")
    phases = config.get("config", {}).get("phases", {})
    order = config.get("config", {}).get("phase_order", [])
    curve = list(read_lines(directory / "metrics.jsonl"))
    trunk = [line for line in curve if "branch" not in line]
    written = [path.stat().st_mtime for path in directory.glob("[!.]*.json*")]
    timing = list(read_lines(directory / "timing.jsonl"))
    seconds = sum(line["seconds"] for line in timing)
    if worker:  # timing.jsonl lists finished stages only
        marks = [directory / name for name in ("config.json", "timing.jsonl")]
        since = max((path.stat().st_mtime for path in marks if path.exists()), default=now)
        seconds += max(now - since, 0) / num_points
    return PointStatus(
        name=directory.name,
        arm=point.get("arm", ""),
        state=status.get("state", "waiting"),
        reason=status.get("reason", ""),
        worker=worker,
        step=trunk[-1]["step"] if trunk else 0,
        num_steps=sum(phases[phase]["steps"] for phase in order),
        loss=trunk[-1]["loss"] if trunk else None,
        seconds=seconds,
        compiling=sum(line.get("compiling", 0.0) for line in timing),
        idle=max(now - max(written), 0) if written else None,
        kind=point_kind(point["overrides"]),
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
