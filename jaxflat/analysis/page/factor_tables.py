"""The effect of each factor of a factorial sweep, as tables."""

from collections.abc import Sequence

from jaxflat.analysis.cells import short_names
from jaxflat.analysis.factorial import NO_STEP, FactorContrast, FactorEffect, Factorial
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import wording

Table = list[list[str]]


def factor_tables(found: Factorial) -> list[Table]:
    """Return two tables: main effects, and effects at the levels of other factors."""
    if found.obstacle:
        return []
    return [effects_table(found, effects) for effects in (found.main, found.conditional)]


def factor_lines(found: Factorial) -> list[str]:
    """Say which step the tables compare, or why there are no effects."""
    if found.obstacle:
        return [f"There is none, because {found.obstacle}."]
    if not found.step:
        return [f"Equal steps: {NO_STEP}."]
    return [f"Equal steps: at step {found.step:,}, the last that every combination measured."]


def effects_table(found: Factorial, effects: Sequence[FactorEffect]) -> Table:
    """Return one row for each effect."""
    measure = COMPARED.get(found.column, "Sharpness")
    losses = "Excess loss ratio" if found.scale.is_log else "Loss difference (nats)"
    header = ["Factor", "Where", f"{losses}, equal steps"]
    for name in (f"{measure} ratio", "Accuracy (points)"):
        header += [f"{name}, equal steps", f"{name}, equal loss"]
    return [[*header, "Seeds, equal steps; equal loss"]] + [_row(found, one) for one in effects]


def _row(found: Factorial, one: FactorEffect) -> list[str]:
    contrasts = (one.at_equal_steps, one.at_equal_loss)
    return [
        *(_factor(found, one), _at(found, one)),
        _losses(found, one.at_equal_steps),
        *(each.reason or wording.ratio(each.trace_ratio) for each in contrasts),
        *(wording.points(each.accuracy) for each in contrasts),
        "; ".join(map(_seeds, contrasts)),
    ]


def _losses(found: Factorial, contrast: FactorContrast) -> str:
    if found.scale.is_log:
        return wording.ratio(contrast.excess_ratio)
    return wording.nats(contrast.excess)


def _seeds(contrast: FactorContrast) -> str:
    """Return the number of seeds; if the numbers of a contrast have different ones, of each."""
    found = {
        "loss": contrast.excess,
        "flatness": contrast.trace_ratio,
        "accuracy": contrast.accuracy,
    }
    counts = {name: one.count if one else 0 for name, one in found.items()}
    if len({*counts.values()}) == 1:
        return str(counts["loss"])
    return ", ".join(f"{count} of {name}" for name, count in counts.items())


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
