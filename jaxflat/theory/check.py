"""Checks: the expected number, the measured number and the error bar between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from rich import box
from rich.table import Table

NUM_ERRORS = 3  # standard errors in an error bar


@dataclass(frozen=True)
class Check:
    """The claim that `measured` lies within `error_bar` of `expected`, or beyond it by more.

    relation: "=" for within; ">" or "<" for above or below by more than the error bar.
    error: the source of the error bar, in words.
    """

    name: str
    expected: float
    measured: float
    error_bar: float
    error: str
    relation: Literal["=", ">", "<"] = "="

    @property
    def holds(self) -> bool:
        """Whether the claim holds; False if the measured number is nan."""
        rise = self.measured - self.expected
        if self.relation == "=":
            return bool(abs(rise) <= self.error_bar)
        return bool((rise if self.relation == ">" else -rise) > self.error_bar)

    def as_json(self) -> dict[str, Any]:
        """Return the check as --json writes it, with null for numbers that are not finite."""
        numbers = {name: getattr(self, name) for name in ("expected", "measured", "error_bar")}
        finite = {k: float(v) if np.isfinite(v) else None for k, v in numbers.items()}
        return {"name": self.name, **finite, "holds": self.holds}


@dataclass(frozen=True)
class CheckOutcome:
    """The outcome of a command: checks, lines of text, and the titled panels of its figure."""

    checks: Sequence[Check]
    panels: Sequence[tuple[str, Callable[[Axes], None]]]
    remarks: Sequence[str] = field(default=())


def table(checks: Sequence[Check]) -> Table:
    """Return the checks as a table."""
    made = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    made.add_column("claim")
    for column in ("expected", "measured", "± error"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("error of")
    made.add_column("holds", no_wrap=True)
    for check in checks:
        sign = "" if check.relation == "=" else f"{check.relation} "
        numbers = (f"{sign}{check.expected:.4g}", f"{check.measured:.4g}", f"{check.error_bar:.2g}")
        made.add_row(check.name, *numbers, check.error, "yes" if check.holds else "NO")
    return made


def mean_and_sem(values_n: Any) -> tuple[float, float]:
    """Return the mean of independent values and its standard error."""
    values_n = np.asarray(values_n)
    return float(values_n.mean()), float(values_n.std(ddof=1) / len(values_n) ** 0.5)
