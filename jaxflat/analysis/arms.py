"""Compare arms whose models have one size, such as optimizers or doses of a penalty."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from jaxflat.analysis.cells import Cell, last_cell
from jaxflat.analysis.pairs import Pair, compare_pair, pair_at_equal_loss


@dataclass(frozen=True)
class ArmComparison:
    """`against` pairs the baseline with every other arm; `pairs` has all pairs of arms.

    Arms are read at equal excess losses. If the losses of two arms do not overlap, their last
    checkpoints are compared: these are fixed in advance, so no loss decides the choice. The second
    of a pair is the one that comes later in the sweep.
    """

    baseline: Cell
    against: list[Pair]
    pairs: list[Pair]

    @property
    def matched(self) -> dict[str, Cell]:
        """The baseline, and the arms with an excess loss equivalent to its own."""
        equal = [pair.second for pair in self.against if pair.equivalence.holds]
        return {cell.arm: cell for cell in (self.baseline, *equal)}


def compare_arms(
    arms: Mapping[str, list[Cell]], primary_columns: Sequence[str], margin: float
) -> ArmComparison | None:
    """Pair the arms, with the sweep's first arm as the baseline.

    Returns None if there is only one, if models differ in size, or if none shares a seed with the
    baseline. margin: of equal losses, see `LossScale.margin`.
    """
    last = {name: cell for name, cells in arms.items() if (cell := last_cell(cells))}
    sizes = {cell.num_params for cell in last.values()}
    if len(last) < 2 or len(sizes) > 1 or not np.isfinite(sizes.pop()):
        return None

    def compare(first: str, second: str) -> Pair | None:
        read = pair_at_equal_loss(arms[first], arms[second], primary_columns, margin)
        return read or compare_pair(last[first], last[second], primary_columns, margin)

    pairs = [pair for names in combinations(last, 2) if (pair := compare(*names))]
    baseline, *_ = last.values()
    against = [pair for pair in pairs if pair.first.arm == baseline.arm]
    return ArmComparison(baseline, against, pairs) if against else None
