"""Measure how the models of several arms of one size change, from start to end.

Each arm is followed from its first measured checkpoint to its last, seed by
seed. Two arms are compared by how much each of them changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from jaxflat.analysis.cells import Cell, group_cells, last_cell
from jaxflat.analysis.flatness_columns import COMPARED, SHARPNESS
from jaxflat.analysis.pairs import document_error
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, Row
from jaxflat.analysis.statistics.intervals import (
    Equivalence,
    Interval,
    log_ratio_interval,
    paired_t_interval,
)


@dataclass(frozen=True)
class Change:
    """The change of one arm, or of a second arm against a first.

    `ratio` compares sharpness; `excess` and `accuracy` are differences. For one arm they are end
    over start and end minus start. For two arms they are the second's ratio over the first's and
    the second's difference minus the first's. Each is None if it was not measured, and `ratio`
    also if a sharpness is not positive. `equal` tests whether losses agree within the declared
    margin: at an arm's start and end, or at the ends of two arms.
    """

    ratio: Interval | None
    excess: Interval | None
    accuracy: Interval | None
    equal: Equivalence | None = None


@dataclass(frozen=True)
class Arm:
    """One arm, at its first and last checkpoint."""

    name: str
    start: Cell
    end: Cell
    change: Change


@dataclass(frozen=True)
class Trajectories:
    """Arms, and a contrast for each pair of them; all checkpoints are projected, or none is.

    `measure` is the first column of COMPARED, then of SHARPNESS, that was measured, "" if none was.
    """

    projected: bool
    measure: str
    arms: list[Arm]
    contrasts: list[tuple[Arm, Arm, Change]]


def find_trajectories(trained: Sequence[Row], margin: float) -> list[Trajectories]:
    """Return projected checkpoints first; nothing if sizes differ or there are no two arms."""
    if len({row.values.get("num_params") for row in trained}) != 1:
        return []
    kinds = [[row for row in trained if row.projected == kind] for kind in (True, False)]
    return [found for rows in kinds if len((found := _follow(rows, margin)).arms) > 1]


def _follow(rows: Sequence[Row], margin: float) -> Trajectories:
    measure = next(
        (name for name in COMPARED | SHARPNESS if any(name in row.values for row in rows)), ""
    )
    arms = [
        Arm(name, cells[0], end, change(measure, margin, cells[0], end))
        for name, cells in group_cells(rows).items()
        if (end := last_cell(cells)) and end is not cells[0]
    ]
    contrasts = [
        (
            first,
            second,
            change(measure, margin, first.start, first.end, second.start, second.end),
        )
        for first, second in combinations(arms, 2)
    ]
    return Trajectories(any(row.projected for row in rows), measure, arms, contrasts)


def change(measure: str, margin: float, *cells: Cell) -> Change:
    """Return the change from start to end, or the second two cells' against the first two's.

    margin: of equal losses, see `LossScale.margin`.
    """

    def shared_seeds(column: str) -> list[str]:
        by_seed = [cell.by_seed(column) for cell in cells]
        return [seed for seed in by_seed[0] if all(seed in found for found in by_seed)]

    def values(column: str) -> list[np.ndarray]:
        seeds = shared_seeds(column)
        return [np.array([cell.rows[seed].values[column] for seed in seeds]) for cell in cells]

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

    scale = cells[0].scale
    losses, equal = values(scale.column), None
    if losses[0].size:
        first, seeds = len(cells) // 2 - 1, shared_seeds(scale.column)
        ends = [
            replace(cell, rows={seed: cell.rows[seed] for seed in seeds})
            for cell in (cells[first], cells[-1])
        ]
        compared = losses[first].tolist(), losses[-1].tolist()
        equal = scale.equal_losses(*compared, margin, document_error(*ends))
    return Change(ratio(), difference(scale.column), difference(PRIMARY_ACCURACY), equal)
