"""Models of one size that were trained in different ways, each at its last checkpoint.

The sweep's first way of training is what the others are set against.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from jaxflat.analysis.cells import Cell, last_cell
from jaxflat.analysis.pairs import Pair, compare_pair


@dataclass(frozen=True)
class Algorithms:
    """`against` has every other algorithm's pair with the baseline, `pairs` all pairs of two.

    Checkpoints are fixed beforehand (the last), so nothing is chosen by its loss. Later: second.
    """

    baseline: Cell
    against: list[Pair]
    pairs: list[Pair]

    @property
    def matched(self) -> dict[str, Cell]:
        """The baseline and the algorithms whose excess loss equals its own within the margin."""
        equal = [pair.second for pair in self.against if pair.equivalence.holds]
        return {cell.variant: cell for cell in (self.baseline, *equal)}


def find_algorithms(
    variants: Mapping[str, list[Cell]], primary_columns: Sequence[str]
) -> Algorithms | None:
    """None where there is one way of training only, models differ in size, or share no seed."""
    last = [cell for cells in variants.values() if (cell := last_cell(cells))]
    sizes = {cell.num_params for cell in last}
    if len(last) < 2 or len(sizes) > 1 or not np.isfinite(sizes.pop()):
        return None
    pairs = [compare_pair(*cells, primary_columns) for cells in combinations(last, 2)]
    known = [pair for pair in pairs if pair]
    against = [pair for pair in known if pair.first is last[0]]
    return Algorithms(last[0], against, known) if against else None
