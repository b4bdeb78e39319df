"""Intervals and tests over seeds. One seed gives no interval: both ends are None."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval; the ends are None if there is only one value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def p(self, null: float) -> float | None:
        """Return the p of the two-sided t test of `null`; None without an interval."""
        if self.half_width is None:
            return None
        return _two_sided(self.mean - null, self.half_width, self.count)

    def p_ratio(self, null: float = 1.0) -> float | None:
        """Return the p of the test that a ratio is `null`, by the t interval of its logarithm."""
        if self.low is None or self.high is None:
            return None
        half = float(np.log(self.high / self.low)) / 2
        return _two_sided(float(np.log(self.mean / null)), half, self.count)

    def side(self, null: float) -> int:
        """Return +1 or -1 if the whole interval lies above or below `null`, else 0 (undecided)."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > null) - int(self.high < null)


@dataclass(frozen=True)
class Equivalence:
    """The two one-sided tests at one margin; p is None if there is only one pair."""

    margin: float
    p: float | None

    @property
    def holds(self) -> bool:
        return self.p is not None and self.p < 1 - LEVEL


def standard_error(values: Sequence[float]) -> float | None:
    """Return s / sqrt(n), with s^2 = sum (x - mean)^2 / (n - 1)."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def student_quantile(count: int) -> float:
    """Return t(0.975, n - 1) for n values."""
    return float(special.stdtrit(count - 1, (1 + LEVEL) / 2))


def _two_sided(difference: float, half_width: float, count: int) -> float:
    """Return P(|T| > |difference| / error), T ~ t(n - 1); the half-width gives the error."""
    if half_width == 0:
        return float(difference == 0)
    t = abs(difference) * student_quantile(count) / half_width
    return float(2 * special.stdtr(count - 1, -t))


def mean_interval(values: Sequence[float]) -> Interval:
    """Return mean +- t(0.975, n-1) s / sqrt(n) (Student 1908, "The probable error of a mean")."""
    mean, error, count = float(np.mean(values)), standard_error(values), len(values)
    if error is None:
        return Interval(mean, None, None, count)
    half = student_quantile(count) * error
    return Interval(mean, mean - half, mean + half, count)


def paired_t_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the t interval of second - first; what a pair shares (data, seed) cancels."""
    return mean_interval(np.subtract(second, first).tolist())


def log_ratio_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """Return exp of the paired t interval of log(second / first): the ratio of geometric means.

    The result is None if a value is not positive, since it has no logarithm.
    """
    if min(*first, *second) <= 0:
        return None
    log = paired_t_interval(np.log(first).tolist(), np.log(second).tolist())
    ends = [None if end is None else float(np.exp(end)) for end in (log.low, log.high)]
    return Interval(float(np.exp(log.mean)), ends[0], ends[1], log.count)


def tost_paired(first: Sequence[float], second: Sequence[float], margin: float) -> Equivalence:
    """Test whether two paired means are equal within +-margin, by two one-sided t-tests:

        p = max( P(T > (mean d + margin) / se),  P(T < (mean d - margin) / se) ),  T ~ t(n-1),

    with d = second - first. A small p rejects "they differ by margin or more" (Schuirmann 1987,
    J. Pharmacokinet. Biopharm. 15:657).
    """
    return tost(np.subtract(second, first).tolist(), margin)


def tost(values: Sequence[float], margin: float) -> Equivalence:
    """Test whether the mean of the values lies within +-margin, as `tost_paired`."""
    mean, error = float(np.mean(values)), standard_error(values)
    if error is None:
        return Equivalence(margin, None)
    if error == 0:
        return Equivalence(margin, float(abs(mean) >= margin))
    freedom = len(values) - 1
    above, below = (special.stdtr(freedom, (s * mean - margin) / error) for s in (-1, 1))
    return Equivalence(margin, float(max(above, below)))


def tost_two_sources(
    values: Sequence[float], error: float, count: int, margin: float
) -> Equivalence:
    """Test whether a mean lies within +-margin, as `tost`, with a second source of error.

    values: n independent values, with the standard error e of their mean. error: e' of the mean
    from a source that all values share, from `count` = m values. The variance is e^2 + e'^2, with

        (e^2 + e'^2)^2 / (e^4 / (n - 1) + e'^4 / (m - 1))

    degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2:110).
    """
    own = standard_error(values)
    if own is None or error == 0:
        return tost(values, margin)
    mean, variance = float(np.mean(values)), own**2 + error**2
    freedom = variance**2 / (own**4 / (len(values) - 1) + error**4 / (count - 1))
    places = ((s * mean - margin) / variance**0.5 for s in (-1, 1))
    return Equivalence(margin, float(max(special.stdtr(freedom, place) for place in places)))


def quotient_interval(tops: np.ndarray, bottoms: np.ndarray) -> Interval:
    """Return mean(tops) / mean(bottoms) with the values that a paired t test does not reject.

    A quotient q is rejected if the mean of tops - q bottoms differs from 0 (Fieller 1954, J. R.
    Stat. Soc. B 16:175). So the ends solve (m_y - q m_x)^2 = t^2 (s_yy - 2 q s_xy + q^2 s_xx) / n.
    The ends are None if there is one pair, or if the mean of `bottoms` is not shown to differ
    from 0: then the interval has no end.
    """
    count, y, x = len(tops), float(np.mean(tops)), float(np.mean(bottoms))
    if count < 2:
        return Interval(y / x, None, None, count)
    (yy, xy), (_, xx) = np.cov(tops, bottoms) * student_quantile(count) ** 2 / count
    a, b, c = x**2 - xx, x * y - xy, y**2 - yy
    if a <= 0:
        return Interval(y / x, None, None, count)
    half = float(np.sqrt(max(0.0, b**2 - a * c))) / a
    return Interval(y / x, float(b / a) - half, float(b / a) + half, count)


def tost_quotient(tops: np.ndarray, bottoms: np.ndarray, margin: float) -> Equivalence:
    """Test whether mean(tops) / mean(bottoms) lies within +-margin; `bottoms` has a mean above 0.

    Two one-sided t tests compare tops - margin bottoms and tops + margin bottoms with 0.
    """
    sides = [mean_interval((s * tops - margin * bottoms).tolist()) for s in (-1, 1)]
    if len(tops) < 2:
        return Equivalence(margin, None)
    halves = [(side.mean, (side.p(0.0) or 0.0) / 2) for side in sides]
    return Equivalence(margin, max(half if mean < 0 else 1 - half for mean, half in halves))
