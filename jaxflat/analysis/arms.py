"""Compare arms whose models have one size, at their last checkpoints.

The sweep's first arm is the baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from jaxflat.analysis.cells import Cell, last_cell
from jaxflat.analysis.pairs import Pair, compare_pair


@dataclass(frozen=True)
class ArmComparison:
    """`against` pairs the baseline with every other arm; `pairs` has all pairs of arms.

    Checkpoints are fixed in advance (the last), so no loss decides the choice. The second of a
    pair is the one that comes later in the sweep.
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
    arms: Mapping[str, list[Cell]], primary_columns: Sequence[str]
) -> ArmComparison | None:
    """Pair the arms, each at its last checkpoint.

    Returns None if there is only one, if models differ in size, or if none shares a seed with the
    baseline.
    """
    last = [cell for cells in arms.values() if (cell := last_cell(cells))]
    sizes = {cell.num_params for cell in last}
    if len(last) < 2 or len(sizes) > 1 or not np.isfinite(sizes.pop()):
        return None
    pairs = [compare_pair(*cells, primary_columns) for cells in combinations(last, 2)]
    known = [pair for pair in pairs if pair]
    against = [pair for pair in known if pair.first is last[0]]
    return ArmComparison(last[0], against, known) if against else None
