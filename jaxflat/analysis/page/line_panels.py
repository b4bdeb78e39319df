"""Panels with one line per arm: against the step, and against the number of labels."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.page.drawing import (
    accuracy_label,
    fit_y,
    legend,
    look,
    style,
    trace_columns,
)
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, budget_column, budgets
from jaxflat.analysis.statistics.intervals import Interval


def excess_against_step(ax: Axes, comparison: Comparison) -> None:
    style(ax, comparison.scale.label, "Step")
    _over_steps(ax, comparison, comparison.scale.column)


def trace_against_step(ax: Axes, comparison: Comparison) -> None:
    column, _, name = trace_columns(comparison)
    style(ax, name, "Step")
    _over_steps(ax, comparison, column)


def accuracy_against_step(ax: Axes, comparison: Comparison) -> None:
    style(ax, accuracy_label(comparison), "Step")
    _over_steps(ax, comparison, PRIMARY_ACCURACY, 100)
    legend(ax)


def accuracy_against_labels(ax: Axes, comparison: Comparison) -> None:
    """Draw label-budget curves of each arm's last checkpoint and of the untrained controls."""
    style(ax, accuracy_label(comparison), "Labelled examples, log scale")
    last = [cells[-1] for cells in comparison.arms.values()]
    rows = [row for cell in last for row in cell.rows.values()]
    drawn: list[Interval] = []
    columns = {shots: budget_column(shots) for shots in budgets(rows)}
    for place, cell in enumerate([*last, *comparison.controls]):
        known = [(shots, cell.interval(name)) for shots, name in columns.items()]
        points = [(x, found) for x, found in known if found]
        drawn += [found for _, found in points]
        _line(ax, place, cell.arm, points, 100)
    fit_y(ax, drawn, 100)
    ax.set_xscale("log")
    ax.set_xticks(list(columns), [f"{shots:,}" for shots in columns])
    ax.set_xticks([], minor=True)
    legend(ax)


def _over_steps(ax: Axes, comparison: Comparison, column: str, scale: float = 1.0) -> None:
    for place, (name, cells) in enumerate(comparison.arms.items()):
        known = [(cell.step, found) for cell in cells if (found := cell.interval(column))]
        _line(ax, place, name, known, scale)
    fit_y(ax, [one for cell in comparison.cells if (one := cell.interval(column))], scale)


def _line(
    ax: Axes, place: int, name: str, known: Sequence[tuple[int, Interval]], scale: float = 1.0
) -> None:
    ax.errorbar(
        [x for x, _ in known],
        [scale * found.mean for _, found in known],
        yerr=[scale * (found.half_width or 0.0) for _, found in known],
        **look(place),
        **{"markersize": 5, "linewidth": 1.2, "elinewidth": 0.8, "label": name},
    )
