"""Correlations of two measures over the checkpoints of one seed, and their mean over seeds.

Arrays end in the checkpoints of one seed (N); leading axes, as seeds (S), are independent.
Checkpoints of one run share their past and runs of one seed their data, so N values are not N
independent ones. Seeds are: each gives one correlation, and the interval is of their mean. A
correlation is NaN where it is not defined.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jaxflat.analysis.statistics import LEVEL, Interval, standard_error

TINY = 1e-9  # of a measure's spread: what is left of it below that is rounding


def spearman(x_xN: ArrayLike, y_xN: ArrayLike) -> np.ndarray:
    """Pearson's correlation of the (mid-)ranks (Spearman 1904, Am. J. Psychol. 15:72)."""
    return _pearson(ranks(x_xN), ranks(y_xN))


def kendall(x_xN: ArrayLike, y_xN: ArrayLike, chosen_NxN: np.ndarray | None = None) -> np.ndarray:
    """tau_b = sum s_ij t_ij / sqrt(sum s_ij^2 sum t_ij^2), s_ij = sign(x_i - x_j), t_ij of y,

    over all pairs, or those that `chosen_NxN` marks (Kendall 1945, Biometrika 33:239). Without
    ties, tau is the mean of taus over disjoint sets of pairs, weighted by their sizes.
    """
    s_xNxN, t_xNxN = signs(x_xN), signs(y_xN)
    if chosen_NxN is not None:
        s_xNxN, t_xNxN = s_xNxN * chosen_NxN, t_xNxN * chosen_NxN
    scale_x = np.sqrt((s_xNxN**2).sum((-2, -1)) * (t_xNxN**2).sum((-2, -1)))
    return _ratio((s_xNxN * t_xNxN).sum((-2, -1)), scale_x)


def partial_correlation(x_xN: ArrayLike, y_xN: ArrayLike, covariates_xNxK: ArrayLike) -> np.ndarray:
    """Pearson's correlation of the residuals of x and of y on the covariates and a constant.

    For one covariate z it is (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)). NaN where fewer
    than two residual degrees of freedom are left besides the constant's: it would be +-1 always.
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
    """The partial correlation of the ranks given the covariates' ranks."""
    z_xKxN = ranks(np.swapaxes(np.asarray(covariates_xNxK, float), -1, -2))
    return partial_correlation(ranks(x_xN), ranks(y_xN), np.swapaxes(z_xKxN, -1, -2))


def correlation_interval(values_S: Sequence[float], grid: float) -> Interval | None:
    """mean r +- t(0.975, S-1) max(s, grid / sqrt(12)) / sqrt(S), cut off at -1 and 1.

    `grid` is the distance of two neighbouring values of the statistic, `grid / sqrt(12)` the
    standard deviation of rounding to it: seeds that agree exactly (as all at +-1) agree to within
    the grid only. There is no Fisher z: it is infinite at +-1, which few checkpoints often reach,
    and its mean is not that of the correlation. None where a seed has no correlation.
    """
    if not len(values_S) or not np.all(np.isfinite(values_S)):
        return None
    mean, count = float(np.mean(values_S)), len(values_S)
    error = standard_error(values_S)
    if error is None:
        return Interval(mean, None, None, count)
    error = max(error, grid / np.sqrt(12 * count))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Interval(mean, max(-1.0, mean - half), min(1.0, mean + half), count)


def spearman_grid(n: int) -> float:
    """6 * 2 / (n (n^2 - 1)): exchanging two neighbours changes the sum of squares by 2."""
    return 12 / (n * (n**2 - 1))


def kendall_grid(num_pairs: int) -> float:
    """Turning one of the pairs around changes tau by 2 / num_pairs."""
    return 2 / num_pairs


def ranks(values_xN: ArrayLike) -> np.ndarray:
    return stats.rankdata(np.asarray(values_xN, float), axis=-1)


def signs(values_xN: ArrayLike) -> np.ndarray:
    """sign(x_i - x_j) for all i, j."""
    values_xN = np.asarray(values_xN, float)
    return np.sign(values_xN[..., :, None] - values_xN[..., None, :])


def _pearson(x_xN: np.ndarray, y_xN: np.ndarray) -> np.ndarray:
    x_xN, y_xN = (values - values.mean(-1, keepdims=True) for values in (x_xN, y_xN))
    return _ratio((x_xN * y_xN).sum(-1), np.sqrt((x_xN**2).sum(-1) * (y_xN**2).sum(-1)))


def _ratio(above_x: np.ndarray, below_x: np.ndarray) -> np.ndarray:
    """above / below within [-1, 1]; NaN where nothing varies."""
    empty_x = np.full(np.shape(below_x), np.nan)
    return np.clip(np.divide(above_x, below_x, out=empty_x, where=below_x > 0), -1, 1)
