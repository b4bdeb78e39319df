"""Panels of single runs at equal loss: accuracy against flatness, and flatness under rescaling."""

from matplotlib.axes import Axes

from jaxflat.analysis.cells import Cell, last_cell
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.effects import common_column
from jaxflat.analysis.equal_loss import at_equal_loss, seeds_at_equal_loss
from jaxflat.analysis.flatness_columns import COMPARED, INVARIANT
from jaxflat.analysis.page import drawing
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY


def cells_of_one_size(comparison: Comparison) -> list[Cell]:
    """Return the arms of one size, read at equal losses seed by seed.

    The size is the one with most arms, then the largest. If it has one arm, all its seeds are read
    at one loss.
    """
    sizes: dict[float, list[list[Cell]]] = {}
    for cells in comparison.arms.values():
        sizes.setdefault(cells[0].num_params, []).append(cells)
    column = common_column(comparison.cells)
    for _, arms in sorted(sizes.items(), key=lambda one: (len(one[1]), one[0]), reverse=True):
        one = seeds_at_equal_loss(arms[0]) if len(arms) == 1 else None
        read = at_equal_loss(arms) if len(arms) > 1 else [one] if one else None
        if read and column and any(_points(cell, column, PRIMARY_ACCURACY) for cell in read):
            return read
    return []


def accuracy_against_flatness(ax: Axes, comparison: Comparison) -> None:
    """Draw each run of one size, read at equal loss."""
    column = common_column(comparison.cells)
    drawing.style(ax, drawing.accuracy_label(comparison), COMPARED[column])
    _scatter(ax, cells_of_one_size(comparison), column, PRIMARY_ACCURACY, 100)


def rescaled_columns(comparison: Comparison) -> tuple[str, str] | None:
    """Return the columns of a trace before and after rescaling; None if they were not measured."""
    for invariant in INVARIANT:
        raw = invariant.removesuffix("_invariant")
        if any(_points(cell, raw, invariant) for cell in comparison.cells):
            return raw, invariant
    return None


def invariant_against_raw(ax: Axes, comparison: Comparison) -> None:
    """Draw the trace after rescaling against the trace before it, at each arm's last checkpoint."""
    columns = rescaled_columns(comparison)
    assert columns is not None
    raw, invariant = columns
    drawing.style(ax, f"{COMPARED[invariant]} (after)", f"{COMPARED[raw]} (before)")
    cells = [cell for arm in comparison.arms.values() if (cell := last_cell(arm))]
    _scatter(ax, cells, raw, invariant)


def _points(cell: Cell, across: str, up: str) -> list[tuple[float, float]]:
    x, y = cell.by_seed(across), cell.by_seed(up)
    return [(x[seed], y[seed]) for seed in x if seed in y and x[seed] > 0]


def _scatter(ax: Axes, cells: list[Cell], across: str, up: str, scale: float = 1.0) -> None:
    """Draw a dot a seed, in an arm's colour, on a log axis that fits them."""
    known = [(cell.arm, points) for cell in cells if (points := _points(cell, across, up))]
    for place, (name, points) in enumerate(known):
        x, y = zip(*points, strict=True)
        y = [scale * one for one in y]
        ax.plot(x, y, label=name, linestyle="none", **drawing.look(place))
    if known:
        drawing.log_axis(ax, [x for _, points in known for x, _ in points])
        ax.set_xlabel(f"{ax.get_xlabel()}, log scale")
        ax.set_ylim(*drawing.limits([scale * y for _, points in known for _, y in points], []))
        drawing.legend(ax)
