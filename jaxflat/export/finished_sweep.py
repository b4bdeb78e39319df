"""Read a sweep's folder as the runs and files that an experiment tracker shows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxflat.analysis.results_csv import read_results, table_path
from jaxflat.config.validation import InputError
from jaxflat.storage import curve
from jaxflat.storage.files import read_lines

FILES = ("report.html", "results.csv", "measurements.csv", "sweep.json")


@dataclass(frozen=True)
class FinishedPoint:
    """A point: its overrides, its resolved config, and its history: (step, numbers by name).

    Losses of the training curve are named as in TensorBoard, such as loss/pretrain. The others are
    the columns of results.csv, of a projected checkpoint with projected/ before the name.
    """

    name: str
    overrides: dict[str, Any]
    config: dict[str, Any]
    history: list[tuple[int, dict[str, float]]]


@dataclass(frozen=True)
class FinishedSweep:
    """A sweep: the name of its folder, its measured points, and the FILES that exist."""

    name: str
    points: list[FinishedPoint]
    files: list[Path]


def read_sweep(workdir: Path) -> FinishedSweep:
    """Return the sweep of a work directory; raise InputError if it has no results."""
    rows = read_results(table_path(workdir))
    if not rows or not (workdir / "sweep.json").is_file():
        raise InputError(
            f"WORKDIR={workdir} has no results; name a directory of python -m jaxflat.main"
        )
    listed = json.loads((workdir / "sweep.json").read_text())["points"]
    overrides = {point["name"]: point["overrides"] for point in listed}
    points = []
    for name in dict.fromkeys(row.point for row in rows):
        config = json.loads((workdir / name / "config.json").read_text())["config"]
        history = [
            (line["step"], {f"loss/{curve.tag(line['phase'], line.get('branch'))}": line["loss"]})
            for line in read_lines(workdir / name / curve.FILE)
        ]
        for row in (row for row in rows if row.point == name):
            prefix = "projected/" if row.projected else ""
            numbers = {prefix + column: value for column, value in row.values.items()}
            history.append((row.step, numbers))
        points.append(FinishedPoint(name, overrides[name], config, history))
    files = [workdir / name for name in FILES if (workdir / name).is_file()]
    return FinishedSweep(workdir.resolve().name, points, files)
