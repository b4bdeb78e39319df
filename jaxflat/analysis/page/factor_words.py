"""The effect of each factor of a factorial sweep, as tables and as sentences."""

from collections.abc import Sequence

from jaxflat.analysis.cells import short_names
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.factorial import FactorContrast, FactorEffect, Factorial, factor_effects
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import wording

Table = list[list[str]]


def factor_tables(found: Factorial) -> list[Table]:
    """Return the table of main effects, and that of effects at the levels of other factors."""
    if found.obstacle:
        return []
    return [effects_table(found, effects) for effects in (found.main, found.conditional)]


def factor_lines(found: Factorial) -> list[str]:
    """Say which step the table compares, or why there is none."""
    if found.obstacle:
        return [f"There is none, because {found.obstacle}."]
    return [f"Equal steps: at step {found.step:,}, the last that every combination measured."]


def effects_table(found: Factorial, effects: Sequence[FactorEffect]) -> Table:
    """Return one row for each effect."""
    measure = COMPARED.get(found.column, "Sharpness")
    header = ["Factor", "Where", "Excess loss ratio, equal steps"]
    for name in (f"{measure} ratio", "Accuracy (points)"):
        header += [f"{name}, equal steps", f"{name}, equal loss"]
    return [[*header, "Seeds"]] + [_row(found, one) for one in effects]


def factor_sentences(comparison: Comparison) -> list[str]:
    """Describe each main effect, and how sampled words change the effects of other factors."""
    found = factor_effects(comparison.arms)
    if found is None or found.obstacle:
        return []
    measure = COMPARED.get(found.column, "sharpness")
    label_noise = [
        one
        for one in found.conditional
        if len(one.levels) == 2 and one.other and one.other.key.endswith(".targets")
    ]
    return [
        f"{wording.capitalized(_factor(found, one))}, {_at(found, one)}: "
        + "; ".join(
            f"at {where} {contrast.reason or _differences(measure, contrast)}"
            for where, contrast in (
                ("equal steps", one.at_equal_steps),
                ("equal excess loss", one.at_equal_loss),
            )
        )
        + "."
        for one in [*found.main, *label_noise]
    ]


def _row(found: Factorial, one: FactorEffect) -> list[str]:
    contrasts = (one.at_equal_steps, one.at_equal_loss)
    seeds = [each.excess_ratio.count if each.excess_ratio else 0 for each in contrasts]
    return [
        *(_factor(found, one), _at(found, one)),
        wording.ratio(one.at_equal_steps.excess_ratio),
        *(each.reason or wording.ratio(each.trace_ratio) for each in contrasts),
        *(wording.points(each.accuracy) for each in contrasts),
        ", ".join(map(str, seeds)),
    ]


def _factor(found: Factorial, one: FactorEffect) -> str:
    """Name a factor and its levels: "learning_rate 0.002 → 0.008"."""
    names = short_names(factor.key for factor in found.factors)
    return f"{names[one.factor.key]} {' → '.join(one.factor.levels)}"


def _at(found: Factorial, one: FactorEffect) -> str:
    """Say what an effect is: averaged, at one level of another factor, or against another level."""
    if one.other is None:
        return "averaged over the other factors"
    name = short_names(factor.key for factor in found.factors)[one.other.key]
    if len(one.levels) == 1:
        return f"with {name} {one.levels[0]}"
    first, second = one.levels
    return f"effect with {name} {second} against its effect with {first}"


def _differences(measure: str, contrast: FactorContrast) -> str:
    return (
        f"{measure} {wording.ratio(contrast.trace_ratio)}, "
        f"accuracy {wording.points(contrast.accuracy)} points"
    )
