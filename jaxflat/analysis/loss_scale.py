"""The scale on which a sweep's losses are compared: as excess losses, or as held-out losses.

The excess over a known optimum has an absolute zero, so excess losses are compared by their ratio.
The optimum of a text is not known. Its held-out losses are compared by their difference, which is
also the difference of the two unknown excess losses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxflat.analysis.plan import Plan
from jaxflat.analysis.results_csv import Row
from jaxflat.analysis.statistics.intervals import Equivalence, tost_paired, tost_two_sources


@dataclass(frozen=True)
class LossScale:
    """A column of losses in nats, and how two of them compare: by ratio (is_log) or difference.

    noun: its name in a sentence.
    """

    column: str
    noun: str
    is_log: bool

    @property
    def nouns(self) -> str:
        """The plural of the noun."""
        return f"{self.noun}es"

    @property
    def label(self) -> str:
        """Its name above a column or beside an axis."""
        return f"{self.noun.capitalize()} (nats)"

    def claim(self, finding: str) -> str:
        """Return a claim on models whose losses are equal on this scale."""
        return f"At equal {self.noun} {finding}"

    def margin(self, plan: Plan) -> float:
        """Return the largest ratio, or difference in nats, of two losses that count as equal."""
        return plan.loss_ratio if self.is_log else plan.loss_margin_nats

    def margins(self, margin: float) -> tuple[float, float, float]:
        """Return half the margin (of a ratio: of its logarithm), the margin, and twice it."""
        if self.is_log:
            return margin**0.5, margin, margin**2
        return 0.5 * margin, margin, 2 * margin

    def margin_words(self, margin: float) -> str:
        return f"a factor of {margin:.3g}" if self.is_log else f"{margin:.3g} nats"

    def positions(self, losses: Sequence[float]) -> np.ndarray | None:
        """Return the losses on this scale; None if one has no logarithm where it needs one."""
        if not self.is_log:
            return np.asarray(losses, float)
        return np.log(losses) if min(losses) > 0 else None

    def span(self, losses: Sequence[float], margin: float) -> tuple[float, float] | None:
        """Return the ends of an interval as wide as the margin, in the middle of the losses."""
        if self.positions(losses) is None:
            return None
        low, high = min(losses), max(losses)
        if not self.is_log:
            return (low + high - margin) / 2, (low + high + margin) / 2
        middle = (low * high) ** 0.5
        return middle / margin**0.5, middle * margin**0.5

    def equal_losses(
        self,
        first: Sequence[float],
        second: Sequence[float],
        margin: float,
        documents: tuple[float, int] | None = None,
    ) -> Equivalence:
        """Test whether paired losses are equal within the margin, the result's `margin`.

        documents: the standard error of the mean difference over held-out documents, and the number
        of values that it is from. p is None if there is only one pair, or if a loss has no place.
        """
        one, two = self.positions(first), self.positions(second)
        if one is None or two is None:
            return Equivalence(margin, None)
        if documents:
            return tost_two_sources((two - one).tolist(), *documents, margin)
        bound = float(np.log(margin)) if self.is_log else margin
        return replace(tost_paired(one.tolist(), two.tolist(), bound), margin=margin)


EXCESS_LOSS = LossScale("excess_loss", "excess loss", is_log=True)
HELD_OUT_LOSS = LossScale("loss", "held-out loss", is_log=False)
SCALES = EXCESS_LOSS, HELD_OUT_LOSS


def loss_scale(rows: Iterable[Row]) -> LossScale:
    """Return the scale of these rows: held-out losses if they have losses without an optimum."""
    has_loss = False
    for row in rows:
        if "excess_loss" in row.values or "optimal_loss" in row.values:
            return EXCESS_LOSS
        has_loss |= "loss" in row.values
    return HELD_OUT_LOSS if has_loss else EXCESS_LOSS
