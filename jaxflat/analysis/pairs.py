"""Two sizes of a sweep side by side, and which way the difference between them goes."""

from dataclasses import dataclass

from jaxflat.analysis.hierarchical import Split
from jaxflat.analysis.results import Cell
from jaxflat.analysis.statistics import Equivalence, Interval

MARGIN = 0.002  # nats
MARGINS = (MARGIN / 2, MARGIN, MARGIN * 2)


@dataclass(frozen=True)
class Pair:
    """Two sizes, each at one checkpoint: differences larger - smaller, ratios larger / smaller.

    `candidates` is how many pairs of checkpoints this one was chosen from, by its excess losses;
    the equivalence tests' p is multiplied by it (Bonferroni), which allows for that choice.
    `flatness` has all that was measured in both; None, undecided, where a value is not positive.
    `split` says where the scatter of the accuracy difference comes from.
    """

    smaller: Cell
    larger: Cell
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
    def trace_ratio(self) -> Interval | None:
        """Of the first measure, whatever it says."""
        return next(iter(self.flatness.values()), None)

    @property
    def accuracy_side(self) -> int:
        """+1: the larger model is more accurate; -1: less; 0: undecided."""
        return 0 if self.accuracy is None else self.accuracy.side(0.0)

    @property
    def flatness_side(self) -> int:
        """+1: the larger model is flatter (the smaller trace); -1: sharper; 0: undecided."""
        return 0 if self.trace_ratio is None else -self.trace_ratio.side(1.0)

    @property
    def relation(self) -> int:
        """+1: the flatter model is the more accurate; -1: the less accurate; 0: cannot be told."""
        return self.accuracy_side * self.flatness_side
