"""Collect the measurements of a sweep: measurements.csv, its pivot results.csv, summary lines."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat.config.base import LABELINGS
from jaxflat.distributed.leases import acquire_lease
from jaxflat.runs import trajectory
from jaxflat.runs.measurements import Line, checkpoint_of, column_of, current_lines
from jaxflat.runs.probe_sets import GIVEN
from jaxflat.storage.files import write_whole
from jaxflat.storage.leased_folder import Folder

Row = dict[str, Any]

NUMBER = (
    *("measure", "group", "task", "labeling", "shots", "column"),
    *("value", "sem", "n", "over", "settings"),
)
"""The columns of measurements.csv that describe a number; those before them name a checkpoint."""
_LABELING = "|".join((*LABELINGS, GIVEN))
_OF_TASK = re.compile(
    rf"(?P<measure>[^/]+)/(?P<task>.+?)(\.(?P<labeling>{_LABELING})(/(?P<shots>\d+))?)?"
)


def write_results(folder: Folder) -> None:
    """Rebuild both tables from the lines that every point measured under its present settings.

    One worker does this at a time; otherwise an older table could overwrite a newer one.
    """
    path = folder.path / "results.csv"

    def write() -> None:
        with acquire_lease(path) as lease:
            rows = list(_measurements(folder.path))
            write_whole(folder.path / "measurements.csv", _csv_text(rows), lease.assert_owned)
            write_whole(path, _csv_text(pivot(rows)), lease.assert_owned)

    folder.on_rank_0(write)


def pivot(rows: Iterable[Row]) -> list[Row]:
    """Return a row for each checkpoint: what names it, then each number and its standard error."""
    by_checkpoint: dict[tuple[str, int, int], Row] = {}
    for row in rows:
        checkpoint = {name: value for name, value in row.items() if name not in NUMBER}
        key = row["point"], row["step"], row["projected"]
        wide = by_checkpoint.setdefault(key, checkpoint)
        if column := row["column"]:
            wide |= {column: row["value"], f"{column}_sem": row["sem"]}
    return list(by_checkpoint.values())


def _measurements(workdir: Path) -> Iterator[Row]:
    """Yield the rows of measurements.csv: by point in the order of sweep.json, by checkpoint."""
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    for point in points:
        named = {"arm": point["arm"]} if "arm" in point else {}
        point["overrides"] = named | point["overrides"]
    swept = list(dict.fromkeys(key for point in points for key in point["overrides"]))
    for point in points:
        folder = Folder(workdir / point["name"])
        if stored := folder.read_json("config.json"):
            yield from _point_rows(point, folder, stored, swept)


def _point_rows(
    point: dict[str, Any], folder: Folder, stored: dict[str, Any], swept: list[str]
) -> list[Row]:
    config = FrozenConfigDict(stored["config"])
    ends = {s.projected: s for s in trajectory.measured_checkpoints(config)}.values()
    lines = [
        (checkpoint_of(line), section, line)
        for section, recorded in point["measured"].items()
        for line in current_lines(folder, section, recorded)
    ]
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
            **_number(section, line, point.get("settings", {}).get(section, {})),
        }
        for checkpoint, section, line in sorted(lines, key=lambda found: found[0])
    ]


def _number(section: str, line: Line, settings: dict[str, str]) -> Row:
    """Return the number of a line of <section>.jsonl; it is empty if the line has no estimate.

    settings: the digest of each measure's settings, seeds apart. Up to version 0.1.0, lines did not
    name their measure, and their digest is empty.
    """
    column = column_of(line)
    return (
        dict.fromkeys(NUMBER, "")
        | (_parts(section, column) if column else {"measure": line["measure"]})
        | {
            "column": column or "",
            "value": line.get("mean", ""),
            "sem": line.get("sem", ""),
            "n": line.get("num_samples", ""),
            "over": line.get("over", ""),
            "settings": settings.get(line["measure"], ""),
        }
    )


def _parts(section: str, column: str) -> dict[str, str]:
    """Return what a column of results.csv says: its measure, and its group or its task."""
    if section == "probes" and (parts := _OF_TASK.fullmatch(column)):
        return parts.groupdict(default="")
    name, at, model = column.partition("@")
    measure, _, group = name.partition("/")
    return {"measure": measure + at + model, "group": group}


def _csv_text(rows: list[Row]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def summary(folder: Folder) -> str:
    """Return a point's last excess loss and Hessian trace as a line of text.

    Where the excess is not known, it has the loss.
    """
    parts = []
    for name, columns in (
        ("evaluation", ("excess_loss", "loss")),
        ("flatness", ("hessian_trace",)),
    ):
        lines = {column_of(line): line for line in folder.read_lines(f"{name}.jsonl")}
        found = [(column, lines[column]) for column in columns if column in lines][:1]
        parts += [f"{c} {line['mean']:.4g} (SEM {line['sem']:.2g})" for c, line in found]
    return ", ".join(parts) or "no loss and no trace measured"
