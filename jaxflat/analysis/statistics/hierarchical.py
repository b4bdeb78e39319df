"""Divide the scatter of a paired difference between seeds and the examples behind each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.statistics.intervals import Interval, paired_t_interval


@dataclass(frozen=True)
class Split:
    """A paired difference over seeds, and the sources of its variance over seeds.

    `total` is the sample variance s^2 of the seeds' differences, None for one seed. `examples` is
    an upper bound of the examples' part, from the rows' own standard errors. The interval of
    `difference` uses s^2, so it covers both parts.
    """

    difference: Interval
    total: float | None
    examples: float

    @property
    def seeds(self) -> float | None:
        """max(0, total - examples)."""
        return None if self.total is None else max(0.0, self.total - self.examples)

    @property
    def share(self) -> float | None:
        """The examples' share of the variance, at most 1; None if the variance is 0 or unknown."""
        return min(1.0, self.examples / self.total) if self.total else None


def split_difference(
    first: Sequence[float],
    second: Sequence[float],
    first_errors: Sequence[float],
    second_errors: Sequence[float],
) -> Split:
    """Split Var(d) = Var_seeds + E[e^2], d = second - first, e^2 = e_first^2 + e_second^2.

    This is the method of moments of a one-way random-effects model with known variances within
    (Searle, Casella and McCulloch 1992, "Variance components", ch. 3). The sum is an upper bound
    of e^2, because two models tested on the same examples make correlated errors.
    """
    differences = np.subtract(second, first)
    errors = np.square(first_errors) + np.square(second_errors)
    total = float(np.var(differences, ddof=1)) if len(differences) > 1 else None
    return Split(paired_t_interval(first, second), total, float(np.mean(errors)))


def error_of_mean(errors: Sequence[float]) -> float:
    """Return the largest possible standard error of the mean of K numbers: (e_1 + ... + e_K) / K.

    Perfectly correlated errors reach it; tasks on the same sentences may come close.
    """
    return float(np.mean(errors))


def split_cells(first: Cell, second: Cell, columns: Sequence[str]) -> Split | None:
    """Split the difference of the mean over `columns` (tasks).

    Only seeds that have every column and its error in both cells count.
    """
    needed = [*columns, *(f"{name}_sem" for name in columns)]
    seeds = [
        seed
        for seed in first.rows
        if seed in second.rows
        and all(n in cell.rows[seed].values for cell in (first, second) for n in needed)
    ]
    if not seeds or not columns:
        return None

    def values(cell: Cell, ending: str) -> list[list[float]]:
        return [[cell.rows[seed].values[name + ending] for name in columns] for seed in seeds]

    means = ([float(np.mean(tasks)) for tasks in values(cell, "")] for cell in (first, second))
    errors = ([error_of_mean(e) for e in values(cell, "_sem")] for cell in (first, second))
    return split_difference(*means, *errors)
