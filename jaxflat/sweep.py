"""The points of a sweep: expand, check, run, resume, gather.

A point is its overrides, not its place in the list: the same overrides find the same folder again.
"""

import csv
import io
import json
import platform
import subprocess
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from jaxflat import corpus, experiment, hosts, trajectory
from jaxflat.checkpoint import NO_ROOM
from jaxflat.config import Config, Sweep
from jaxflat.metrics import Display, read_lines, write_json, write_whole
from jaxflat.points import expand, record_sweep, select
from jaxflat.preemption import Preempted
from jaxflat.run import (
    STAGES,
    Point,
    is_done,
    read_status,
    run_point,
    snapshot_of,
    write_status,
)
from jaxflat.trajectory import Snapshot
from jaxflat.validation import InputError

PACKAGES = ("jaxflat", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def run(
    config: Config,
    points: Sweep,
    workdir: Path | str,
    *,
    stages: Sequence[str] = STAGES,
    selection: str = "",
) -> dict[str, str]:
    """Run the points of a sweep that are not done yet; return the reasons of those that failed.

    Everything is checked before anything starts. `selection` as in the command's --points.
    Raises InputError on unusable input, Preempted where a signal came, OSError where the disk is
    full: it then goes on like one that was preempted.
    """
    workdir = Path(workdir)
    expanded = expand(config, points, workdir)
    chosen = select(expanded, selection)
    record_sweep(config, expanded, workdir)
    failures: dict[str, str] = {}
    with Display(len(chosen)) as display:
        undone = {point.name: point for point in chosen if not is_done(point, stages)}
        for section in dict.fromkeys(point.config.language for point in undone.values()):
            _prepare(section, display)
        for point in chosen:
            reason = _run_one(point, stages, display) if point.name in undone else ""
            gather(workdir)
            outcome = f"failed, {reason}" if reason else _summary(point.directory)
            display.finish_point(f"{point.name}: {outcome}")
            if reason:
                failures[point.name] = reason
    return failures


@hosts.first
def _prepare(language: Config, display: Display) -> None:
    try:
        corpus.prepare(language, display)
    except (ValueError, FloatingPointError, OSError) as error:
        raise InputError(str(error)) from error


@hosts.first
def gather(workdir: Path) -> None:
    """Rebuild results.csv from what every point has measured under its present settings."""
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    swept = list(dict.fromkeys(key for point in points for key in point["overrides"]))
    rows: list[dict[str, Any]] = []
    for point in points:
        directory = workdir / point["name"]
        if (directory / "config.json").exists():
            rows += _rows(point, directory, swept)
    names = dict.fromkeys(name for row in rows for name in row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(workdir / "results.csv", buffer.getvalue())


def _rows(point: dict[str, Any], directory: Path, swept: list[str]) -> list[dict[str, Any]]:
    """Return a point's rows of results.csv, one for each measured checkpoint."""
    stored = json.loads((directory / "config.json").read_text())
    config = FrozenConfigDict(stored["config"])
    measured: dict[Snapshot, dict[str, float]] = {}
    under = read_status(directory).get("measured", {})
    ends = {s.projected: s for s in trajectory.snapshots(config)}.values()
    current = [name for name, settings in point["measured"].items() if under.get(name) == settings]
    for name in current:
        for line in read_lines(directory / f"{name}.jsonl"):
            values = measured.setdefault(snapshot_of(line), {})
            values[line["measure"]] = line["mean"]
            values[f"{line['measure']}_sem"] = line["sem"]
    return [
        {
            "point": point["name"],
            **{key: point["overrides"].get(key, "") for key in swept},
            "seed": config.seed,
            "step": snapshot.step,
            "projected": int(snapshot.projected),
            "last": int(snapshot in ends),
            "num_params": stored["num_params"],
            "sentences_seen": trajectory.sentences_seen(config, snapshot),
            **values,
        }
        for snapshot, values in sorted(measured.items())
    ]


def _run_one(point: Point, stages: Sequence[str], display: Display) -> str:
    """Run a point; return why it failed, or "" where it did not."""
    point.directory.mkdir(parents=True, exist_ok=True)
    write_json(point.directory / "config.json", _provenance(point.config))
    write_status(point.directory, "running")
    try:
        run_point(point, stages, display)
    except Preempted:
        write_status(point.directory, "preempted")
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
    (point.directory / "error.txt").unlink(missing_ok=True)
    write_status(point.directory, "done" if is_done(point) else "partial")
    return ""


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


def _summary(directory: Path) -> str:
    """Return a point's last measurements in a line."""
    parts = []
    for name, measure in (("evaluation", "excess_loss"), ("flatness", "hessian_trace")):
        lines = [r for r in read_lines(directory / f"{name}.jsonl") if r["measure"] == measure]
        parts += [f"{measure} {r['mean']:.4g} (SEM {r['sem']:.2g})" for r in lines[-1:]]
    return ", ".join(parts) or "done"
