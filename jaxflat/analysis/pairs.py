"""Compare two cells of a sweep: differences, ratios and their directions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.flatness_columns import COMPARED, INVARIANT
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY
from jaxflat.analysis.statistics.hierarchical import Split, split_cells
from jaxflat.analysis.statistics.intervals import (
    Equivalence,
    Interval,
    log_ratio_interval,
    paired_t_interval,
    tost_paired,
)

_PROBE = re.compile(r"[^/]+/.+\.(map|latent|official|given)/\d+")  # probe/task.labeling/shots
MARGIN = 0.002  # nats
MARGINS = (MARGIN / 2, MARGIN, MARGIN * 2)


@dataclass(frozen=True)
class Pair:
    """Differences are second - first, ratios second / first; of two sizes, second is the larger.

    `candidates` counts the pairs of checkpoints from which this one was chosen by excess loss.
    The equivalence tests multiply p by it (Bonferroni) to allow for that choice. `flatness` has
    every measure that both cells have; a ratio is None (undecided) if a value is not positive.
    `split` divides the scatter of the accuracy difference between seeds and examples.
    """

    first: Cell
    second: Cell
    candidates: int
    excess: Interval
    equivalences: tuple[Equivalence, ...]
    accuracy: Interval | None
    flatness: dict[str, Interval | None]
    secondary: dict[str, Interval]
    split: Split | None

    @property
    def equivalence(self) -> Equivalence:
        return next(test for test in self.equivalences if test.margin == MARGIN)

    @property
    def flatness_column(self) -> str:
        """The first measure that is not an invariant trace, regardless of its result."""
        return next((name for name in self.flatness if name not in INVARIANT), "")

    @property
    def flatness_ratio(self) -> Interval | None:
        """The ratio of that measure."""
        return self.flatness.get(self.flatness_column)

    @property
    def invariant_ratio(self) -> Interval | None:
        """The ratio of that measure's invariant trace, None if there is none."""
        return self.flatness.get(f"{self.flatness_column}_invariant")

    @property
    def accuracy_side(self) -> int:
        """+1: the second model is more accurate; -1: less; 0: undecided."""
        return 0 if self.accuracy is None else self.accuracy.side(0.0)

    @property
    def flatness_side(self) -> int:
        """+1: the second model is flatter (the smaller trace); -1: sharper; 0: undecided."""
        return 0 if self.flatness_ratio is None else -self.flatness_ratio.side(1.0)

    @property
    def relation(self) -> int:
        """+1: the flatter model is the more accurate; -1: the less accurate; 0: undecided."""
        return self.accuracy_side * self.flatness_side


def compare_pair(
    first: Cell, second: Cell, primary_columns: Sequence[str], candidates: int = 1
) -> Pair | None:
    """Compare the second cell with the first, paired by seed; None if they share no seed."""
    losses = paired_values(first, second, "excess_loss")
    if not losses[0]:
        return None
    names = dict.fromkeys(name for row in first.rows.values() for name in row.values)
    secondary = [name for name in names if is_accuracy(name)]
    return Pair(
        first=first,
        second=second,
        candidates=candidates,
        excess=paired_t_interval(*losses),
        equivalences=tuple(_chosen(tost_paired(*losses, m), candidates) for m in MARGINS),
        accuracy=paired_difference(first, second, PRIMARY_ACCURACY),
        flatness={
            name: log_ratio_interval(*values)
            for name in COMPARED
            if (values := paired_values(first, second, name))[0]
        },
        secondary={
            name: found for name in secondary if (found := paired_difference(first, second, name))
        },
        split=split_cells(first, second, primary_columns),
    )


def paired_difference(first: Cell, second: Cell, column: str) -> Interval | None:
    """Return second - first, paired by seed; None if no seed has both."""
    values = paired_values(first, second, column)
    return paired_t_interval(*values) if values[0] else None


def paired_values(first: Cell, second: Cell, column: str) -> tuple[list[float], list[float]]:
    """Return the column's values in both cells, for the seeds that both have."""
    left, right = first.by_seed(column), second.by_seed(column)
    shared = [seed for seed in left if seed in right]
    return [left[seed] for seed in shared], [right[seed] for seed in shared]


def is_accuracy(column: str) -> bool:
    """Say whether a column is an accuracy by a probe or by fine-tuning, a user's probe included."""
    if column.startswith("finetune/"):
        return not column.endswith("_sem")
    others = ("linear_probe_projected/", "belief_state/", "bayes/")
    return bool(_PROBE.fullmatch(column)) and not column.startswith(others)


def _chosen(test: Equivalence, candidates: int) -> Equivalence:
    return replace(test, p=None if test.p is None else min(1.0, test.p * candidates))
