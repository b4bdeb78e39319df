"""Correlations of two measures over the checkpoints of one seed, and their mean over seeds.

The last axis of an array holds the checkpoints of one seed (N); leading axes, such as seeds (S),
are independent. Checkpoints of one run share their past and runs of one seed share their data, so
N values are not independent. Seeds are independent: each gives one correlation, and the interval
covers the mean correlation. An undefined correlation is NaN, and intervals leave its seed out.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jaxflat.analysis.statistics.intervals import Interval, student_quantile

TINY = 1e-9  # of a measure's spread: smaller residuals are rounding errors


def spearman(x_xN: ArrayLike, y_xN: ArrayLike) -> np.ndarray:
    """Return Pearson's correlation of the (mid-)ranks (Spearman 1904, Am. J. Psychol. 15:72)."""
    return _pearson(ranks(x_xN), ranks(y_xN))


def kendall(x_xN: ArrayLike, y_xN: ArrayLike, chosen_NxN: np.ndarray | None = None) -> np.ndarray:
    """tau_b = sum s_ij t_ij / sqrt(sum s_ij^2 sum t_ij^2), s_ij = sign(x_i - x_j), t_ij of y,

    over all pairs, or those that `chosen_NxN` marks (Kendall 1945, Biometrika 33:239). Without
    ties, tau is the mean of the taus of disjoint sets of pairs, weighted by their sizes.
    """
    s_xNxN, t_xNxN = signs(x_xN), signs(y_xN)
    if chosen_NxN is not None:
        s_xNxN, t_xNxN = s_xNxN * chosen_NxN, t_xNxN * chosen_NxN
    scale_x = np.sqrt((s_xNxN**2).sum((-2, -1)) * (t_xNxN**2).sum((-2, -1)))
    return _ratio((s_xNxN * t_xNxN).sum((-2, -1)), scale_x)


def partial_correlation(x_xN: ArrayLike, y_xN: ArrayLike, covariates_xNxK: ArrayLike) -> np.ndarray:
    """Correlate (Pearson) the residuals of x and y after regression on covariates and a constant.

    For one covariate z it is (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)). It needs two
    degrees of freedom after the constant and the covariates; with fewer it would always be +-1,
    and NaN is returned.
    """
    x_xN, y_xN, z_xNxK = (np.asarray(a, float) for a in (x_xN, y_xN, covariates_xNxK))
    z_xNxK = z_xNxK - z_xNxK.mean(-2, keepdims=True)
    scale_x1xK = np.sqrt((z_xNxK**2).sum(-2, keepdims=True))
    z_xNxK = np.divide(z_xNxK, scale_x1xK, out=np.zeros_like(z_xNxK), where=scale_x1xK > 0)
    inverse_xKxN = np.linalg.pinv(z_xNxK, rcond=TINY)
    residual_x = x_xN.shape[-1] - 1 - np.linalg.matrix_rank(z_xNxK, tol=TINY)

    def left(values_xN: np.ndarray) -> np.ndarray:
        centred_xN = values_xN - values_xN.mean(-1, keepdims=True)
        fit_xN = (z_xNxK @ (inverse_xKxN @ centred_xN[..., None]))[..., 0]
        rest_xN = centred_xN - fit_xN
        spread_x1 = np.abs(centred_xN).max(-1, keepdims=True)
        return np.where(np.abs(rest_xN).max(-1, keepdims=True) > TINY * spread_x1, rest_xN, 0.0)

    return np.where(residual_x >= 2, _pearson(left(x_xN), left(y_xN)), np.nan)


def partial_spearman(x_xN: ArrayLike, y_xN: ArrayLike, covariates_xNxK: ArrayLike) -> np.ndarray:
    """Return the partial correlation of the ranks given the covariates' ranks."""
    z_xKxN = ranks(np.swapaxes(np.asarray(covariates_xNxK, float), -1, -2))
    return partial_correlation(ranks(x_xN), ranks(y_xN), np.swapaxes(z_xKxN, -1, -2))


def spearman_interval(r_S: ArrayLike, n: int) -> Interval | None:
    """tanh(mean z +- t(0.975, S-1) sqrt((s^2 + g^2 / 12) / S)), z = atanh r (Fisher 1915, 1921).

    Spearman's correlations of n checkpoints lie on a grid, d = 12 / (n (n^2 - 1)) apart. z is
    infinite at +-1, so +-1 counts as half a step inside. Even seeds that agree exactly agree only
    to within the grid, so the variance of rounding to the grid is added. On the scale of z the step
    is g = d / (1 - r^2). We average z because r is skewed and the mean of z is nearly normal.
    """
    step = spearman_grid(n)
    most = 1 - step / 2
    z_S = np.arctanh(np.clip(_defined(r_S), -most, most))
    if not z_S.size:
        return None
    found = _student(z_S, step / (1 - np.tanh(z_S.mean()) ** 2))
    mean, *ends = (None if x is None else float(np.tanh(x)) for x in found)
    assert mean is not None
    return Interval(mean, ends[0], ends[1], z_S.size)


def kendall_interval(tau_S: ArrayLike, num_pairs: int) -> Interval | None:
    """mean tau +- t(0.975, S-1) sqrt((s^2 + d^2 / 12) / S), cut off at -1 and 1, d = 2 / pairs.

    Fisher's z is not needed: a tau is a mean of signs and already nearly normal. Without it, the
    taus of disjoint sets of pairs still average to the tau of all pairs.
    """
    tau_S = _defined(tau_S)
    if not tau_S.size:
        return None
    mean, low, high = _student(tau_S, 2 / num_pairs)
    if low is None or high is None:
        return Interval(mean, None, None, tau_S.size)
    return Interval(mean, max(-1.0, low), min(1.0, high), tau_S.size)


def spearman_grid(n: int) -> float:
    """Return 6 * 2 / (n (n^2 - 1)): exchanging two neighbours changes the sum of squares by 2."""
    return 12 / (n * (n**2 - 1))


def ranks(values_xN: ArrayLike) -> np.ndarray:
    return stats.rankdata(np.asarray(values_xN, float), axis=-1)


def signs(values_xN: ArrayLike) -> np.ndarray:
    """Return sign(x_i - x_j) for all i, j."""
    values_xN = np.asarray(values_xN, float)
    return np.sign(values_xN[..., :, None] - values_xN[..., None, :])


def _pearson(x_xN: np.ndarray, y_xN: np.ndarray) -> np.ndarray:
    x_xN, y_xN = (values - values.mean(-1, keepdims=True) for values in (x_xN, y_xN))
    return _ratio((x_xN * y_xN).sum(-1), np.sqrt((x_xN**2).sum(-1) * (y_xN**2).sum(-1)))


def _ratio(above_x: np.ndarray, below_x: np.ndarray) -> np.ndarray:
    """Return above / below within [-1, 1], NaN if below is 0 (a measure does not vary)."""
    empty_x = np.full(np.shape(below_x), np.nan)
    return np.clip(np.divide(above_x, below_x, out=empty_x, where=below_x > 0), -1, 1)


def _defined(values_S: ArrayLike) -> np.ndarray:
    values_S = np.asarray(values_S, float)
    return values_S[np.isfinite(values_S)]


def _student(values_S: np.ndarray, step: float) -> tuple[float, float | None, float | None]:
    """Return the mean and the ends of its t interval, with the variance of rounding to `step`."""
    mean, count = float(values_S.mean()), len(values_S)
    if count < 2:
        return mean, None, None
    error = float(np.sqrt((values_S.var(ddof=1) + step**2 / 12) / count))
    half = student_quantile(count) * error
    return mean, mean - half, mean + half
