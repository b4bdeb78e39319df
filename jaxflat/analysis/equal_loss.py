"""Read models at equal excess loss, by interpolation between the checkpoints of each run.

On a text, whose optimum is not known, models are read at equal held-out loss in the same way.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.flatness_columns import SHARPNESS
from jaxflat.analysis.loss_scale import LossScale, loss_scale
from jaxflat.analysis.results_csv import Row

NUM_LEVELS = 5
"""The excess losses at which runs are read, evenly spaced in their logarithm (see `LossScale`)."""

Ladder = Sequence[Row]  # the checkpoints of one run


def at_equal_loss(arms: Sequence[Sequence[Cell]]) -> list[Cell] | None:
    """Return a cell per arm, in which the runs of each seed are read at the same excess losses.

    Each seed has its own levels: NUM_LEVELS of them, over the range of excess losses that the
    checkpoints of all its runs cover. A seed without a common range is left out. Checkpoints that
    two arms share are not read: they were measured before the arms differ.

    Returns None if fewer than half of the seeds that all arms share have a common range.
    """
    ladders = [_ladders(cells) for cells in arms]
    shared = [seed for seed in ladders[0] if all(seed in one for one in ladders)]
    read = {
        seed: rows
        for seed in shared
        if (rows := _read(_without_shared([one[seed] for one in ladders])))
    }
    if not read or 2 * len(read) < len(shared):
        return None
    return [
        _cell(cells[0].arm, {seed: rows[place] for seed, rows in read.items()})
        for place, cells in enumerate(arms)
    ]


def seeds_at_equal_loss(cells: Sequence[Cell]) -> Cell | None:
    """Return one arm with all its seeds read at the same excess losses; None if none are common.

    Seeds of different languages are not compared, so each language has its own levels.
    """
    ladders = _ladders(cells)
    languages = dict.fromkeys(ladder[0].language for ladder in ladders.values())
    read: dict[str, Row] = {}
    for language in languages:
        own = {seed: rows for seed, rows in ladders.items() if rows[0].language == language}
        rows = _read(list(own.values()))
        if rows is None:
            return None
        read |= zip(own, rows, strict=True)
    return _cell(cells[0].arm, read)


def _ladders(cells: Sequence[Cell]) -> dict[str, list[Row]]:
    """Return the checkpoints of each seed."""
    seeds = dict.fromkeys(seed for cell in cells for seed in cell.rows)
    return {seed: [cell.rows[seed] for cell in cells if seed in cell.rows] for seed in seeds}


def _without_shared(ladders: Sequence[Ladder]) -> list[list[Row]]:
    counts = Counter((row.step, *row.values.items()) for ladder in ladders for row in ladder)
    return [
        [row for row in ladder if counts[(row.step, *row.values.items())] == 1]
        for ladder in ladders
    ]


def _read(ladders: Sequence[Ladder]) -> list[Row] | None:
    """Return the mean of each run over the levels; None if the runs have no common range."""
    scale = loss_scale(row for ladder in ladders for row in ladder)
    losses = [[row.values[scale.column] for row in ladder] for ladder in ladders]
    if any(len(one) < 2 or scale.positions(one) is None for one in losses):
        return None
    low, high = max(map(min, losses)), min(map(max, losses))
    ends = scale.positions([low, high])
    if low > high or ends is None:
        return None
    levels_L = np.linspace(ends[0], ends[1], NUM_LEVELS)
    return [_mean_at(levels_L, ladder, scale) for ladder in ladders]


def _mean_at(levels_L: np.ndarray, ladder: Ladder, scale: LossScale) -> Row:
    """Interpolate linearly in the loss on its scale, and average over the levels.

    Excess losses and flatness measures are interpolated in their logarithms. Each level takes its
    value from two neighbouring checkpoints, so the mean is a weighted sum over checkpoints. The
    same weights give an upper bound of the standard errors.
    """
    ladder = sorted(ladder, key=lambda row: row.values[scale.column])
    losses_K = scale.positions([row.values[scale.column] for row in ladder])
    assert losses_K is not None
    weights_K = np.array(
        [np.interp(levels_L, losses_K, unit_K).mean() for unit_K in np.eye(len(ladder))]
    )
    names = [name for name in ladder[0].values if all(name in row.values for row in ladder)]
    values_KxN = np.array([[row.values[name] for name in names] for row in ladder])
    logs_N = np.array([_is_log(name) for name in names]) & (values_KxN > 0).all(0)
    values_KxN[:, logs_N] = np.log(values_KxN[:, logs_N])
    mean_N = weights_K @ values_KxN
    mean_N[logs_N] = np.exp(mean_N[logs_N])
    lowest = ladder[0]
    return Row(
        point=lowest.point,
        swept=lowest.swept,
        seed=lowest.seed,
        step=round(float(weights_K @ [row.step for row in ladder])),
        projected=lowest.projected,
        values=dict(zip(names, mean_N.tolist(), strict=True)),
        language=lowest.language,
        arm=lowest.arm,
    )


def _is_log(column: str) -> bool:
    return column == "excess_loss" or (
        column.partition("@")[0] in SHARPNESS and not column.endswith("_sem")
    )


def _cell(arm: str, rows: dict[str, Row]) -> Cell:
    return Cell(arm, round(float(np.mean([row.step for row in rows.values()]))), rows)
