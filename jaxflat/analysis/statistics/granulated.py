"""How well a measure predicts accuracy beyond the hyper-parameters (Jiang et al. 2020).

"Fantastic generalization measures and where to find them", ICLR 2020, arXiv:1912.02178. `axes` maps
each hyper-parameter to its values at the N checkpoints of a seed. Only checkpoints of the same seed
are compared.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from jaxflat.analysis.statistics.correlation import kendall, signs

Axes = Mapping[str, Sequence[str]]
MOST_CONDITIONS = 2  # the most hyper-parameters in a conditioning set, as in the paper


@dataclass(frozen=True)
class Granulated:
    """The coefficient and its part for each axis, with one value per seed."""

    mean_x: np.ndarray
    by_axis: dict[str, np.ndarray]
    num_pairs: int


@dataclass(frozen=True)
class Information:
    """`score` is the smallest fraction over conditioning sets; `conditions` is that set."""

    score: float
    conditions: tuple[str, ...]


def granulated_kendall(x_xN: ArrayLike, y_xN: ArrayLike, axes: Axes) -> Granulated | None:
    """Psi = mean over axes i of psi_i, psi_i = mean over groups of tau(group),

    where a group holds the checkpoints that differ in hyper-parameter i alone. Axes without a group
    of two are excluded; the result is None if no axis has one.
    """
    x_xN, y_xN = np.asarray(x_xN, float), np.asarray(y_xN, float)
    by_axis, num_pairs = {}, 0
    for name in axes:
        groups = _groups(axes, name)
        if groups:
            taus = [kendall(x_xN[..., group], y_xN[..., group]) for group in groups]
            by_axis[name] = np.mean(taus, axis=0)
            num_pairs += sum(len(group) * (len(group) - 1) // 2 for group in groups)
    if not by_axis:
        return None
    return Granulated(np.mean(list(by_axis.values()), axis=0), by_axis, num_pairs)


def information_score(
    accuracy_SxN: ArrayLike, measure_SxN: ArrayLike, axes: Axes
) -> Information | None:
    """min over U of I(V_accuracy; V_measure | U) / H(V_accuracy | U), in [0, 1].

    V is the sign of the difference of an ordered pair of checkpoints of one seed, pooled over
    seeds. U is the values of at most two hyper-parameters at both checkpoints. Entropies are
    computed from counts, which biases the score upwards in small tables. Sets that identify each
    checkpoint are excluded, since only the seed's noise would remain. So are sets that leave
    nothing to explain. The result is None if no set remains.
    """
    accuracy_SxN = np.atleast_2d(accuracy_SxN)
    n = accuracy_SxN.shape[-1]
    pairs_NxN = ~np.eye(n, dtype=bool)
    v_SxP, w_SxP = (signs(a)[..., pairs_NxN] for a in (accuracy_SxN, np.atleast_2d(measure_SxN)))
    found = []
    for conditions in _condition_sets(axes):
        codes_N = _codes(axes, conditions, n)
        if conditions and len(np.unique(codes_N)) == n:
            continue
        u_P = (codes_N[:, None] * n + codes_N[None, :])[pairs_NxN]
        share = conditional_information(v_SxP, w_SxP, np.broadcast_to(u_P, v_SxP.shape))
        if np.isfinite(share):
            found.append(Information(share, conditions))
    return min(found, key=lambda one: one.score, default=None)


def chance_score(
    accuracy_SxN: np.ndarray, measure_SxN: np.ndarray, axes: Axes, num_draws: int = 50
) -> float:
    """Return the bias: the mean score with the measure in random order within each seed."""
    random = np.random.default_rng(0)
    draws = (random.permuted(measure_SxN, axis=-1) for _ in range(num_draws))
    scores = [information_score(accuracy_SxN, draw, axes) for draw in draws]
    return float(np.mean([one.score for one in scores if one]))


def conditional_information(v: np.ndarray, w: np.ndarray, u: np.ndarray) -> float:
    """Return I(V; W | U) / H(V | U) from counts of whole numbers, NaN if H is 0.

    I = H(V,U) + H(W,U) - H(V,W,U) - H(U).
    """
    v, w, u = ((x.ravel() - x.min()).astype(int) for x in (v, w, u))
    shape = (u.max() + 1, v.max() + 1, w.max() + 1)
    codes = np.ravel_multi_index((u, v, w), shape)
    joint_UxVxW = np.bincount(codes, minlength=np.prod(shape)).reshape(shape)
    h_vu, h_wu = _entropy(joint_UxVxW.sum(2)), _entropy(joint_UxVxW.sum(1))
    h_u, h_vwu = _entropy(joint_UxVxW.sum((1, 2))), _entropy(joint_UxVxW)
    left = h_vu - h_u
    return (
        float("nan") if left < 1e-12 else float(np.clip((h_vu + h_wu - h_vwu - h_u) / left, 0, 1))
    )


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _groups(axes: Axes, name: str) -> list[list[int]]:
    """Group the indices that agree in every hyper-parameter but `name`; drop constant groups."""
    keys = list(zip(*(values for axis, values in axes.items() if axis != name), strict=True))
    keys = keys or [()] * len(axes[name])
    groups = [[i for i, key in enumerate(keys) if key == one] for one in Counter(keys)]
    return [group for group in groups if len({axes[name][i] for i in group}) > 1]


def _condition_sets(axes: Axes) -> list[tuple[str, ...]]:
    return [chosen for size in range(MOST_CONDITIONS + 1) for chosen in combinations(axes, size)]


def _codes(axes: Axes, names: tuple[str, ...], n: int) -> np.ndarray:
    """Number the combinations of the values of the hyper-parameters `names`."""
    keys = list(zip(*(axes[name] for name in names), strict=True)) or [()] * n
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])
