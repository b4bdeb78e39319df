"""Test whether flatness itself changes accuracy, in the contrasts that identify its effect.

An effect is in points of accuracy per halving of the trace, at equal excess loss. It is identified
where flatness differs and little else does: between doses of a flatness penalty, between label
noise and none, and between the seeds of one setting. Settings that differ otherwise describe.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import comb, factorial

import numpy as np

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.equal_loss import seeds_at_equal_loss
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import why_unmatched
from jaxflat.analysis.results_csv import LATENT_CEILING, PRIMARY_ACCURACY
from jaxflat.analysis.statistics.intervals import (
    LEVEL,
    Interval,
    log_ratio_interval,
    mean_interval,
    quotient_interval,
    tost,
    tost_quotient,
)
from jaxflat.analysis.statistics.permutation import num_orders, permutation_test
from jaxflat.analysis.verdicts import EFFECT, ClaimTest

FEWEST_SEEDS = 5  # with four, 24 permutations leave no room for a correction
LEAST_RATIO = 1.5  # of the traces, for a verdict that an effect is negligible
WITHIN = "the flatter of one setting's seeds are the more accurate"
ACROSS = "the flatter models are the more accurate"
STRENGTH = ".flatness_penalty.strength"
CONTROLS = ("parameter_norm", "feature_rank")  # of penalties: these are no curvatures

Contrast = tuple[Cell, Cell]  # a baseline, and an arm that differs from it in one thing
Arms = tuple[list[Cell], list[Cell]]  # of a contrast, before they are read at equal losses


def effect_tests(comparison: Comparison) -> list[ClaimTest]:
    """Return a test for every contrast that the sweep has."""
    tests = [_on_contrasts(comparison, *one) for one in contrasts_by_cause(comparison)]
    controls = dict.fromkeys(control_arms(comparison).values())
    tests += [_of_control(comparison, name) for name in controls]
    return [*(tests or [_across_settings(comparison)]), _within_settings(comparison)]


def contrast_effect(
    claim: str, contrasts: Sequence[Contrast], negligible: float, ceiling: float
) -> ClaimTest:
    """Test the points of accuracy that a halving of the trace adds, from contrasts with a baseline.

    Contrast d of seed s lowers the trace by x_ds halvings and raises accuracy by y_ds points. With
    x_d the mean over seeds, the effect is mean b_s / mean a_s over seeds, where mean a_s is 1:

        b_s = sum_d x_d y_ds / sum_d x_d^2,    a_s = sum_d x_d x_ds / sum_d x_d^2.

    Its interval is Fieller's (see `quotient_interval`), so it allows for the scatter of the traces.
    The two cells of a contrast have equal excess losses. The mean over arms and languages may hide
    that they disagree. So there is no verdict if the t interval of one of them lies on the other
    side. A negligible effect has to be shown for each: its gain lies within the margin times the
    halvings between the extreme traces. That gain also has to fit between the accuracies and their
    `ceiling` (points), where no effect can be seen. The effect is identified if the extreme traces
    differ, by a t test that is corrected for the number of pairs of arms (Bonferroni).
    """
    cells = [cell for contrast in contrasts for cell in contrast]
    column = common_column(cells)
    seeds = [seed for seed in cells[0].rows if all(_has(cell, seed, column) for cell in cells)]
    if why := why_not_measured(cells, column):
        return ClaimTest(claim, EFFECT, reason=why)
    if len(seeds) < 2:
        return ClaimTest(claim, EFFECT, reason="fewer than two seeds have every measurement")
    halvings_DxS = np.array([_halvings(*contrast, column, seeds) for contrast in contrasts])
    gains_DxS = np.array([_gains(*contrast, seeds) for contrast in contrasts])
    x_D = halvings_DxS.mean(1)
    # The baseline lies at 0 halvings and may be an end of the range.
    flattest_S, sharpest_S = (
        halvings_DxS[place] if outside else np.zeros(len(seeds))
        for place, outside in ((x_D.argmax(), x_D.max() > 0), (x_D.argmin(), x_D.min() < 0))
    )
    ratio = log_ratio_interval([1.0] * len(seeds), (2.0 ** (flattest_S - sharpest_S)).tolist())
    assert ratio is not None
    range_words = f"over traces that differ by {wording.ratio(ratio)}"
    num_pairs = comb(len(contrasts) + 1, 2)
    if num_pairs * (ratio.p_ratio() or 0.0) >= 1 - LEVEL:
        why = f"the contrast is not shown to change the trace, {wording.ratio(ratio)}"
        return ClaimTest(claim, EFFECT, reason=why, identified=False)
    weights_D = x_D / (x_D @ x_D)
    slopes_S, shares_S = weights_D @ gains_DxS, weights_D @ halvings_DxS
    slope = quotient_interval(slopes_S, shares_S)
    languages = np.array([cells[0].rows[seed].language for seed in seeds])
    parts = _parts(np.sign(x_D)[:, None] * gains_DxS, languages)
    slope_p = mean_interval(slopes_S.tolist()).p(0.0) or 0.0
    disagree = any(mean_interval(part).side(0.0) * slope.mean < 0 for part in parts)
    if disagree and slope_p < 1 - LEVEL:
        why = f"arms or languages disagree; the mean is {wording.slope(slope)} points per halving"
        return ClaimTest(claim, EFFECT, reason=why)
    room = ceiling - max(100 * cell.mean(PRIMARY_ACCURACY) for cell in cells)
    return ClaimTest(
        claim,
        EFFECT,
        f"points of accuracy per halving of the {COMPARED[column]}, {range_words}",
        wording.slope(slope),
        side=int(np.sign(slope.mean)),
        p=slope_p,
        p_negligible=_p_negligible(parts, (slopes_S, shares_S), negligible, ratio, room),
    )


def _p_negligible(
    parts: Sequence[list[float]],
    quotient: tuple[np.ndarray, np.ndarray],
    negligible: float,
    ratio: Interval,
    room: float,
) -> float | None:
    """Return the p of a negligible effect; None if the traces or the accuracies show too little."""
    gain = negligible * float(np.log2(ratio.mean))  # of an effect as large as the margin
    if ratio.low is None or ratio.low < LEAST_RATIO or gain > room:
        return None
    p_values = [tost(part, gain).p for part in parts]
    return max(p or 0.0 for p in [*p_values, tost_quotient(*quotient, negligible).p])


def _parts(gains_DxS: np.ndarray, languages_S: np.ndarray) -> list[list[float]]:
    """Return the gains of each arm in each language that has two seeds or more."""
    own = [languages_S == language for language in np.unique(languages_S)]
    return [gains_S[own_S].tolist() for gains_S in gains_DxS for own_S in own if own_S.sum() > 1]


def _has(cell: Cell, seed: str, column: str) -> bool:
    row = cell.rows.get(seed)
    return row is not None and PRIMARY_ACCURACY in row.values and row.values.get(column, 0.0) > 0


def common_column(cells: Sequence[Cell]) -> str:
    """Return the first flatness measure that any of the cells has, "" if there is none.

    A checkpoint that lacks it does not change the measure.
    """
    return next((name for name in COMPARED if any(cell.by_seed(name) for cell in cells)), "")


def why_not_measured(cells: Sequence[Cell], column: str) -> str:
    """Return why the cells' flatness cannot be compared, "" if it can."""
    if not column:
        return "no flatness was measured"
    if not all(cell.by_seed(column) for cell in cells):
        return f"the {COMPARED[column]} is missing at a checkpoint that is compared"
    if min(value for cell in cells for value in cell.by_seed(column).values()) <= 0:
        return f"the {COMPARED[column]} is not positive in every seed"
    return ""


def contrasts_by_cause(comparison: Comparison) -> list[tuple[str, list[Arms]]]:
    """Return what changes flatness, each with its pairs of a baseline and another arm.

    A cause is a penalty on one curvature, with strength 0 as the baseline, or label noise, with
    exact targets as the baseline. The two arms differ in nothing else. A cause without a baseline
    has no pairs.
    """
    found: list[tuple[str, list[Arms]]] = []
    for key in strength_keys(comparison):
        section = key.removesuffix("strength")
        strength, measure = partial(_number, key), partial(_text, f"{section}measure")
        controls = control_arms(comparison)
        by_measure: dict[str, list[Arms]] = {}
        for own in arms_alike(comparison, lambda name, section=section: name.startswith(section)):
            baseline = next((arm for arm in own if strength(arm) == 0), None)
            for dose in (arm for arm in own if strength(arm) and arm[0].arm not in controls):
                contrasts = by_measure.setdefault(measure(dose), [])
                contrasts += [(baseline, dose)] if baseline else []
        for name, contrasts in by_measure.items():
            found.append((_penalty_on(name) if name else "the penalty", contrasts))
    for key in [key for key in comparison.varied if key.endswith(".targets")]:
        contrasts = []
        for own in arms_alike(comparison, lambda name, key=key: name == key):
            by_targets = {_text(key, arm): arm for arm in own}
            if {"exact", "sampled"} <= by_targets.keys():
                contrasts.append((by_targets["exact"], by_targets["sampled"]))
        if contrasts:
            found.append(("label noise", contrasts))
    return found


def strength_keys(comparison: Comparison) -> list[str]:
    """Return the keys of penalties whose strengths differ between arms."""
    arms = list(comparison.arms.values())
    keys = dict.fromkeys(key for arm in arms for key in _swept(arm) if key.endswith(STRENGTH))
    return [key for key in keys if len({_number(key, arm) for arm in arms}) > 1]


def control_arms(comparison: Comparison) -> dict[str, str]:
    """Return the arms with a penalty that measures no curvature, each with what it measures."""
    found = {}
    for key in strength_keys(comparison):
        of = key.removesuffix("strength") + "measure"
        for name, arm in comparison.arms.items():
            measure = _text(of, arm) or comparison.plan.penalties.get(of, "")
            if _number(key, arm) and measure in CONTROLS:
                found[name] = measure
    return found


def _penalty_on(measure: str) -> str:
    return f"a penalty on {measure.replace('_', ' ')}"


def _of_control(comparison: Comparison, measure: str) -> ClaimTest:
    cause = _penalty_on(measure)
    why = f"{cause} is a control: what it penalises is no curvature, and it changes other things"
    claim = _claim(comparison, cause)
    return ClaimTest(claim, EFFECT, reason=why, identified=False, subject=cause)


def _claim(comparison: Comparison, cause: str) -> str:
    return comparison.scale.claim(f"a trace that {cause} lowers raises accuracy")


def _on_contrasts(comparison: Comparison, cause: str, arms: Sequence[Arms]) -> ClaimTest:
    """Test the effect in all contrasts of one cause together."""
    claim = _claim(comparison, cause)
    names = [(baseline[0].arm, arm[0].arm) for baseline, arm in arms]
    pairs = {
        (pair.first.arm, pair.second.arm): pair
        for found in comparison.settings
        for pair in found.pairs
    }
    # The baseline may come later in the sweep than the other arm of its contrast.
    compared = [(pairs.get((one, other)), pairs.get((other, one))) for one, other in names]
    contrasts = [
        (pair.first, pair.second) if pair is forward else (pair.second, pair.first)
        for forward, backward in compared
        if (pair := forward or backward) and pair.equivalence.holds
    ]
    if not contrasts:
        unmatched = [pair for both in compared for pair in both if pair]
        why = why_unmatched(unmatched) if arms else "no arm has strength 0, the baseline"
        return ClaimTest(claim, EFFECT, reason=why, subject=cause)
    ceilings = [pair[0].mean(LATENT_CEILING) for pair in contrasts]
    ceiling = 100 * min(ceilings) if comparison.primary_labeling == "latent" else 100.0
    test = contrast_effect(claim, contrasts, comparison.plan.negligible_slope, ceiling)
    return replace(test, subject=cause)


def _across_settings(comparison: Comparison) -> ClaimTest:
    """Say why settings do not identify the effect: what makes one flat may make it accurate.

    A permutation test over settings would not help. Settings that share the value of a key are not
    exchangeable, and two smooth functions of a few keys are often associated by chance.
    """
    rows = [row for cell in comparison.cells for row in cell.rows.values()]
    swept = dict.fromkeys(key for row in rows for key in row.swept)
    keys = [key for key in swept if len({row.swept.get(key, "") for row in rows}) > 1]
    if all(row.arm for row in rows) and len({row.arm for row in rows}) > 1:
        keys = ["the arm"]
    why = f"flatness differs only with {', '.join(keys) or 'the seed'}"
    return ClaimTest(comparison.scale.claim(ACROSS), EFFECT, reason=why, identified=False)


def _within_settings(comparison: Comparison) -> ClaimTest:
    """Test the association of accuracy with the trace over seeds, pooled over settings."""
    scale = comparison.scale
    claim = scale.claim(WITHIN)
    cells = [cell for arm in comparison.arms.values() if (cell := seeds_at_equal_loss(arm))]
    if not cells:
        why = f"no setting's seeds have {scale.nouns} that overlap"
        return ClaimTest(claim, EFFECT, reason=why, identified=False)
    seeds = [seed for seed in cells[0].rows if all(seed in cell.rows for cell in cells)]
    rows_GxN = [[cell.rows[seed] for seed in seeds] for cell in cells]
    rows = [row for rows_N in rows_GxN for row in rows_N]
    column = common_column(cells)
    if why := why_not_measured(cells, column):
        return ClaimTest(claim, EFFECT, reason=why)
    if not all({PRIMARY_ACCURACY, column} <= row.values.keys() for row in rows):
        return ClaimTest(claim, EFFECT, reason="a seed lacks accuracy or flatness")
    strata_N = np.array([cells[0].rows[seed].language for seed in seeds])
    if num_orders(strata_N) < factorial(FEWEST_SEEDS):
        why = f"it needs {FEWEST_SEEDS} seeds of one language, and there are {len(seeds)} in all"
        return ClaimTest(claim, EFFECT, reason=why)
    halvings_GxN, gains_GxN = (
        np.array([[value(row.values[name]) for row in rows_N] for rows_N in rows_GxN])
        for name, value in ((column, lambda x: -np.log2(x)), (PRIMARY_ACCURACY, lambda x: 100 * x))
    )
    r, p = permutation_test(halvings_GxN, gains_GxN, strata_N)
    seeds_words = wording.plural(len(seeds), "seed")
    over = f"permutations of {seeds_words} of {wording.plural(len(cells), 'setting')}"
    return ClaimTest(
        claim,
        EFFECT,
        f"rank correlation of accuracy with a smaller {COMPARED[column]}; {over}",
        wording.minus(format(r, "+.2f")),
        side=int(np.sign(r)),
        p=p,
        over=over,
    )


def arms_alike(comparison: Comparison, differs: Callable[[str], bool]) -> list[list[list[Cell]]]:
    """Group the arms that differ only in swept keys for which `differs` is true."""

    def others(arm: list[Cell]) -> tuple[object, ...]:
        swept = _swept(arm).items()
        return (arm[0].num_params, *((name, text) for name, text in swept if not differs(name)))

    groups: dict[tuple[object, ...], list[list[Cell]]] = {}
    for arm in comparison.arms.values():
        groups.setdefault(others(arm), []).append(arm)
    return list(groups.values())


def _swept(arm: list[Cell]) -> dict[str, str]:
    return next(iter(arm[0].rows.values())).swept


def _text(key: str, arm: list[Cell]) -> str:
    return _swept(arm).get(key, "")


def _number(key: str, arm: list[Cell]) -> float:
    return float(_text(key, arm) or 0.0)


def _halvings(first: Cell, second: Cell, column: str, seeds: Sequence[str]) -> np.ndarray:
    """Return by how many halvings the second model's trace is below the first's, for each seed."""
    left, right = first.by_seed(column), second.by_seed(column)
    return np.array([np.log2(left[seed] / right[seed]) for seed in seeds])


def _gains(first: Cell, second: Cell, seeds: Sequence[str]) -> np.ndarray:
    """Return how many points more accurate the second model is, for each seed."""
    left, right = first.by_seed(PRIMARY_ACCURACY), second.by_seed(PRIMARY_ACCURACY)
    return np.array([100 * (right[seed] - left[seed]) for seed in seeds])
