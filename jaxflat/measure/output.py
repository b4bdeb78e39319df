"""Estimates as a printed table, and as strict JSON."""

import math
from typing import Any

import jax
from rich import box
from rich.table import Table

from jaxflat.flatness import Estimate
from jaxflat.flatness.learning_coefficient import MAX_R_HAT, MIN_EFFECTIVE_SAMPLES
from jaxflat.flatness.measures import LEARNING_COEFFICIENT, TRACES


def table(estimates: dict[str, Estimate]) -> Table:
    """Return a table of estimates with 95% intervals; groups of parameters are indented."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("measure", no_wrap=True)
    for column in ("mean", "± SEM", "95% interval", "samples"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("error over", no_wrap=True)
    for name, estimate in estimates.items():
        first, slash, last = name.partition("/")
        shown = f"  {last}" if slash and first in estimates else name
        fields = as_json(estimate)
        cells = [_text(fields[key]) for key in ("mean", "sem")]
        if fields["sem"] is None:
            cells += ["–"] * 3
        else:
            interval = f"{_text(fields['low'])} to {_text(fields['high'])}"
            cells += [interval, str(estimate.num_samples), estimate.over]
        made.add_row(shown, *cells)
    return made


def remarks(estimates: dict[str, Estimate], settings: Any) -> list[str]:
    """Return warnings: a precision that was not reached, chains that cannot be trusted."""
    lines = []
    for name in (f"{trace}{at}" for trace in TRACES for at in ("", "@invariant")):
        if name in estimates and settings.relative_error > 0:
            found = as_json(estimates[name])
            share = (found["high"] - found["mean"]) / abs(found["mean"])
            if share > (aim := settings.relative_error):
                lines.append(
                    f"{name}: ±{share:.2%} after {found['num_samples']} samples, not "
                    f"relative_error={aim:.2%}; max_rounds={settings.max_rounds}"
                )
    coefficient, r_hat, size = (estimates.get(name) for name in LEARNING_COEFFICIENT)
    if coefficient and r_hat and size and math.isnan(r_hat.mean) and math.isnan(size.mean):
        lines.append(
            "local_learning_coefficient: no value, because the Hessian has no positive eigenvalue, "
            "the unit of the localization, or the loss is not a number"
        )
    elif coefficient and r_hat and size and not math.isfinite(coefficient.mean):
        lines.append(
            f"local_learning_coefficient: no value, because R-hat is {r_hat.mean:.3f} and there "
            f"are {size.mean:.0f} effective samples, not below {MAX_R_HAT} and at least "
            f"{MIN_EFFECTIVE_SAMPLES}; raise num_draws"
        )
    return lines


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate with its 95% interval for JSON, with null for numbers not finite."""
    low, high = estimate.interval()
    numbers = {"mean": estimate.mean, "sem": estimate.sem, "low": low, "high": high}
    finite = {key: plain(value) for key, value in numbers.items()}
    return {**finite, "num_samples": estimate.num_samples, "over": estimate.over}


def plain(value: Any) -> Any:
    """Return an array as nested lists of numbers, with null for numbers that are not finite."""
    listed = value.tolist()
    return jax.tree.map(lambda x: x if math.isfinite(x) else None, listed)


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
