"""Collect the measurements of a sweep: results.csv, and a summary line for each run."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat.distributed.leases import acquire_lease
from jaxflat.runs import trajectory
from jaxflat.runs.measurements import checkpoint_of, column_of, current_lines
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.files import write_whole
from jaxflat.storage.leased_folder import Folder


def write_results(folder: Folder) -> None:
    """Rebuild results.csv from the lines that every point measured under its present settings.

    One worker does this at a time; otherwise an older table could overwrite a newer one.
    """
    path = folder.path / "results.csv"

    def write() -> None:
        with acquire_lease(path) as lease:
            write_whole(path, _table(folder.path), lease.assert_owned)

    folder.on_rank_0(write)


def _table(workdir: Path) -> str:
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    for point in points:
        named = {"arm": point["arm"]} if "arm" in point else {}
        point["overrides"] = named | point["overrides"]
    swept = list(dict.fromkeys(key for point in points for key in point["overrides"]))
    rows: list[dict[str, Any]] = []
    for point in points:
        folder = Folder(workdir / point["name"])
        if stored := folder.read_json("config.json"):
            rows += _rows(point, folder, stored, swept)
    names = dict.fromkeys(name for row in rows for name in row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _rows(
    point: dict[str, Any], folder: Folder, stored: dict[str, Any], swept: list[str]
) -> list[dict[str, Any]]:
    """Return a point's rows of results.csv, one for each measured checkpoint."""
    config = FrozenConfigDict(stored["config"])
    measured: dict[Checkpoint, dict[str, float]] = {}
    ends = {s.projected: s for s in trajectory.measured_checkpoints(config)}.values()
    for section, recorded in point["measured"].items():
        for line in current_lines(folder, section, recorded):
            values = measured.setdefault(checkpoint_of(line), {})
            if column := column_of(line):
                values[column] = line["mean"]
                values[f"{column}_sem"] = line["sem"]
    return [
        {
            "point": point["name"],
            **{key: point["overrides"].get(key, "") for key in swept},
            "seed": config.seed,
            "step": checkpoint.step,
            "projected": int(checkpoint.projected),
            "last": int(checkpoint in ends),
            "num_params": stored["num_params"],
            "sentences_seen": trajectory.sentences_seen(config, checkpoint),
            **values,
        }
        for checkpoint, values in sorted(measured.items())
    ]


def summary(folder: Folder) -> str:
    """Return a point's last excess loss and Hessian trace as a line of text."""
    parts = []
    for name, column in (("evaluation", "excess_loss"), ("flatness", "hessian_trace")):
        lines = [r for r in folder.read_lines(f"{name}.jsonl") if column_of(r) == column]
        parts += [f"{column} {r['mean']:.4g} (SEM {r['sem']:.2g})" for r in lines[-1:]]
    return ", ".join(parts) or "done"
