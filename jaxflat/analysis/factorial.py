"""Estimate the effect of each factor of a factorial sweep, averaged over the other factors.

A factor is a swept key with two levels, and the sweep has every combination of levels. Let d_cs be
the second level's value minus the first's, in combination c of the other factors, for seed s. With
K factors, the main effect of the factor is the mean over seeds of

    E_s = sum_c d_cs / 2^(K - 1)

(Fisher 1935, "The design of experiments", ch. 6). Its interaction with another factor is the mean
of d_cs over the combinations with the other's second level, minus the mean over those with its
first. Values are accuracies, and logarithms of traces and losses. Intervals are Student's over
seeds.

Effects describe. A factor changes more than flatness, so they do not identify the effect of
flatness on accuracy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from jaxflat.analysis.cells import Cell, distinguishing_keys
from jaxflat.analysis.effects import common_column
from jaxflat.analysis.equal_loss import at_equal_loss
from jaxflat.analysis.loss_scale import EXCESS_LOSS, LossScale, loss_scale
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, Row, read_number
from jaxflat.analysis.statistics.intervals import Interval, log_ratio_interval, mean_interval


@dataclass(frozen=True)
class Factor:
    """A swept key and its levels: numbers ascending, words in the sweep's order."""

    key: str
    levels: tuple[str, ...]


@dataclass(frozen=True)
class FactorContrast:
    """The second level of a factor against its first: ratios, and a difference of accuracies.

    A value is None if it was not measured in every model; a ratio also if a value is not positive.
    `reason` says why there is no contrast, "" if there is one. excess: the losses' difference.
    """

    excess: Interval | None = None
    excess_ratio: Interval | None = None
    trace_ratio: Interval | None = None
    accuracy: Interval | None = None
    reason: str = ""


@dataclass(frozen=True)
class FactorEffect:
    """The effect of `factor`: its main effect, or its effect at levels of one other factor.

    levels: () for the main effect, and one level of `other` for the effect there. Both stand for
    the interaction: the effect at the second level against the effect at the first.
    """

    factor: Factor
    other: Factor | None
    levels: tuple[str, ...]
    at_equal_steps: FactorContrast
    at_equal_loss: FactorContrast


@dataclass(frozen=True)
class Factorial:
    """The effects of a factorial sweep; `obstacle` says why there are none, "" if there are.

    column: the flatness measure. scale: of the losses. step: the last step that every combination
    of levels measured.
    """

    factors: list[Factor]
    column: str = ""
    scale: LossScale = EXCESS_LOSS
    step: int = 0
    main: list[FactorEffect] = field(default_factory=list)
    conditional: list[FactorEffect] = field(default_factory=list)
    obstacle: str = ""


NO_STEP = "no step is measured in every combination"

Combination = tuple[str, ...]  # a level of each factor
Pairs = Mapping[Combination, Sequence[Cell] | None]  # two cells each, or None; see `_pairs`


def factor_effects(arms: Mapping[str, list[Cell]]) -> Factorial | None:
    """Return the effects of the swept keys; None if the arms differ in fewer than two keys.

    At equal steps, models are compared at the last step that all arms measured. At equal excess
    loss, both arms of a pair are read at the same losses (see `at_equal_loss`). A seed counts where
    every pair has its value.
    """
    rows = [row for cells in arms.values() for cell in cells for row in cell.rows.values()]
    factors = [_factor(key, rows) for key in distinguishing_keys(rows)]
    if len(factors) < 2:
        return None
    by_levels = {_combination(factors, cells): cells for cells in arms.values()}
    if obstacle := _obstacle(factors, by_levels):
        return Factorial(factors, obstacle=obstacle)
    steps = set.intersection(*({cell.step for cell in cells} for cells in arms.values()))
    column = common_column([cell for cells in arms.values() for cell in cells])
    found = Factorial(factors, column, loss_scale(rows), max(steps, default=0))
    for factor in factors:
        pairs = _pairs(factors, factor, by_levels)
        at_steps = {levels: _at_step(found.step, both) for levels, both in pairs.items()}
        at_loss = {levels: at_equal_loss(both) for levels, both in pairs.items()}
        no_loss = f"the {found.scale.nouns} of two arms do not overlap"
        for other, levels in _conditions(factors, factor):
            weights = _weights(list(pairs), factors, other, levels)
            effect = FactorEffect(
                *(factor, other, levels),
                at_equal_steps=_contrast(at_steps, weights, column, NO_STEP),
                at_equal_loss=_contrast(at_loss, weights, column, no_loss),
            )
            (found.conditional if other else found.main).append(effect)
    return found


def _factor(key: str, rows: Sequence[Row]) -> Factor:
    levels = list(dict.fromkeys(row.swept.get(key, "") for row in rows))
    if all(read_number(level) is not None for level in levels):
        levels.sort(key=float)
    return Factor(key, tuple(levels))


def _combination(factors: Sequence[Factor], cells: Sequence[Cell]) -> Combination:
    swept = next(iter(cells[0].rows.values())).swept
    return tuple(swept.get(factor.key, "") for factor in factors)


def _obstacle(factors: Sequence[Factor], by_levels: Mapping[Combination, Sequence[Cell]]) -> str:
    """Say why the design has no effects of factors, "" if it has."""
    for factor in factors:
        if len(factor.levels) != 2:
            return f"{factor.key} has {len(factor.levels)} values, and a factor needs two"
    missing = [one for one in product(*(f.levels for f in factors)) if one not in by_levels]
    if missing:
        return (
            f"{len(missing)} of {2 ** len(factors)} combinations have no results, "
            f"such as {', '.join(missing[0])}"
        )
    seeds = [{seed for cell in cells for seed in cell.rows} for cells in by_levels.values()]
    return "" if set.intersection(*seeds) else "no seed has results in every combination"


def _pairs(
    factors: Sequence[Factor], factor: Factor, by_levels: Mapping[Combination, list[Cell]]
) -> dict[Combination, tuple[list[Cell], list[Cell]]]:
    """Return the arms of the factor's first and second level, by the levels of the first one."""
    place, (first, second) = factors.index(factor), factor.levels
    return {
        levels: (cells, by_levels[(*levels[:place], second, *levels[place + 1 :])])
        for levels, cells in by_levels.items()
        if levels[place] == first
    }


def _at_step(step: int, arms: Sequence[Sequence[Cell]]) -> list[Cell] | None:
    cells = [cell for arm in arms for cell in arm if cell.step == step]
    return cells if len(cells) == len(arms) else None


def _conditions(
    factors: Sequence[Factor], factor: Factor
) -> Sequence[tuple[Factor | None, tuple[str, ...]]]:
    """Return the main effect, then each level of each later factor and the interaction with it."""
    later = factors[factors.index(factor) + 1 :]
    return [(None, ())] + [
        (other, levels)
        for other in later
        for levels in (other.levels[:1], other.levels[1:], other.levels)
    ]


def _weights(
    combinations: Sequence[Combination],
    factors: Sequence[Factor],
    other: Factor | None,
    levels: tuple[str, ...],
) -> dict[Combination, float]:
    """Return the weight of each pair of a factor; pairs without weight are left out."""
    if other is None:
        return dict.fromkeys(combinations, 1 / len(combinations))
    place, share = factors.index(other), 2 / len(combinations)
    return {
        one: share if one[place] == levels[-1] else -share
        for one in combinations
        if one[place] in levels
    }


def _contrast(
    pairs: Pairs, weights: Mapping[Combination, float], column: str, why: str
) -> FactorContrast:
    """Return the weighted sum of the pairs' differences and log ratios, over seeds."""
    read = [pair for levels in weights if (pair := pairs[levels])]
    if len(read) < len(weights):
        return FactorContrast(reason=why)

    def sums(name: str, value: Callable[[float], float]) -> list[float]:
        """Return the sum for each seed that has the column in every model."""
        cells = [cell.by_seed(name) for pair in read for cell in pair]
        seeds = [seed for seed in cells[0] if all(seed in values for values in cells)]
        values_CxS = np.array([[value(values[seed]) for seed in seeds] for values in cells])
        return (np.array(list(weights.values())) @ (values_CxS[1::2] - values_CxS[::2])).tolist()

    def ratio(name: str) -> Interval | None:
        ratios = np.exp(sums(name, lambda x: float(np.log(x)) if x > 0 else np.nan)).tolist()
        if not ratios or not np.isfinite(ratios).all():
            return None
        return log_ratio_interval([1.0] * len(ratios), ratios)

    def difference(name: str) -> Interval | None:
        found = sums(name, float)
        return mean_interval(found) if found else None

    scale = read[0][0].scale
    return FactorContrast(
        excess=difference(scale.column),
        excess_ratio=ratio(scale.column),
        trace_ratio=ratio(column),
        accuracy=difference(PRIMARY_ACCURACY),
    )
