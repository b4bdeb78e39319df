"""Where the scatter of a paired difference comes from: seeds, or the examples behind each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.statistics.intervals import Interval, paired_t_interval


@dataclass(frozen=True)
class Split:
    """A paired difference over seeds, and its variance over seeds by where it comes from.

    `total` is the sample variance s^2 of the seeds' differences, None for one seed; `examples` is
    what the rows' own standard errors make of it, at most. `difference` rests on s^2 and so covers
    both.
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
        """Of the examples in the scatter, at most 1; None where nothing scatters."""
        return min(1.0, self.examples / self.total) if self.total else None

    @property
    def dominated_by(self) -> str:
        """'seeds' or 'examples', by the larger part; '' where it cannot be told."""
        if self.share is None:
            return ""
        return "examples" if self.share > 0.5 else "seeds"


def split_difference(
    first: Sequence[float],
    second: Sequence[float],
    first_errors: Sequence[float],
    second_errors: Sequence[float],
) -> Split:
    """Var(d) = Var_seeds + E[e^2], d = second - first of a seed, e^2 = e_first^2 + e_second^2.

    The method of moments of a one-way random-effects model (Searle, Casella and McCulloch 1992,
    "Variance components", ch. 3) with known variances within. Two models that are tested on the
    same examples err alike, so e^2 is at most this sum; where every seed has the same test
    examples, what is particular to these moves no seed from the mean, and the share is less again.
    """
    differences = np.subtract(second, first)
    errors = np.square(first_errors) + np.square(second_errors)
    total = float(np.var(differences, ddof=1)) if len(differences) > 1 else None
    return Split(paired_t_interval(first, second), total, float(np.mean(errors)))


def error_of_mean(errors: Sequence[float]) -> float:
    """The largest standard error that the mean of K numbers can have: (e_1 + ... + e_K) / K.

    It is reached where they err alike, as tasks on the same sentences may.
    """
    return float(np.mean(errors))


def split_cells(first: Cell, second: Cell, columns: Sequence[str]) -> Split | None:
    """Of the mean over `columns` (tasks), in the seeds that have them with their errors in both."""
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
