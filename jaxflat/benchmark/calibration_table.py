"""Rows of the calibration study, as figures and as Markdown tables, one for each problem."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jaxflat.benchmark.calibration_truth import Truth
from jaxflat.benchmark.timing import Figure

QUANTITIES = ("coverage", "bias", "half_width")


@dataclass(frozen=True)
class CoverageRow:
    """One estimator on one problem.

    coverage: % of seeds whose interval contains the truth, with its exact binomial 95% interval.
    bias: mean error in standard deviations of a seed's mean, with its 95% interval.
    half_width: half the interval, in % of the truth; median, least and greatest over seeds.
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
        """Return the row's quantities by name."""
        name = f"calibration/{self.problem}/{self.estimator}/{self.over}"
        return {f"{name}/{quantity}": getattr(self, quantity) for quantity in QUANTITIES}

    def line(self) -> str:
        """Return the row of a Markdown table."""
        coverage = self.coverage
        cells = (
            self.estimator,
            self.over,
            "–" if np.isnan(self.rank) else f"{self.rank:.1f}",
            f"{self.num_samples:.0f}",
            f"{coverage.median:.1f} ({coverage.min:.1f} to {coverage.max:.1f})",
            f"{self.bias.median:+.2f}",
            f"{self.half_width.median:.2g}",
        )
        return f"| {' | '.join(cells)} |"


def make_row(
    problem: str,
    estimator: str,
    over: str,
    truth: Truth,
    mean_S: np.ndarray,
    low_S: np.ndarray,
    high_S: np.ndarray,
    num_samples: np.ndarray | int,
) -> CoverageRow:
    """Return the row of one estimate a seed; an interval with nan contains nothing."""
    num_seeds = len(mean_S)
    hits = int(np.sum((low_S <= truth.value) & (truth.value <= high_S)))
    ends = stats.binomtest(hits, num_seeds).proportion_ci()
    mean_S, spread = mean_S.astype(np.float64), np.std(mean_S, ddof=1, dtype=np.float64)
    bias = float((mean_S.mean() - truth.value) / spread)
    bias_error = 1.96 / num_seeds**0.5
    middle, least, greatest = np.quantile(50 * (high_S - low_S) / abs(truth.value), (0.5, 0, 1))
    return CoverageRow(
        problem,
        estimator,
        over,
        truth.rank,
        float(np.mean(num_samples)),
        Figure(
            100 * hits / num_seeds, 100 * ends.low, 100 * ends.high, f"% of {num_seeds:,} seeds"
        ),
        Figure(bias, bias - bias_error, bias + bias_error, "standard errors"),
        Figure(float(middle), float(least), float(greatest), "% of the truth"),
    )


def tables(rows: Sequence[CoverageRow]) -> str:
    """Return a Markdown table for each problem."""
    lines = []
    for problem in dict.fromkeys(row.problem for row in rows):
        lines += ["", f"| {problem} | error over | effective rank | n | coverage, % | bias, SE |"]
        lines[-1] += " half-width, % |"
        lines.append("|---|---|--:|--:|--:|--:|--:|")
        for row in rows:
            if row.problem == problem:
                lines.append(row.line())
    return "\n".join(lines)
