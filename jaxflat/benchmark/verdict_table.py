"""Rows of the table of false verdicts, as figures and in Markdown."""

from collections.abc import Iterator

from scipy import stats

from jaxflat.analysis.verdicts import CONTRADICTED, KINDS, NEGLIGIBLE, SUPPORTED, UNDECIDED
from jaxflat.benchmark.timing import Figure
from jaxflat.benchmark.verdict_errors import (
    ANY,
    VerdictCounts,
    count_all,
    right_answer,
)
from jaxflat.benchmark.verdict_scenarios import Scenario, scenarios

HEADER = ("scenario", *(f"{kind}, % false" for kind in KINDS), "any claim, % false")
ON_EFFECT = ("right on the effect, %", "undecided, %", "no verdict, %")


def measure_verdicts(num_sweeps: int) -> Iterator[tuple[str, dict[str, Figure]]]:
    """Yield each scenario's name and figures, once its sweeps are judged."""
    chosen = scenarios()
    for scenario, counts in zip(chosen, count_all(chosen, num_sweeps), strict=True):
        yield scenario.name, figures_of(scenario, counts)


def figures_of(scenario: Scenario, counts: VerdictCounts) -> dict[str, Figure]:
    """Return the figures of one scenario by column, in % of its sweeps.

    For each kind: the share of false verdicts on its worst claim. A kind without claims has no
    figure. The last three columns are about the first claim on the effect.
    """
    kinds = {kind for kind, _, _ in counts.answers}
    right = counts.effect[right_answer(scenario.truth.slope)]
    decided = SUPPORTED, CONTRADICTED, NEGLIGIBLE, UNDECIDED
    undecided = counts.effect[UNDECIDED]
    without = counts.num_sweeps - sum(counts.effect[answer] for answer in decided)
    found = {f"{kind}, % false": counts.worst(kind) for kind in KINDS if kind in kinds}
    found[HEADER[-1]] = counts.wrong_sweeps[ANY]
    found |= dict(zip(ON_EFFECT, (right, undecided, without), strict=True))
    return {name: _percent(count, counts.num_sweeps) for name, count in found.items()}


def _percent(count: int, num_sweeps: int) -> Figure:
    """Return a percentage with its exact binomial 95% interval (Clopper and Pearson, 1934)."""
    ends = stats.binomtest(count, num_sweeps).proportion_ci()
    unit = f"% of {num_sweeps:,} sweeps"
    return Figure(100 * count / num_sweeps, 100 * ends.low, 100 * ends.high, unit)


def header() -> str:
    """Return the first two lines of a Markdown table."""
    names = (*HEADER, *ON_EFFECT)
    return f"| {' | '.join(names)} |\n|---|{'--:|' * (len(names) - 1)}"


def line(name: str, figures: dict[str, Figure]) -> str:
    """Return a row of the Markdown table."""
    columns = (figures.get(column) for column in (*HEADER[1:], *ON_EFFECT))
    cells = [f"{figure.median:.1f}" if figure else "–" for figure in columns]
    return f"| {' | '.join([name, *cells])} |"
