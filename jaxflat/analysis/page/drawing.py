"""Panels of one Axes each, in one style that is legible on a phone and to the colour-blind."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.flatness_columns import COMPARED, SHARPNESS
from jaxflat.analysis.page import wording
from jaxflat.analysis.results_csv import LATENT_ACCURACY, LATENT_CEILING, PRIMARY_ACCURACY
from jaxflat.analysis.statistics.intervals import Interval

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008
MARKERS = "osD^vP"
GREY = "#777777"
PANEL_INCHES = (4.0, 3.7)
MOST_LETTERS = 24  # of a name in a legend of two columns


def look(place: int) -> dict[str, Any]:
    """Return the colour and the marker of an arm by its place; the first 36 arms differ."""
    shift = place // len(COLORS)
    return {
        "color": COLORS[place % len(COLORS)],
        "marker": MARKERS[(place + shift) % len(MARKERS)],
    }


def excess_against_size(ax: Axes, comparison: Comparison) -> None:
    scale = comparison.scale
    style(ax, scale.label)
    _over_sizes(ax, comparison, scale.column)
    fit_y(ax, _found(comparison.cells, scale.column))
    _size_axis(ax, comparison)


def trace_against_size(ax: Axes, comparison: Comparison) -> None:
    compared, raw, name = trace_columns(comparison)
    embedded = compared.removesuffix("_invariant")
    style(ax, SHARPNESS[raw])
    _over_sizes(ax, comparison, compared, label=name if compared != raw else "")
    cells = list(comparison.matched.values())
    for column, label, marker in ((embedded, "embedded", "^"), (raw, "as trained", "s")):
        if column != compared:
            _line(ax, cells, column, color=GREY, marker=marker, label=label)
    if compared != raw:
        legend(ax)
    shown = [cell for cell in comparison.cells if cell.interval(compared)]
    columns = dict.fromkeys((compared, embedded, raw))
    fit_y(ax, [one for column in columns for one in _found(shown, column)])
    _size_axis(ax, comparison)


def accuracy_against_size(ax: Axes, comparison: Comparison) -> None:
    """Draw the compared labels, and latent labels with their ceiling, the Bayes accuracy."""
    style(ax, "Accuracy (%)")
    cells = list(comparison.matched.values())
    _over_sizes(ax, comparison, PRIMARY_ACCURACY, 100, f"{comparison.primary_labeling} labels")
    latent = comparison.primary_labeling != "latent"
    if latent:
        _line(ax, cells, LATENT_ACCURACY, 100, color=GREY, marker="s", label="latent labels")
    ceiling = _mean(comparison.cells, LATENT_CEILING)
    if latent and ceiling is not None and any(cell.interval(LATENT_ACCURACY) for cell in cells):
        ax.axhline(100 * ceiling, color=GREY, linestyle="--", label="their Bayes ceiling")
    levels = _lookup_levels(ax, comparison)
    columns = [PRIMARY_ACCURACY, LATENT_ACCURACY] if latent else [PRIMARY_ACCURACY]
    fit_y(ax, [one for name in columns for one in _found(comparison.cells, name)] + levels, 100)
    legend(ax)
    _size_axis(ax, comparison)


def accuracy_against_excess(ax: Axes, comparison: Comparison) -> None:
    scale = comparison.scale
    style(ax, accuracy_label(comparison), scale.label)
    losses = [cell.mean(scale.column) for cell in comparison.matched.values()]
    margin = scale.margin(comparison.plan)
    if losses and (span := scale.span(losses, margin)):
        name = f"within {scale.margin_words(margin)}"
        ax.axvspan(*span, color=GREY, alpha=0.2, lw=0, label=name)
    _trajectories(ax, comparison, scale.column)
    if scale.is_log:
        _log_axis(ax, comparison, scale.column)


def accuracy_against_trace(ax: Axes, comparison: Comparison) -> None:
    column, _, name = trace_columns(comparison)
    style(ax, accuracy_label(comparison), name)
    _trajectories(ax, comparison, column)
    _log_axis(ax, comparison, column)


def trace_columns(comparison: Comparison) -> tuple[str, str, str]:
    """Return (column to compare, column as trained, name): the first of COMPARED, if measured."""
    for name, words in COMPARED.items():
        if any(cell.interval(name) for cell in comparison.cells):
            return name, name.partition("@")[0], words
    for raw, name in SHARPNESS.items():
        if any(cell.interval(raw) for cell in comparison.cells):
            return raw, raw, name
    return "hessian_trace", "hessian_trace", "Hessian trace (nats)"


def _over_sizes(
    ax: Axes, comparison: Comparison, column: str, scale: float = 1.0, label: str = ""
) -> None:
    """Draw every checkpoint faintly, and the matched ones with their intervals."""
    for cell in comparison.cells:
        if cell.interval(column):
            ax.plot(cell.num_params, scale * cell.mean(column), "o", color=COLORS[0], alpha=0.22)
    style = {"color": COLORS[0], "marker": "o", "label": label}
    _line(ax, list(comparison.matched.values()), column, scale, **style)


def _line(ax: Axes, cells: list[Cell], column: str, scale: float = 1.0, **style: str) -> None:
    known = [(cell.num_params, found) for cell in cells if (found := cell.interval(column))]
    if known:
        if len({size for size, _ in known}) < len(known):  # arms of one size make no line
            style["linestyle"] = "none"
        errors = [scale * (found.half_width or 0.0) for _, found in known]
        ax.errorbar(
            [size for size, _ in known],
            [scale * found.mean for _, found in known],
            yerr=errors,
            **{"capsize": 3, "linewidth": 1.2, "markersize": 5, **style},  # pyright: ignore
        )


def _trajectories(ax: Axes, comparison: Comparison, column: str) -> None:
    """Draw accuracy against `column` along each arm's checkpoints; ring the matched ones."""
    for place, (name, cells) in enumerate(comparison.arms.items()):
        known = [
            cell for cell in cells if cell.interval(column) and cell.interval(PRIMARY_ACCURACY)
        ]
        if not known:
            continue
        across, up = _found(known, column), _found(known, PRIMARY_ACCURACY)
        ax.errorbar(
            [found.mean for found in across],
            [100 * found.mean for found in up],
            xerr=[found.half_width or 0.0 for found in across],
            yerr=[100 * (found.half_width or 0.0) for found in up],
            **look(place),
            **{"markersize": 5, "linewidth": 1.2, "elinewidth": 0.8, "label": name},
        )
        ringed = comparison.matched.get(name)
        if ringed and ringed.interval(column) and ringed.interval(PRIMARY_ACCURACY):
            ax.plot(
                ringed.mean(column),
                100 * ringed.mean(PRIMARY_ACCURACY),
                **{"marker": "o", "markersize": 12, "fillstyle": "none", "color": "black"},
            )
    levels = _lookup_levels(ax, comparison)
    cells = [cell for cell in comparison.cells if cell.interval(column)]
    fit_y(ax, [*_found(cells, PRIMARY_ACCURACY), *levels], 100)
    legend(ax)


def accuracy_label(comparison: Comparison, unit: str = " (%)") -> str:
    """Name the accuracy that is compared, for an axis."""
    return f"Accuracy, {comparison.primary_labeling} labels{unit}"


def _found(cells: Iterable[Cell], column: str) -> list[Interval]:
    return [one for cell in cells if (one := cell.interval(column))]


def _mean(cells: Iterable[Cell], column: str) -> float | None:
    values = [cell.mean(column) for cell in cells if cell.interval(column)]
    return sum(values) / len(values) if values else None


def _lookup_levels(ax: Axes, comparison: Comparison) -> list[Interval]:
    """Draw the accuracies of probes of the exact conditionals; return them."""
    for cell, color in zip(comparison.lookup_tables, ("black", GREY), strict=False):
        if cell.interval(PRIMARY_ACCURACY):
            level = 100 * cell.mean(PRIMARY_ACCURACY)
            ax.axhline(level, color=color, linestyle=":", label=cell.arm)
    levels = [cell.mean(PRIMARY_ACCURACY) for cell in comparison.lookup_tables[:2]]
    return [Interval(level, None, None, 1) for level in levels if np.isfinite(level)]


def style(ax: Axes, y_label: str, x_label: str = "Parameters, log scale") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.patch.set_alpha(0)
    ax.set_ylabel(y_label)
    ax.set_xlabel(x_label)


def _size_axis(ax: Axes, comparison: Comparison) -> None:
    sizes = [cells[0].num_params for cells in comparison.arms.values()]
    ax.set_xscale("log")
    ax.set_xticks(sizes, [wording.params(size) for size in sizes])
    ax.set_xticks([], minor=True)
    ax.margins(x=0.12)


def _log_axis(ax: Axes, comparison: Comparison, column: str) -> None:
    """Use a log axis if every mean is positive.

    The axis spans the means: an interval that reaches 0 leaves the panel and does not stretch it.
    """
    means = [cell.mean(column) for cell in comparison.cells if cell.interval(column)]
    if means and min(means) > 0:
        log_axis(ax, means)
        ax.set_xlabel(f"{ax.get_xlabel()}, log scale")


def log_axis(ax: Axes, values: Sequence[float]) -> None:
    """Make x a log axis that spans the values, with ticks rounded to two digits."""
    low, high = min(values) / 1.2, max(values) * 1.2
    ax.set_xscale("log", nonpositive="clip")
    log_ticks(ax, low * 1.05, high / 1.05)
    ax.set_xlim(low, high)


def log_ticks(ax: Axes, low: float, high: float) -> None:
    """Put four ticks between two values of a log axis, rounded to two digits."""
    ticks = dict.fromkeys(float(f"{tick:.2g}") for tick in np.geomspace(low, high, 6)[1:-1])
    ax.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)


def fit_y(ax: Axes, intervals: Sequence[Interval], scale: float = 1.0) -> None:
    """Let y span the means and, as far as `limits` lets them, their intervals."""
    if intervals:
        low, high = limits([one.mean for one in intervals], intervals)
        ax.set_ylim(scale * low, scale * high)


def limits(
    values: Sequence[float],
    intervals: Sequence[Interval],
    also: float | None = None,
    log: bool = False,
) -> tuple[float, float]:
    """Return the ends of an axis for the values, their intervals, and the value `also`.

    Intervals widen the axis to at most three times the range of the values: an interval of two
    seeds may be a hundred times as long.
    """
    forward, back = (np.log, np.exp) if log else (np.asarray, np.asarray)
    points = forward([*values, *(one.mean for one in intervals), *([] if also is None else [also])])
    ends = [end for one in intervals for end in (one.low, one.high) if end is not None]
    ends = forward([end for end in ends if end > 0 or not log])
    low, high = points.min(), points.max()
    span = high - low or 0.1 * abs(high) or 1.0
    most = (low - span, high + span)
    inside = np.clip([*points, *ends], *most)
    margin = 0.06 * (inside.max() - inside.min()) or 0.1 * span
    return float(back(inside.min() - margin)), float(back(inside.max() + margin))


def bar(ax: Axes, interval: Interval, y: float, color: str, low: float, high: float) -> None:
    """Draw a mean and its interval; an arrow marks what lies beyond the axis from low to high."""
    if low <= interval.mean <= high:
        ax.plot(interval.mean, y, "D", color=color, markersize=6)
    known = [one for one in (interval.low, interval.mean, interval.high) if one is not None]
    first, last = min(known), max(known)
    ends = np.clip((first, last), low, high)
    ax.plot(ends, (y, y), color=color, linewidth=2.2, solid_capstyle="butt")
    for end, leaves, marker in ((ends[0], first < low, "<"), (ends[1], last > high, ">")):
        if leaves:
            ax.plot(end, y, marker, color=color, markersize=7, clip_on=False)


def is_beyond(interval: Interval, low: float, high: float) -> bool:
    """Return True if `bar` draws an arrow: a part of the interval is not between low and high."""
    known = [one for one in (interval.low, interval.mean, interval.high) if one is not None]
    return min(known) < low or max(known) > high


def make_taller(ax: Axes, inches: float) -> None:
    """Give the figure of a panel at least this height."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.set_figheight(max(figure.get_figheight(), inches))


def legend(ax: Axes) -> None:
    """Put the legend below the panel, so that it hides nothing."""
    handles, _ = ax.get_legend_handles_labels()
    if handles:
        handles.sort(key=lambda handle: isinstance(handle, Line2D))  # measurements come first
        is_long = max(len(str(handle.get_label())) for handle in handles) > MOST_LETTERS
        columns = 1 if is_long else 2
        make_taller(ax, PANEL_INCHES[1] + 0.2 * (len(handles) / columns - 3))
        below = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2), "ncols": columns}
        ax.legend(
            handles=handles, frameon=False, fontsize=9, labelspacing=0.3, columnspacing=1.2, **below
        )
