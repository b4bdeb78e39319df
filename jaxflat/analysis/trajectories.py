"""Models of one size that are trained on in several ways: what changes from start to end.

Each way of training ("arm") is followed from its first measured checkpoint to its last, seed by
seed, and arms are compared by how much more the one changes than the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from jaxflat.analysis.cells import Cell, group_cells, last_cell
from jaxflat.analysis.flatness_columns import SHARPNESS
from jaxflat.analysis.pairs import MARGIN
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, Row
from jaxflat.analysis.statistics.intervals import (
    Equivalence,
    Interval,
    log_ratio_interval,
    paired_t_interval,
    tost_paired,
)


@dataclass(frozen=True)
class Change:
    """Of one arm, or of one arm against another: `ratio` of the sharpness, the rest differences.

    For an arm, end over start and end minus start; for two, the second's ratio over the first's
    and the second's difference minus the first's. None where nothing was measured, or a value
    that should have a logarithm is not positive. `equal`: are an arm's losses at start and end, of
    two arms those at their ends, the same within the margin?
    """

    ratio: Interval | None
    excess: Interval | None
    accuracy: Interval | None
    equal: Equivalence | None = None


@dataclass(frozen=True)
class Arm:
    """One way of training, at its first and last checkpoint."""

    name: str
    start: Cell
    end: Cell
    change: Change


@dataclass(frozen=True)
class Trajectories:
    """Arms whose checkpoints are all projected, or none is; `contrasts` has each pair of them.

    `measure` is the first of the columns of sharpness that was measured, "" if none was.
    """

    projected: bool
    measure: str
    arms: list[Arm]
    contrasts: list[tuple[Arm, Arm, Change]]


def find_trajectories(trained: Sequence[Row]) -> list[Trajectories]:
    """Projected checkpoints first; none where models differ in size or there are no two arms."""
    if len({row.values.get("num_params") for row in trained}) != 1:
        return []
    kinds = [[row for row in trained if row.projected == kind] for kind in (True, False)]
    return [found for rows in kinds if len((found := _follow(rows)).arms) > 1]


def _follow(rows: Sequence[Row]) -> Trajectories:
    measure = next((name for name in SHARPNESS if any(name in row.values for row in rows)), "")
    arms = [
        Arm(name, cells[0], end, change(measure, cells[0], end))
        for name, cells in group_cells(rows).items()
        if (end := last_cell(cells)) and end is not cells[0]
    ]
    contrasts = [
        (first, second, change(measure, first.start, first.end, second.start, second.end))
        for first, second in combinations(arms, 2)
    ]
    return Trajectories(any(row.projected for row in rows), measure, arms, contrasts)


def change(measure: str, *cells: Cell) -> Change:
    """Return the change over (start, end), or of the second two cells against the first two."""

    def values(column: str) -> list[np.ndarray]:
        by_seed = [cell.by_seed(column) for cell in cells]
        shared = [seed for seed in by_seed[0] if all(seed in found for found in by_seed)]
        return [np.array([found[seed] for seed in shared]) for found in by_seed]

    def difference(column: str) -> Interval | None:
        found = values(column)
        if not found[0].size:
            return None
        if len(found) == 2:
            return paired_t_interval(found[0].tolist(), found[1].tolist())
        return paired_t_interval((found[1] - found[0]).tolist(), (found[3] - found[2]).tolist())

    def ratio() -> Interval | None:
        found = values(measure)
        if not found[0].size or min(part.min() for part in found) <= 0:
            return None
        if len(found) == 2:
            return log_ratio_interval(found[0].tolist(), found[1].tolist())
        return log_ratio_interval((found[1] / found[0]).tolist(), (found[3] / found[2]).tolist())

    losses = values("excess_loss")
    equal = None
    if losses[0].size:
        equal = tost_paired(losses[len(cells) // 2 - 1].tolist(), losses[-1].tolist(), MARGIN)
    return Change(ratio(), difference("excess_loss"), difference(PRIMARY_ACCURACY), equal)
