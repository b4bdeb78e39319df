"""Sampling until an estimate is as precise as asked."""

import math
from collections.abc import Callable

from jaxflat.flatness.terms import TraceTerms

MIN_SAMPLES = 128


def sample_until(
    draw_round: Callable[[int], TraceTerms],
    relative_error: float,
    max_rounds: int,
    min_samples: int = MIN_SAMPLES,
) -> TraceTerms:
    """The samples of as many rounds as make t(0.975, n - 1) SEM of the total small beside |mean|.

    `draw_round(i)` gives round i's samples: the same number in each round, independent of those of
    other rounds in all that the error covers. The error is looked at after 1, 2, 4, ... rounds and
    sampling stops at the first look of at least `min_samples` samples where it is at most
    relative_error |mean|, at the latest after `max_rounds`. Samples that happen to lie close
    together stop early: few looks, fixed beforehand, and none at few samples keep what that costs
    an interval of its coverage small. Whether the aim was reached is read off the estimate itself.
    """
    rounds: list[TraceTerms] = []
    look = 1
    while True:
        rounds += [draw_round(i) for i in range(len(rounds), min(look, max_rounds))]
        terms = TraceTerms.concatenate(rounds)
        total = terms.total()
        half_width = (total.interval()[1] - total.mean).item()
        precise = half_width <= relative_error * abs(total.mean.item())
        precise &= total.num_samples >= min_samples
        if precise or len(rounds) >= max_rounds or not math.isfinite(total.mean.item()):
            return terms
        look *= 2
