"""The interactive figure: what it draws, as data, and the library that draws it."""

import csv
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert

from jaxflat.analysis.comparison import Comparison, matched_pairs
from jaxflat.analysis.effects import common_column
from jaxflat.analysis.page import drawing
from jaxflat.analysis.page.settings import Provenance
from jaxflat.analysis.pairs import Pair
from jaxflat.analysis.results_csv import LANGUAGE, PRIMARY_ACCURACY, SEEDS, read_number
from jaxflat.analysis.statistics.intervals import student_quantile

MOST_CHARACTERS = 1_200_000  # of all values of a page; with the library it stays below 3 MB
TASK_MEAN = "accuracy, mean over tasks"  # the only column that results.csv does not have
ABOUT = ("point", "arm", "step", "projected", "last", *SEEDS)
LEFT_OUT = "not compared"


@cache
def runtime() -> str:
    """Return Vega-Embed with Vega and Vega-Lite as one script that sets window.vegaEmbed."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def explorer_data(
    comparison: Comparison, made: Provenance, results: Path, most_characters: int
) -> dict[str, Any] | None:
    """Return each row of results.csv with its arm, and the columns that axes can show.

    `columns` holds a list of numbers or texts for each column, null where a cell is empty. `arm`
    and `group` have a number for each row. Rows of one group differ only in their seeds and
    languages, over which the page averages. `quantiles` has Student's t for n values at place n.
    Of its columns the first are kept, up to most_characters. Returns None without results.
    """
    header, records = _read(results)
    if not records:
        return None
    cells = [*comparison.cells, *comparison.controls]
    places = {
        (row.point, row.step, row.projected): (cell.arm, row.values.get(PRIMARY_ACCURACY))
        for cell in cells
        for row in cell.rows.values()
    }
    found = [places.get(_key(record), (LEFT_OUT, None)) for record in records]
    arms = [*comparison.arms, *(cell.arm for cell in comparison.controls)]
    if any(arm == LEFT_OUT for arm, _ in found):
        arms.append(LEFT_OUT)
    columns: dict[str, list[Any]] = {}
    if any(mean is not None for _, mean in found):
        columns[TASK_MEAN] = [mean for _, mean in found]
    columns |= {name: [_value(record[name]) for record in records] for name in header}
    columns = {
        name: values for name, values in columns.items() if any(v is not None for v in values)
    }
    swept = [name for name in header[: header.index("step")] if name not in ABOUT]
    kept = _within(columns, most_characters)
    # Rows that are not compared share one arm, so their settings tell them apart.
    groups = [
        (arm, *_key(record)[1:], *(record[name] for name in swept if name != LANGUAGE))
        for (arm, _), record in zip(found, records, strict=True)
    ]
    loss = comparison.scale.column
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return {
        "columns": {name: columns[name] for name in kept},
        "settings": [name for name in swept if name in kept],
        "arms": [
            {"name": arm, "color": drawing.COLORS[place % len(drawing.COLORS)]}
            for place, arm in enumerate(arms)
        ],
        "arm": [arms.index(arm) for arm, _ in found],
        "group": [numbers[group] for group in groups],
        "command": made.command,
        "quoted": [shlex.quote(record["point"]) for record in records],
        "pairs": [_points(pair) for pair in matched_pairs(comparison)],
        "quantiles": [0.0, 0.0, *(student_quantile(n) for n in range(2, len(records) + 1))][:200],
        "x": next((n for n in (common_column(comparison.cells), loss) if n in kept), kept[0]),
        "y": next((n for n in (TASK_MEAN, loss) if n in kept), kept[-1]),
        "left_out": len(columns) - len(kept),
    }


def _points(pair: Pair) -> dict[str, Any]:
    """Return the name of a pair and its points."""
    rows = [row for cell in (pair.first, pair.second) for row in cell.rows.values()]
    return {
        "name": f"{pair.second.arm} and {pair.first.arm}",
        "points": sorted({row.point for row in rows}),
    }


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)


def _key(record: dict[str, str]) -> tuple[str, int, bool]:
    projected = record.get("projected") in ("1", "True")
    return record["point"], int(float(record["step"] or 0)), projected


def _value(text: str) -> float | str | None:
    """Return the cell's number to nine digits, its text, or None if it is empty."""
    number = read_number(text)
    if number is None:
        return text or None
    return float(f"{number:.9g}") if abs(number) < float("inf") else None


def _within(columns: dict[str, list[Any]], most: int) -> list[str]:
    """Return the first columns whose values have at most `most` characters in all."""
    kept, total = [], 0
    for name, values in columns.items():
        total += sum(map(len, map(str, values))) + 2 * len(values)
        if total > most and kept:
            break
        kept.append(name)
    return kept
