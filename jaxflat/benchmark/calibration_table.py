"""Rows of the calibration study, as figures and as Markdown tables, one for each problem."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from jaxflat.benchmark.calibration_truth import Truth
from jaxflat.benchmark.timing import Figure

QUANTITIES = ("coverage", "bias", "half_width")


@dataclass(frozen=True)
class Row:
    """One estimator on one problem.

    coverage: % of seeds whose interval holds the truth, with its exact binomial 95% interval.
    bias: mean error in standard deviations of a seed's mean, with its 95% interval.
    half_width: of the interval, in % of the truth; median, least and greatest over seeds.
    """

    problem: str
    estimator: str
    over: str
    rank: float
    num_samples: float  # mean over seeds
    coverage: Figure
    bias: Figure
    half_width: Figure

    def figures(self) -> dict[str, Figure]:
        """The row's quantities with their names."""
        name = f"calibration/{self.problem}/{self.estimator}/{self.over}"
        return {f"{name}/{quantity}": getattr(self, quantity) for quantity in QUANTITIES}

    def line(self) -> str:
        """The row as a line of text."""
        return (
            f"{self.problem}, {self.estimator}, over {self.over}, n = {self.num_samples:.0f}: "
            f"coverage {_coverage(self.coverage)}%, bias {self.bias.median:+.3f} standard errors, "
            f"half-width {self.half_width.median:.3g}%"
        )


def make_row(
    problem: str,
    estimator: str,
    over: str,
    truth: Truth,
    mean_S: np.ndarray,
    low_S: np.ndarray,
    high_S: np.ndarray,
    num_samples: np.ndarray | int,
) -> Row:
    """The row of one estimate a seed; an interval that is not a number holds nothing."""
    num_seeds = len(mean_S)
    hits = int(np.sum((low_S <= truth.value) & (truth.value <= high_S)))
    ends = stats.binomtest(hits, num_seeds).proportion_ci()
    mean_S, spread = mean_S.astype(np.float64), np.std(mean_S, ddof=1, dtype=np.float64)
    bias = float((mean_S.mean() - truth.value) / spread)
    bias_error = 1.96 / num_seeds**0.5
    widths_S = 50 * (high_S - low_S) / abs(truth.value)
    return Row(
        problem,
        estimator,
        over,
        truth.rank,
        float(np.mean(num_samples)),
        Figure(100 * hits / num_seeds, 100 * ends.low, 100 * ends.high, f"% of {num_seeds:,} seeds"),
        Figure(bias, bias - bias_error, bias + bias_error, "standard errors"),
        Figure(*map(float, np.quantile(widths_S, (0.5, 0, 1))), "% of the truth"),
    )


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """Print a Markdown table for each problem; a row is an estimator, with both kinds of error."""
    for problem in dict.fromkeys(row.problem for row in rows):
        table = Table(title=problem, title_justify="left", box=box.MARKDOWN)
        table.add_column("over probes: estimator", no_wrap=True)
        for column in ("effective rank", "n", "coverage, %", "bias, SE", "half-width, %"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            if row.problem == problem:
                table.add_row(*_cells(row))
        console.print(table)


def _cells(row: Row) -> list[str]:
    return [
        f"{row.estimator}, {row.over}",
        f"{row.rank:.1f}",
        f"{row.num_samples:.0f}",
        _coverage(row.coverage),
        f"{row.bias.median:+.2f}",
        f"{row.half_width.median:.3g}",
    ]


def _coverage(figure: Figure) -> str:
    return f"{figure.median:.1f} ({figure.min:.1f} to {figure.max:.1f})"
