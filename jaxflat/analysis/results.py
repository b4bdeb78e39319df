"""results.csv as typed rows, and rows as cells: one variant at one step, over its seeds."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from jaxflat.analysis.statistics import Interval, mean_interval

SEEDS = ("seed", "data_seed", "init_seed", "probe_seed")
MAP_ACCURACY = "mean over tasks: map"
LATENT_ACCURACY = "mean over tasks: latent"
GIVEN_ACCURACY = "mean over tasks: given"
PRIMARY_ACCURACY = "mean over tasks"
EVERY_POINT, UNTRAINED = "trained model", "untrained"
LATENT_CEILING = "mean over tasks: latent ceiling"

_PROBE = re.compile(r"linear_probe/(?P<task>.+)\.(?P<labeling>[^./]+)/(?P<shots>\d+)")


@dataclass(frozen=True)
class Row:
    """One measured checkpoint. A missing value is absent from `values`."""

    point: str
    swept: dict[str, str]
    seed: str
    step: int
    projected: bool
    values: dict[str, float]

    @property
    def is_lookup_table(self) -> bool:
        return self.swept.get("model.name") == "lookup_table"

    @property
    def is_control(self) -> bool:
        """Made by no training."""
        return self.is_lookup_table or self.is_untrained

    @property
    def is_untrained(self) -> bool:
        """A model as it is initialised: no phases, but no lookup table either."""
        return bool(self.swept.get("phase_order")) and not self.phases and not self.is_lookup_table

    @property
    def phases(self) -> list[str]:
        """The names of its phases, where these were swept."""
        return re.findall(r"\w+", self.swept.get("phase_order", ""))


@dataclass(frozen=True)
class Cell:
    """One variant of the sweep at one step: the same measurement repeated over seeds."""

    variant: str
    step: int
    rows: dict[str, Row]

    def by_seed(self, column: str) -> dict[str, float]:
        return {seed: row.values[column] for seed, row in self.rows.items() if column in row.values}

    def interval(self, column: str) -> Interval | None:
        """Mean over seeds with its 95% t interval; None where nothing was measured."""
        values = list(self.by_seed(column).values())
        return mean_interval(values) if values else None

    def mean(self, column: str) -> float:
        interval = self.interval(column)
        return np.nan if interval is None else interval.mean

    @property
    def num_params(self) -> float:
        return self.mean("num_params")


def read_results(path: Path) -> list[Row]:
    """Rows of `path`; none if it is not there. The swept keys are the columns before `step`."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        if header and not {"point", "step"} <= set(header):
            raise ValueError(f"{path}: needs the columns 'point' and 'step', has {header}")
        return [_read_row(record, header) for record in reader]


def probe_columns(rows: Iterable[Row], labeling: str) -> list[str]:
    """The linear-probe columns of one labeling at the largest number of shots, one a task."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    found = [match for match in map(_PROBE.fullmatch, names) if match]
    found = [match for match in found if match["labeling"] == labeling]
    most = max((int(match["shots"]) for match in found), default=0)
    return sorted(match.string for match in found if int(match["shots"]) == most)


def primary_labeling(rows: Iterable[Row]) -> str:
    """The labeling that comparisons look at: the first of these that was measured."""
    rows = list(rows)
    order = ("map", "given", "official", "latent")
    return next((labeling for labeling in order if probe_columns(rows, labeling)), "map")


def add_task_means(rows: Sequence[Row]) -> None:
    """Add the means over tasks to each row that has every task."""
    means = {
        MAP_ACCURACY: probe_columns(rows, "map"),
        LATENT_ACCURACY: probe_columns(rows, "latent"),
        GIVEN_ACCURACY: probe_columns(rows, "given"),
        PRIMARY_ACCURACY: probe_columns(rows, primary_labeling(rows)),
        LATENT_CEILING: sorted(
            {name for row in rows for name in row.values if re.fullmatch(r"bayes/.+\.latent", name)}
        ),
    }
    for row in rows:
        for name, columns in means.items():
            if columns and all(column in row.values for column in columns):
                row.values[name] = float(np.mean([row.values[column] for column in columns]))


def group_cells(rows: Sequence[Row], named_as: Sequence[Row] = ()) -> dict[str, list[Cell]]:
    """Cells by variant, from small to large, else as the sweep has them; steps ascending.

    Names say what tells the rows of `named_as` apart, by default their own.
    """
    varying = distinguishing_keys(named_as or rows)
    skipped = _shared_phases(named_as or rows)
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((variant_name(row, varying, skipped), row.step), {})[row.seed] = row
    made = [Cell(variant, step, by_seed) for (variant, step), by_seed in cells.items()]
    order = list(dict.fromkeys(cell.variant for cell in made))
    made.sort(key=lambda c: (np.nan_to_num(c.num_params), order.index(c.variant), c.step))
    return {
        variant: [cell for cell in made if cell.variant == variant]
        for variant in dict.fromkeys(cell.variant for cell in made)
    }


def variant_name(row: Row, keys: Iterable[str], num_skipped: int = 0) -> str:
    """What tells a row's settings from others'; the first `num_skipped` phases do not."""
    if row.is_lookup_table:
        return "lookup table " + row.swept.get("model.features", "").replace("_", " ")
    keys = [key for key in keys if not (row.is_untrained and key == "phase_order")]
    parts = [
        " → ".join(row.phases[num_skipped:] or row.phases)
        if key == "phase_order"
        else f"{key.rpartition('.')[2]} {row.swept[key]}"
        for key in keys
        if row.swept.get(key)
    ]
    if row.is_untrained:
        return ", ".join([*parts, UNTRAINED])
    return ", ".join(parts) or EVERY_POINT


def trained_as(variant: str) -> str:
    """The name of the trained models of an untrained variant's settings."""
    return variant.removesuffix(UNTRAINED).removesuffix(", ") or EVERY_POINT


def _shared_phases(rows: Sequence[Row]) -> int:
    """How many phases all rows begin with."""
    steps = zip(*(row.phases for row in rows), strict=False)
    return len(list(takewhile(lambda names: len(set(names)) == 1, steps)))


def distinguishing_keys(rows: Sequence[Row]) -> list[str]:
    """The swept keys that tell rows apart, without those that only follow the keys before them."""
    kept: list[str] = []
    for key in dict.fromkeys(key for row in rows for key in row.swept):
        without, with_it = (
            {tuple(row.swept.get(name, "") for name in names) for row in rows}
            for names in (kept, [*kept, key])
        )
        if len(with_it) > len(without):
            kept.append(key)
    return kept


def _read_row(record: dict[str, str], header: list[str]) -> Row:
    before_step = header[: header.index("step")]
    swept = [name for name in before_step if name != "point" and name not in SEEDS]
    taken = {"point", "step", "projected", *swept, *SEEDS}
    numbers = {name: float(text) for name, text in record.items() if text and name not in taken}
    return Row(
        point=record["point"],
        swept={name: record[name] for name in swept},
        seed="/".join(record[name] for name in SEEDS if record.get(name)),
        step=int(float(record["step"] or 0)),
        projected=record.get("projected") in ("1", "True"),
        values={name: number for name, number in numbers.items() if np.isfinite(number)},
    )
