"""Estimates as a printed table, and as strict JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
        shown = f"  {name.partition('/')[2]}" if is_group(name, estimates) else name
        made.add_row(
            shown, *_cells(estimate), estimate.over if math.isfinite(estimate.sem) else "–"
        )
    return made


def trajectory_table(measured: Mapping[str, Mapping[str, Estimate]]) -> Table:
    """Return a table of each measure along training: a row for each checkpoint that has it.

    measured: the estimates of each checkpoint, by its label.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("measure, checkpoint", no_wrap=True)
    for column in ("mean", "± SEM", "95% interval", "samples of"):
        made.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for estimates in measured.values() for name in estimates):
        found = {label: e[name] for label, e in measured.items() if name in e}
        over = next((e.over for e in found.values() if math.isfinite(e.sem)), "")
        made.add_row(name, "", "", "", over)
        for label, estimate in found.items():
            made.add_row(f"  {label}", *_cells(estimate))
    return made


def trajectories(measured: Sequence[Mapping[str, Estimate]]) -> dict[str, list[Estimate]]:
    """Return each measure's estimates at all checkpoints, nan where it was not measured.

    Groups of parameters and numbers that never have an error are left out.
    """
    names = dict.fromkeys(name for estimates in measured for name in estimates)
    nan = jnp.asarray(math.nan)
    nothing = Estimate(nan, nan, 2, "sentences")
    found = {name: [e.get(name, nothing) for e in measured] for name in names}
    return {
        name: estimates
        for name, estimates in found.items()
        if not is_group(name, found) and any(math.isfinite(e.sem) for e in estimates)
    }


def is_group(name: str, estimates: Mapping[str, Any]) -> bool:
    """Return whether a name belongs to a part of another estimate, such as a parameter group."""
    first, slash, _ = name.partition("/")
    return bool(slash) and first in estimates


def _cells(estimate: Estimate) -> list[str]:
    """Return the mean, the SEM, the interval and the samples; dashes without an error."""
    fields = as_json(estimate)
    cells = [_text(fields[key]) for key in ("mean", "sem")]
    if fields["sem"] is None:
        return [*cells, "–", "–"]
    interval = f"{_text(fields['low'])} to {_text(fields['high'])}"
    return [*cells, interval, str(estimate.num_samples)]


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
