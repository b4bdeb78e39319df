"""The one picture that shows the answer: the leading claim's contrast, seed by seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.claims import accuracy_difference, log_ratio, seed_means
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.effects import STRENGTH, arms_alike, common_column
from jaxflat.analysis.equal_loss import at_equal_loss
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.label_noise import control_and_noise, targets_key
from jaxflat.analysis.page import drawing, wording
from jaxflat.analysis.pairs import Pair, paired_difference
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, read_number
from jaxflat.analysis.statistics.intervals import Interval, log_ratio_interval, mean_interval
from jaxflat.analysis.trajectories import change
from jaxflat.analysis.verdicts import EFFECT, FLATNESS, LABEL_NOISE

MOST_ROWS = 8
WIDTH_INCHES = 5.2


@dataclass(frozen=True)
class Difference:
    """A row of the picture: a dot for each seed, and the interval of their mean."""

    name: str
    by_seed: list[float]
    interval: Interval
    equal_loss: bool = True


@dataclass(frozen=True)
class Differences:
    """Rows of differences; `null` is the value that means no difference. Ratios have a log axis."""

    label: str
    null: float
    unit: str
    rows: list[Difference]
    caption: str


@dataclass(frozen=True)
class Doses:
    """For each seed the arms of one intervention, in its order: x is flatness, y is accuracy."""

    x_label: str
    y_label: str
    groups: list[list[Cell]]
    column: str
    caption: str


Picture = Differences | Doses


def primary_picture(comparison: Comparison, kind: str) -> Picture | None:
    """Return the picture of a claim of this kind; None if the sweep has nothing to draw."""
    if kind == EFFECT and (found := doses(comparison)):
        return found
    if kind == LABEL_NOISE and (found := label_noise_changes(comparison)):
        return found
    if kind == FLATNESS:
        return flatness_ratios(comparison)
    return accuracy_differences(comparison)


def doses(comparison: Comparison) -> Doses | None:
    """Return accuracy and flatness by dose of a penalty, or by exact and sampled labels."""
    column = common_column(comparison.cells)
    for key in comparison.varied:
        if not key.endswith((STRENGTH, ".targets")):
            continue
        section = key.removesuffix("strength")
        groups = [
            cells
            for arms in arms_alike(
                comparison, lambda name, section=section: name.startswith(section)
            )
            if len(arms) > 1 and (cells := at_equal_loss(_in_order(arms, key)))
        ]
        groups = [cells for cells in groups if _complete_seeds(cells, column)]
        if groups:
            return Doses(
                f"← flatter        {COMPARED[column]}, log scale",
                drawing.accuracy_label(comparison),
                groups,
                column,
                "A thin line is a seed, read in every arm at equal excess loss. Black: the mean "
                "over seeds. The answer is the slope.",
            )
    return None


def accuracy_differences(comparison: Comparison) -> Differences | None:
    """Return each seed's difference in accuracy, in points, for the pairs that are compared."""

    def values(pair: Pair) -> list[float]:
        return [100 * one for one in seed_means([pair], accuracy_difference, PRIMARY_ACCURACY)]

    def interval(pair: Pair) -> Interval | None:
        return scaled(paired_difference(pair.first, pair.second, PRIMARY_ACCURACY), 100.0)

    mean = [100 * one for one in _over_sizes(comparison, accuracy_difference, PRIMARY_ACCURACY)]
    average = ("mean of these pairs", mean, mean_interval(mean)) if mean else None
    label = f"{drawing.accuracy_label(comparison, '')}: difference (points)"
    return _differences(comparison, label, 0.0, "", values, interval, average)


def flatness_ratios(comparison: Comparison) -> Differences | None:
    """Return each seed's ratio of traces, for the pairs that are compared."""
    column = common_column(comparison.cells)
    ratio = partial(log_ratio, column)

    def values(pair: Pair) -> list[float]:
        if column not in pair.flatness:
            return []
        return np.exp(seed_means([pair], ratio, column)).tolist()

    logs = _over_sizes(comparison, ratio, column) if column else []
    mean = np.exp(logs).tolist() if np.isfinite(logs).all() else []
    found = log_ratio_interval([1.0] * len(mean), mean) if mean else None
    average = ("mean of these pairs", mean, found) if found else None
    label = f"{COMPARED.get(column, 'Sharpness')}: ratio, log scale"
    return _differences(
        comparison, label, 1.0, "×", values, lambda pair: pair.flatness.get(column), average
    )


def label_noise_changes(comparison: Comparison) -> Differences | None:
    """Return each seed's change of the trace, last over first checkpoint, in both arms."""
    column, cells = control_and_noise(comparison) if targets_key(comparison) else ("", [])
    if not cells:
        return None
    ends = [np.array(list(cell.by_seed(column).values())) for cell in cells]
    if min(values.min() for values in ends) <= 0:
        return None
    control, noise = ends[1] / ends[0], ends[3] / ends[2]
    intervals = [
        change(column, comparison.plan.loss_ratio, *some).ratio
        for some in (cells[:2], cells[2:], cells)
    ]
    names = ("exact targets", "sampled labels", "sampled over exact")
    rows = [
        Difference(name, values.tolist(), interval)
        for name, values, interval in zip(
            names, (control, noise, noise / control), intervals, strict=True
        )
        if interval
    ]
    label = f"{COMPARED[column]}: last over first checkpoint, log scale"
    return Differences(label, 1.0, "×", rows, _CAPTION)


_CAPTION = "A dot is a seed. Bars: means with 95% t intervals over seeds."


def _differences(
    comparison: Comparison,
    label: str,
    null: float,
    unit: str,
    values: Callable[[Pair], list[float]],
    interval: Callable[[Pair], Interval | None],
    average: tuple[str, list[float], Interval] | None,
) -> Differences | None:
    pairs = compared_pairs(comparison)
    first = {pair.first.arm for pair in pairs}
    rows = [
        Difference(
            pair.second.arm if len(first) == 1 else f"{pair.second.arm} against {pair.first.arm}",
            values(pair),
            found,
            pair.equivalence.holds,
        )
        for pair in pairs
        if (found := interval(pair))
    ]
    caption = f"Against {first.pop()}. {_CAPTION}" if len(first) == 1 else _CAPTION
    if any(not row.equal_loss for row in rows):
        caption += (
            " Hollow: the losses are not shown to be equal, so the loss may be the cause. "
            "An arrow points beyond the axis."
        )
    if len(rows) > MOST_ROWS:
        caption += f" {MOST_ROWS} of {len(rows)} pairs, those of equal loss first."
        rows = sorted(rows, key=lambda row: not row.equal_loss)[:MOST_ROWS]
    if average and len(rows) > 1:
        rows.insert(0, Difference(*average))
    return Differences(label, null, unit, rows, caption) if rows else None


def compared_pairs(comparison: Comparison) -> list[Pair]:
    """Return the pairs of sizes, or the pairs of the baseline with each other arm."""
    if comparison.arm_comparison:
        return comparison.arm_comparison.against
    return comparison.pairs or [pair for one in comparison.settings for pair in one.against]


def scaled(interval: Interval | None, scale: float) -> Interval | None:
    """Return the interval in other units."""
    if interval is None:
        return None
    low, high = (None if end is None else scale * end for end in (interval.low, interval.high))
    return Interval(scale * interval.mean, low, high, interval.count)


def _over_sizes(comparison: Comparison, value: Callable[..., float], column: str) -> list[float]:
    matched = [pair for pair in comparison.pairs if pair.equivalence.holds]
    several = len(matched) > 1 and not comparison.arm_comparison
    return seed_means(matched, value, column) if several else []


def _in_order(arms: Sequence[list[Cell]], key: str) -> list[list[Cell]]:
    def dose(arm: list[Cell]) -> tuple[float, str]:
        text = next(iter(arm[0].rows.values())).swept.get(key, "")
        return read_number(text) or 0.0, text

    return sorted(arms, key=dose)


def _complete_seeds(cells: Sequence[Cell], column: str) -> list[str]:
    if not column:
        return []
    accurate = [cell.by_seed(PRIMARY_ACCURACY) for cell in cells]
    flat = [{s: x for s, x in cell.by_seed(column).items() if x > 0} for cell in cells]
    return [seed for seed in cells[0].rows if all(seed in known for known in accurate + flat)]


def draw_picture(picture: Picture) -> Figure:
    """Draw either kind of picture, for a width of a phone or half a laptop."""
    if isinstance(picture, Doses):
        figure = Figure(figsize=(WIDTH_INCHES, 3.6), layout="constrained")
        _draw_doses(figure.subplots(), picture)
    else:
        height = 0.8 + 0.52 * len(picture.rows)
        figure = Figure(figsize=(WIDTH_INCHES, max(height, 1.9)), layout="constrained")
        draw_differences(figure.subplots(), picture)
    return figure


def draw_differences(ax: Axes, picture: Differences, size: float = 10.5, most: int = 36) -> None:
    """Draw a row a pair: its name, of at most `most` letters, and interval, then dots and bar."""
    drawing.style(ax, "", picture.label)
    ax.grid(axis="y", visible=False)
    if picture.null == 1.0:
        ax.set_xscale("log")
    fitted = [row for row in picture.rows if row.equal_loss] or picture.rows
    values = [value for row in fitted for value in row.by_seed]
    intervals = [row.interval for row in fitted]
    low, high = drawing.limits(values, intervals, picture.null, log=picture.null == 1.0)
    ax.set_xlim(low, high)
    if picture.null == 1.0:
        drawing.log_ticks(ax, low, high)
    ax.axvline(picture.null, color=drawing.GREY, linewidth=1)
    for place, row in enumerate(picture.rows):
        y, color = -float(place), drawing.COLORS[0] if row.equal_loss else drawing.GREY
        filled = color if row.equal_loss else "none"
        dots = {"color": filled, "edgecolor": color, "alpha": 0.55, "s": 22, "linewidth": 0.8}
        ax.scatter(row.by_seed, [y - 0.17] * len(row.by_seed), **dots)
        drawing.bar(ax, row.interval, y, color, low, high)
        style = ".2f" if picture.unit else "+.1f"
        number = wording.ranged(row.interval, style, unit=picture.unit)
        at = {"transform": ax.get_yaxis_transform(), "fontsize": size}
        at["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        ax.text(0.0, y + 0.2, wording.short(row.name, most), **at)
        ax.text(1.0, y + 0.2, number, ha="right", fontweight="bold", **at)
    ax.set_ylim(-len(picture.rows) + 0.6, 0.6)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def _draw_doses(ax: Axes, picture: Doses) -> None:
    drawing.style(ax, picture.y_label, picture.x_label)
    ax.set_xscale("log")
    seen: list[tuple[float, float]] = []
    for place, cells in enumerate(picture.groups):
        seeds = _complete_seeds(cells, picture.column)
        traces = np.array([[cell.by_seed(picture.column)[s] for s in seeds] for cell in cells])
        points = 100 * np.array(
            [[cell.by_seed(PRIMARY_ACCURACY)[s] for s in seeds] for cell in cells]
        )
        color = drawing.COLORS[place % len(drawing.COLORS)]
        ax.plot(traces, points, color=color, alpha=0.5, linewidth=0.9, marker="o", markersize=3)
        seen += zip(traces.ravel(), points.ravel(), strict=True)
        across, up = np.exp(np.log(traces).mean(1)), points.mean(1)
        ax.plot(across, up, color="black", marker="D", markersize=5, linewidth=2)
        for cell, x in zip(cells, across, strict=True):
            at = {"transform": ax.get_xaxis_transform(), "rotation": 20, "fontsize": 9}
            ax.text(x, 1.02, wording.short(cell.arm, 24), **at)
    across, up = zip(*seen, strict=True)
    low, high = drawing.limits(across, [], log=True)
    ax.set_xlim(low, high)
    drawing.log_ticks(ax, low, high)
    ax.set_ylim(*drawing.limits(up, []))
