"""Correlate accuracy with other columns over all checkpoints of a sweep, seed by seed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxflat.analysis.cells import Cell, distinguishing_keys
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.flatness_columns import COMPARED, own_measures
from jaxflat.analysis.loss_scale import LossScale
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, Row, read_number
from jaxflat.analysis.statistics import correlation, granulated
from jaxflat.analysis.statistics.granulated import Information
from jaxflat.analysis.statistics.intervals import Interval

FEWEST = 4  # checkpoints per seed: three have only six orders, and t intervals then err too often
SPEARMAN, KENDALL = "Spearman", "Kendall"
WITHIN, ACROSS = "Kendall, within arms", "Kendall, across arms"
GIVEN_ALL, GRANULATED = "Spearman given loss and training", "Granulated Kendall"
TRAINING = (
    "learning_rate",
    "batch_size",
)  # last parts of the keys to condition on, together with the step


def given_loss(scale: LossScale) -> str:
    """Name the partial correlation given the loss."""
    return f"Spearman given {scale.noun}"


def statistics(scale: LossScale) -> tuple[str, ...]:
    """Return the names of all statistics, in the order in which they are shown."""
    return SPEARMAN, KENDALL, WITHIN, ACROSS, given_loss(scale), GIVEN_ALL, GRANULATED


@dataclass(frozen=True)
class AccuracyAndMeasure:
    """Results without gaps: N checkpoints (an arm at a step) for each of S seeds."""

    accuracy_SxN: np.ndarray
    measure_SxN: np.ndarray
    excess_SxN: np.ndarray
    arms_N: np.ndarray
    axes: dict[str, list[str]]

    @property
    def num_checkpoints(self) -> int:
        return self.accuracy_SxN.shape[1]

    def covariates(self) -> dict[str, list[float | None]]:
        """Return learning rate, batch size and step, if they vary, with None for no number."""
        names = [name for name in self.axes if name.rpartition(".")[2] in (*TRAINING, "step")]
        return {name: [read_number(text) for text in self.axes[name]] for name in names}


@dataclass(frozen=True)
class Association:
    """Statistics of accuracy against one column; `missing` says why `found` lacks one."""

    name: str
    column: str
    num_seeds: int
    num_checkpoints: int
    found: dict[str, Interval] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    information: Information | None = None
    chance: float = 0.0


def associations(comparison: Comparison) -> list[Association]:
    """Correlate accuracy with each embedded or unlisted flatness measure, and with the loss."""
    names = (name for cell in comparison.cells for row in cell.rows.values() for name in row.values)
    scale, loss = comparison.scale, comparison.scale.column
    columns = COMPARED | own_measures(names) | {loss: scale.noun.capitalize()}
    measured = {column: _measured(comparison.cells, column, loss) for column in columns}
    return [associate(scale, columns[c], c, table) for c, table in measured.items() if table]


def associate(scale: LossScale, name: str, column: str, table: AccuracyAndMeasure) -> Association:
    num_seeds, n = table.accuracy_SxN.shape
    if n < FEWEST:
        why = f"{n} checkpoint{' per seed is' if n == 1 else 's per seed are'} fewer than {FEWEST}"
        missing = dict.fromkeys(statistics(scale), why)
        return Association(name, column, num_seeds, n, missing=missing)
    found = _plain(table) | _partial(scale, table, column) | _granulated(table)
    scores = (table.accuracy_SxN, table.measure_SxN, table.axes)
    information = granulated.information_score(*scores)
    return Association(
        *(name, column, num_seeds, n),
        found={key: one for key, one in found.items() if isinstance(one, Interval)},
        missing={key: one for key, one in found.items() if isinstance(one, str)},
        information=information,
        chance=granulated.chance_score(*scores) if information else 0.0,
    )


def _plain(table: AccuracyAndMeasure) -> dict[str, Interval | str]:
    values = table.accuracy_SxN, table.measure_SxN
    n = table.num_checkpoints
    same_NxN = table.arms_N[:, None] == table.arms_N[None, :]
    within_NxN, across_NxN = same_NxN & ~np.eye(n, dtype=bool), ~same_NxN
    found: dict[str, Interval | str] = {
        SPEARMAN: _or_why(correlation.spearman_interval(correlation.spearman(*values), n))
    }
    for name, chosen_NxN, why in (
        (KENDALL, within_NxN | across_NxN, ""),
        (WITHIN, within_NxN, "each arm has one checkpoint"),
        (ACROSS, across_NxN, "there is only one arm"),
    ):
        num_pairs = int(chosen_NxN.sum()) // 2
        taus_S = correlation.kendall(*values, chosen_NxN)
        interval = correlation.kendall_interval(taus_S, num_pairs) if num_pairs else None
        found[name] = _or_why(interval, "" if num_pairs else why)
    return found


def _partial(scale: LossScale, table: AccuracyAndMeasure, column: str) -> dict[str, Interval | str]:
    given_one = given_loss(scale)
    if column == scale.column:
        return dict.fromkeys((given_one, GIVEN_ALL), f"the column is the {scale.noun} itself")
    loss_SxNx1 = table.excess_SxN[..., None]
    found = {given_one: _given(table, loss_SxNx1)}
    others = table.covariates()
    if not others:
        return found | {GIVEN_ALL: "learning rate, batch size and steps do not vary"}
    unknown = [name for name, values in others.items() if None in values]
    if unknown:
        why = f"some arms do not set {unknown[0]} to a number"
        return found | {GIVEN_ALL: why}
    others_NxK = np.array(list(others.values()), float).T
    others_SxNxK = np.broadcast_to(others_NxK, (*table.excess_SxN.shape, len(others)))
    return found | {GIVEN_ALL: _given(table, np.concatenate([loss_SxNx1, others_SxNxK], axis=-1))}


def _given(table: AccuracyAndMeasure, covariates_SxNxK: np.ndarray) -> Interval | str:
    values = table.accuracy_SxN, table.measure_SxN
    n, num_given = covariates_SxNxK.shape[1:]
    if n < num_given + 3:
        return f"{n} checkpoints per seed are too few to condition on {num_given} covariates"
    r_S = correlation.partial_spearman(*values, covariates_SxNxK)
    why = (
        "in every seed the covariates already rank the checkpoints exactly as accuracy or the "
        "measure does"
    )
    return _or_why(correlation.spearman_interval(r_S, n), why)


def _granulated(table: AccuracyAndMeasure) -> dict[str, Interval | str]:
    one = granulated.granulated_kendall(table.accuracy_SxN, table.measure_SxN, table.axes)
    if one is None:
        return {GRANULATED: "no two checkpoints differ in exactly one hyper-parameter"}
    return {GRANULATED: _or_why(correlation.kendall_interval(one.mean_x, one.num_pairs))}


def _or_why(interval: Interval | None, why: str = "") -> Interval | str:
    return interval or why or "accuracy or the measure does not vary"


def _measured(cells: Sequence[Cell], column: str, loss: str) -> AccuracyAndMeasure | None:
    """Take the checkpoints that half of the seeds have, and the seeds that have all of these."""
    needed = (PRIMARY_ACCURACY, column, loss)

    def complete(row: Row) -> bool:
        return all(name in row.values for name in needed)

    by_cell = [{seed: r for seed, r in cell.rows.items() if complete(r)} for cell in cells]
    every = dict.fromkeys(seed for rows in by_cell for seed in rows)
    most = [(c, r) for c, r in zip(cells, by_cell, strict=True) if r and 2 * len(r) >= len(every)]
    kept = _distinct(most)
    seeds = [seed for seed in every if all(seed in rows for _, rows in kept)]
    if not seeds:
        return None
    first = [rows[seeds[0]] for _, rows in kept]
    axes = {key: [row.swept.get(key, "") for row in first] for key in distinguishing_keys(first)}
    if len({row.step for row in first}) > 1:
        axes["step"] = [str(row.step) for row in first]
    accuracy, measure, excess = (
        np.array([[rows[seed].values[name] for _, rows in kept] for seed in seeds])
        for name in needed
    )
    arms = list(dict.fromkeys(cell.arm for cell, _ in kept))
    arms_N = np.array([arms.index(cell.arm) for cell, _ in kept])
    return AccuracyAndMeasure(accuracy, measure, excess, arms_N, axes)


def _distinct(cells: list[tuple[Cell, dict[str, Row]]]) -> list[tuple[Cell, dict[str, Row]]]:
    """Drop duplicates: points with a shared prefix may have measured the same checkpoint."""
    found = {
        (cell.step, *((seed, *row.values.items()) for seed, row in rows.items())): (cell, rows)
        for cell, rows in reversed(cells)
    }
    return list(found.values())[::-1]
