"""Judge the claims that a sweep can test, each by statistics over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.effects import (
    common_column,
    control_arms,
    effect_tests,
    strength_keys,
    why_not_measured,
)
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.label_noise import label_noise_test
from jaxflat.analysis.loss_scale import LossScale
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import Pair, why_unmatched
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY
from jaxflat.analysis.statistics.intervals import Interval, log_ratio_interval, mean_interval
from jaxflat.analysis.verdicts import ACCURACY, FLATNESS, ClaimTest, Verdict, decide

ONE_SEED = "one seed gives no interval"
OPPOSITE = ", the opposite"  # ends the evidence if the embedded trace contradicts the invariant one


def judge(comparison: Comparison) -> list[Verdict]:
    """Return a verdict on every claim that the sweep's design can test, the primary ones first."""
    noise = label_noise_test(comparison)
    tests = [
        *_on_sizes(comparison),
        *_on_arms(comparison),
        *effect_tests(comparison),
        *([noise] if noise else []),
    ]
    return decide(tests, comparison.plan.primary)


def _on_sizes(comparison: Comparison) -> list[ClaimTest]:
    sizes = {cell.num_params for cell in comparison.cells}
    if len(sizes) < 2 and comparison.arm_comparison:
        return []
    larger = "the larger model"
    scale, obstacle = comparison.scale, comparison.obstacle
    return _on_second(scale, comparison.pairs, larger, "the", obstacle)


def _on_arms(comparison: Comparison) -> list[ClaimTest]:
    """Judge each arm against the baseline; doses of a curvature are judged by their effects."""
    if not comparison.arm_comparison:
        return []
    pairs = comparison.arm_comparison.against
    if strength_keys(comparison):
        controls = control_arms(comparison)
        pairs = [pair for pair in pairs if pair.second.arm in controls]
    return [
        test
        for pair in pairs
        for test in _on_second(
            pair.scale, [pair], pair.second.arm, "", "", f" than {pair.first.arm}"
        )
    ]


def _on_second(
    scale: LossScale,
    pairs: Sequence[Pair],
    second: str,
    article: str,
    obstacle: str,
    than: str = "",
) -> list[ClaimTest]:
    """Test whether the second model of the pairs is more accurate, and whether it is flatter."""
    claims = {
        kind: " ".join(scale.claim(f"{second} is {article} {word}{than}").split())
        for kind, word in ((ACCURACY, "more accurate"), (FLATNESS, "flatter"))
    }
    matched = [pair for pair in pairs if pair.equivalence.holds]
    if not matched:
        why = obstacle or why_unmatched(pairs)
        return [
            ClaimTest(claim, kind, reason=why, subject=second) for kind, claim in claims.items()
        ]
    of = ("larger", "smaller") if article else (second, "the other")
    over = f"mean over {wording.plural(len(matched), 'pair')}" if article else ""
    tests = (
        _more_accurate(claims[ACCURACY], matched, of, over),
        _flatter(claims[FLATNESS], matched, of, over),
    )
    return [replace(test, subject=second, over=over) for test in tests]


def _more_accurate(claim: str, pairs: list[Pair], of: tuple[str, str], over: str) -> ClaimTest:
    means = seed_means(pairs, accuracy_difference, PRIMARY_ACCURACY)
    if not means:
        known = any(cell.by_seed(PRIMARY_ACCURACY) for p in pairs for cell in (p.first, p.second))
        why = "no seed has the accuracy of every pair" if known else "no accuracy was measured"
        return ClaimTest(claim, ACCURACY, reason=why)
    interval = mean_interval([round(mean, 12) for mean in means])
    sides = [pair.accuracy.side(0.0) for pair in pairs if pair.accuracy]
    if interval.side(0.0) and -interval.side(0.0) in sides:
        why = f"pairs disagree; their mean is {wording.points(interval)} points"
        return ClaimTest(claim, ACCURACY, reason=why)
    return ClaimTest(
        claim,
        ACCURACY,
        "; ".join(filter(None, (f"accuracy, {of[0]} minus {of[1]}, points", over))),
        wording.points(interval),
        side=int(np.sign(interval.mean)),
        p=interval.p(0.0),
        reason="" if len(means) > 1 else ONE_SEED,
    )


def _flatter(claim: str, pairs: list[Pair], of: tuple[str, str], over: str) -> ClaimTest:
    """Test the geometric mean of the pairs' ratios, and say if the embedded trace disagrees."""
    cells = [cell for pair in pairs for cell in (pair.first, pair.second)]
    column = common_column(cells)
    why = why_not_measured(cells, column)
    ratio = None if why else _ratio(pairs, column)
    if ratio is None:
        return ClaimTest(claim, FLATNESS, reason=why or "no seed has the flatness of every pair")
    sides = [found.side(1.0) for pair in pairs if (found := pair.flatness.get(column))]
    if ratio.side(1.0) and -ratio.side(1.0) in sides:
        why = f"pairs disagree; their mean ratio is {wording.ratio(ratio)}"
        return ClaimTest(claim, FLATNESS, reason=why)
    evidence = wording.ratio(ratio)
    embedded = column.removesuffix("_invariant")
    if embedded != column and (other := _ratio(pairs, embedded)):
        opposite = other.side(1.0) * ratio.side(1.0) < 0
        evidence += f"; by the embedded trace {wording.ratio(other)}{OPPOSITE * opposite}"
    return ClaimTest(
        claim,
        FLATNESS,
        "; ".join(filter(None, (f"{COMPARED[column]}, {of[0]} over {of[1]}", over))),
        evidence,
        side=-int(np.sign(np.log(ratio.mean))),
        p=ratio.p_ratio(),
        reason="" if ratio.count > 1 else ONE_SEED,
    )


def _ratio(pairs: list[Pair], column: str) -> Interval | None:
    """Return the geometric mean over pairs of second over first."""

    logs = seed_means(pairs, partial(log_ratio, column), column)
    if not logs or not np.isfinite(logs).all():
        return None
    return log_ratio_interval([1.0] * len(logs), np.exp(logs).tolist())


Values = dict[str, float]


def accuracy_difference(first: Values, second: Values) -> float:
    """Return the second model's accuracy minus the first's."""
    return second[PRIMARY_ACCURACY] - first[PRIMARY_ACCURACY]


def log_ratio(column: str, first: Values, second: Values) -> float:
    """Return the logarithm of second over first; nan if one is not positive."""
    values = first[column], second[column]
    return float(np.log(values[1] / values[0])) if min(values) > 0 else np.nan


def seed_means(
    pairs: list[Pair], value: Callable[[Values, Values], float], column: str
) -> list[float]:
    """Return the mean of `value` over pairs, for each seed that has the column in every pair."""
    cells = [cell for pair in pairs for cell in (pair.first, pair.second)]
    by_seed = [cell.by_seed(column) for cell in cells]
    seeds = [seed for seed in by_seed[0] if all(seed in found for found in by_seed)]
    return [
        float(np.mean([value(p.first.rows[s].values, p.second.rows[s].values) for p in pairs]))
        for s in seeds
    ]
