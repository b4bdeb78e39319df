"""Compare two cells of a sweep: differences, ratios and their directions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.equal_loss import at_equal_loss
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.loss_scale import LossScale
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY
from jaxflat.analysis.statistics.hierarchical import Split, split_cells
from jaxflat.analysis.statistics.intervals import (
    Equivalence,
    Interval,
    log_ratio_interval,
    paired_t_interval,
    standard_error,
)

_PART = re.compile(r"loss/documents_\d+")
_PROBE = re.compile(r"[^/]+/.+\.(map|latent|official|given)/\d+")  # probe/task.labeling/shots


@dataclass(frozen=True)
class Pair:
    """Differences are second - first, ratios second / first; of two sizes, second is the larger.

    `interpolated`: both cells are read at equal excess losses between the runs' checkpoints (see
    `equal_loss`). Otherwise they are checkpoints, chosen from `candidates` pairs by excess loss.
    The equivalence tests then multiply p by it (Bonferroni) to allow for that choice. They test
    the log ratio of the excess losses at half the margin, the margin and twice the margin.
    On a text they test the difference of the held-out losses, and `excess` is that difference.
    `document_error` is its standard error over the documents that both models read.
    `flatness` has every measure that both cells have, and None (undecided) for a ratio if a value
    is not positive. `split` divides the scatter of the accuracy difference between seeds and
    examples.
    """

    first: Cell
    second: Cell
    scale: LossScale
    interpolated: bool
    candidates: int
    excess: Interval
    document_error: float | None
    excess_ratio: Interval | None
    equivalences: tuple[Equivalence, ...]
    accuracy: Interval | None
    flatness: dict[str, Interval | None]
    secondary: dict[str, Interval]
    split: Split | None

    @property
    def equivalence(self) -> Equivalence:
        """The test at the margin itself."""
        return self.equivalences[1]

    @property
    def is_read_at_one_loss(self) -> bool:
        """Whether the losses are equal by construction, and no documents were drawn for them."""
        return self.interpolated and self.document_error is None

    @property
    def flatness_column(self) -> str:
        """The first measure of COMPARED that both cells have, regardless of its result."""
        return next(iter(self.flatness), "")

    @property
    def flatness_ratio(self) -> Interval | None:
        """The ratio of that measure."""
        return self.flatness.get(self.flatness_column)


def pair_at_equal_loss(
    first: Sequence[Cell],
    second: Sequence[Cell],
    primary_columns: Sequence[str],
    margin: float,
) -> Pair | None:
    """Return two arms read at equal excess losses; None if their runs' losses do not overlap."""
    read = at_equal_loss([first, second])
    if read is None:
        return None
    return compare_pair(read[0], read[1], primary_columns, margin, interpolated=True)


def compare_pair(
    first: Cell,
    second: Cell,
    primary_columns: Sequence[str],
    margin: float,
    *,
    candidates: int = 1,
    interpolated: bool = False,
) -> Pair | None:
    """Compare the second cell with the first, paired by seed; None if they share no seed.

    margin: of equal losses, see `LossScale.margin`.
    """
    scale = first.scale
    losses = paired_values(first, second, scale.column)
    if not losses[0]:
        return None
    documents = document_error(first, second)
    names = dict.fromkeys(name for row in first.rows.values() for name in row.values)
    secondary = [name for name in names if is_accuracy(name)]
    return Pair(
        first=first,
        second=second,
        scale=scale,
        interpolated=interpolated,
        candidates=candidates,
        excess=paired_t_interval(*losses),
        document_error=documents and documents[0],
        excess_ratio=log_ratio_interval(*losses) if scale.is_log else None,
        equivalences=tuple(
            _chosen(scale.equal_losses(*losses, one, documents), candidates)
            for one in scale.margins(margin)
        ),
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


def document_error(first: Cell, second: Cell) -> tuple[float, int] | None:
    """Return the standard error of second - first over held-out documents, and its number of parts.

    All seeds read the same documents, in P parts (columns loss/documents_<k>). The error is s /
    sqrt(P), where s is the standard deviation over parts of the mean difference over seeds. None
    without these columns.
    """
    if first.scale.is_log:
        return None
    names = {name for row in first.rows.values() for name in row.values if _PART.fullmatch(name)}
    values = [paired_values(first, second, name) for name in sorted(names)]
    differences = [float(np.mean(np.subtract(two, one))) for one, two in values if one]
    error = standard_error(differences)
    return None if error is None else (error, len(differences))


def why_unmatched(pairs: Sequence[Pair]) -> str:
    """Return why none of the pairs has equal excess losses."""
    if not pairs:
        return "there is nothing to compare with"
    if all(pair.excess.low is None for pair in pairs):
        return "one seed gives no interval"
    scale, margin = pairs[0].scale, pairs[0].equivalence.margin
    if not scale.is_log:
        return f"no pair's losses are shown to be equal within {scale.margin_words(margin)}"
    return "no pair is matched in excess loss"


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
