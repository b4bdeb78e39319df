"""Group rows into cells: one arm of a sweep at one step, over its seeds."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from jaxflat.analysis.loss_scale import LossScale, loss_scale
from jaxflat.analysis.results_csv import Row
from jaxflat.analysis.statistics.intervals import Interval, mean_interval

EVERY_POINT, UNTRAINED = "trained model", "untrained"


@dataclass(frozen=True)
class Cell:
    """One arm of the sweep at one step, measured once per seed."""

    arm: str
    step: int
    rows: dict[str, Row]

    def by_seed(self, column: str) -> dict[str, float]:
        return {seed: row.values[column] for seed, row in self.rows.items() if column in row.values}

    def interval(self, column: str) -> Interval | None:
        """Return the mean over seeds with its 95% t interval; None if no seed has the column."""
        values = list(self.by_seed(column).values())
        return mean_interval(values) if values else None

    def mean(self, column: str) -> float:
        interval = self.interval(column)
        return np.nan if interval is None else interval.mean

    @property
    def scale(self) -> LossScale:
        """The scale on which its losses are compared."""
        return loss_scale(self.rows.values())

    @property
    def num_params(self) -> float:
        return self.mean("num_params")


def group_cells(rows: Sequence[Row], named_as: Sequence[Row] = ()) -> dict[str, list[Cell]]:
    """Return cells by arm, smallest model first, then in the sweep's order; steps ascending.

    An arm has the name that the sweep gives it. If it gives none, the name is made of the swept
    values that distinguish the rows of `named_as`, by default `rows`.
    """
    varying = naming_keys(named_as or rows)
    skipped = _shared_phases(named_as or rows)
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((arm_name(row, varying, skipped), row.step), {})[row.seed] = row
    made = [Cell(arm, step, by_seed) for (arm, step), by_seed in cells.items()]
    # The seed with most rows sets the order, so failed points of another seed do not change it.
    counts = Counter(row.seed for row in rows)
    fullest = sorted(rows, key=lambda row: -counts[row.seed])
    order = list(dict.fromkeys(arm_name(row, varying, skipped) for row in fullest))
    made.sort(key=lambda c: (np.nan_to_num(c.num_params), order.index(c.arm), c.step))
    return {
        arm: [cell for cell in made if cell.arm == arm]
        for arm in dict.fromkeys(cell.arm for cell in made)
    }


def last_cell(cells: Sequence[Cell]) -> Cell | None:
    """Return an arm's last checkpoint; None if only earlier ones were measured.

    It is the last one of most seeds. A further checkpoint of a few seeds does not count.
    """
    most = max((len(cell.rows) for cell in cells), default=0)
    ends = [
        cell
        for cell in cells
        if 2 * len(cell.rows) > most
        and 2 * sum(row.last for row in cell.rows.values()) > len(cell.rows)
    ]
    return ends[-1] if ends else None


def arm_name(row: Row, keys: Iterable[str], num_skipped: int = 0) -> str:
    """Return the name of a row's arm; unless the sweep gives one, by the row's values of `keys`.

    The first `num_skipped` phases are left out.
    """
    if row.arm:
        return row.arm
    if row.is_lookup_table:
        return f"lookup table {row.swept.get('model.features', '')}".replace("_", " ").strip()
    labels = short_names(keys)
    keys = [key for key in labels if not (row.is_untrained and key == "phase_order")]
    parts = [
        " → ".join(row.phases[num_skipped:] or row.phases)
        if key == "phase_order"
        else f"{labels[key]} {row.swept[key]}"
        for key in keys
        if row.swept.get(key)
    ]
    if row.is_untrained:
        return ", ".join([*parts, UNTRAINED])
    return ", ".join(parts) or EVERY_POINT


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Shorten each dotted key to the fewest last parts that no other key shares.

    Two arms may set different keys with the same last part.
    """
    keys = list(keys)
    labels = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        labels[key] = next(
            (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1),
            key,
        )
    return labels


def _shared_phases(rows: Sequence[Row]) -> int:
    """Count the first phases that all rows share."""
    steps = zip(*(row.phases for row in rows), strict=False)
    return len(list(takewhile(lambda names: len(set(names)) == 1, steps)))


def naming_keys(rows: Sequence[Row]) -> list[str]:
    """Return the keys that distinguish rows, then those that name a row which sets none of these.

    For example, one arm sets a learning rate and another a radius. The rate alone distinguishes
    them, and the radius names the second arm.
    """
    kept = distinguishing_keys(rows)
    nameless = [row for row in rows if not any(row.swept.get(key) for key in kept)]
    own = [key for row in nameless for key, text in row.swept.items() if text]
    return kept + [key for key in dict.fromkeys(own) if any(not row.swept.get(key) for row in rows)]


def distinguishing_keys(rows: Sequence[Row]) -> list[str]:
    """Return the swept keys that distinguish rows, without those that earlier keys determine."""
    kept: list[str] = []
    for key in dict.fromkeys(key for row in rows for key in row.swept):
        without, with_it = (
            {tuple(row.swept.get(name, "") for name in names) for row in rows}
            for names in (kept, [*kept, key])
        )
        if len(with_it) > len(without):
            kept.append(key)
    return kept
