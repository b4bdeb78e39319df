"""A claim with the number it predicts, the number found, and how far apart the two may be."""

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
    """`measured` lies within `error_bar` of `expected`, or beyond it by more than that.

    error: what the error bar is made of, for people.
    """

    name: str
    expected: float
    measured: float
    error_bar: float
    error: str
    relation: Literal["=", ">", "<"] = "="

    @property
    def holds(self) -> bool:
        """Whether the claim stands; nothing that is not a number does."""
        rise = self.measured - self.expected
        if self.relation == "=":
            return bool(abs(rise) <= self.error_bar)
        return bool((rise if self.relation == ">" else -rise) > self.error_bar)

    def as_json(self) -> dict[str, Any]:
        """The check as --json writes it, null for what is not a finite number."""
        numbers = {name: getattr(self, name) for name in ("expected", "measured", "error_bar")}
        finite = {k: float(v) if np.isfinite(v) else None for k, v in numbers.items()}
        return {"name": self.name, **finite, "holds": self.holds}


@dataclass(frozen=True)
class CheckOutcome:
    """What a command found: checks, remarks in plain words, and titled panels of its picture."""

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
    """The mean of independent values, and its standard error."""
    values_n = np.asarray(values_n)
    return float(values_n.mean()), float(values_n.std(ddof=1) / len(values_n) ** 0.5)
