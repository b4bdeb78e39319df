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
from jaxflat.analysis.effects import (
    ACROSS,
    WITHIN,
    common_column,
    contrasts_by_cause,
    strength_keys,
)
from jaxflat.analysis.equal_loss import at_equal_loss, seeds_at_equal_loss
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.label_noise import control_and_noise, targets_key
from jaxflat.analysis.page import drawing, wording
from jaxflat.analysis.pairs import Pair, paired_difference
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, read_number
from jaxflat.analysis.statistics.intervals import Interval, log_ratio_interval, mean_interval
from jaxflat.analysis.trajectories import change
from jaxflat.analysis.verdicts import EFFECT, FLATNESS, LABEL_NOISE, Verdict

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
    rows: list[Difference]
    about: str

    @property
    def is_log(self) -> bool:
        return self.null == 1.0

    @property
    def limits(self) -> tuple[float, float]:
        """Return the ends of the axis, which fits the rows of equal loss if there are any."""
        fitted = [row for row in self.rows if row.equal_loss] or self.rows
        values = [value for row in fitted for value in row.by_seed]
        intervals = [row.interval for row in fitted]
        return drawing.limits(values, intervals, self.null, log=self.is_log)

    @property
    def caption(self) -> str:
        """Say what the rows are, and what each mark in the picture means."""
        caption = f"{self.about} A dot is a seed. Bars: means with 95% t intervals over seeds."
        if any(not row.equal_loss for row in self.rows):
            caption += " Hollow: the losses are not shown to be equal, so they may be the cause."
        if any(drawing.is_beyond(row.interval, *self.limits) for row in self.rows):
            caption += " An arrow points beyond the axis."
        return caption.strip()


@dataclass(frozen=True)
class Doses:
    """For each seed the arms of one intervention, in its order: x is flatness, y is accuracy."""

    x_label: str
    y_label: str
    groups: list[list[Cell]]
    column: str
    caption: str


@dataclass(frozen=True)
class Seeds:
    """The seeds of each setting, read at one loss: x is flatness, y is accuracy."""

    x_label: str
    y_label: str
    settings: list[Cell]
    column: str
    caption: str


Picture = Differences | Doses | Seeds


def primary_picture(comparison: Comparison, verdict: Verdict) -> Picture | None:
    """Return the picture of a verdict's claim; None if the sweep has nothing to draw."""
    if verdict.claim.endswith(WITHIN):
        return seeds_of_settings(comparison)
    if verdict.claim.endswith(ACROSS):
        return None
    if verdict.kind == EFFECT:
        return doses(comparison, verdict.subject)
    if verdict.kind == LABEL_NOISE:
        return label_noise_changes(comparison)
    if verdict.kind == FLATNESS:
        return flatness_ratios(comparison)
    return accuracy_differences(comparison)


def seeds_of_settings(comparison: Comparison) -> Seeds | None:
    """Return accuracy and flatness of the seeds of each setting."""
    column = common_column(comparison.cells)
    cells = [cell for arm in comparison.arms.values() if (cell := seeds_at_equal_loss(arm))]
    cells = [cell for cell in cells if _complete_seeds([cell], column)]
    if not cells:
        return None
    return Seeds(
        _flatness_label(column),
        drawing.accuracy_label(comparison),
        cells,
        column,
        "A dot is a seed, a colour a setting. The seeds of a setting are read at one "
        f"{comparison.scale.noun}, so only dots of one colour compare.",
    )


def doses(comparison: Comparison, cause: str) -> Doses | None:
    """Return accuracy and flatness by dose of a penalty, or by exact and sampled labels."""
    column = common_column(comparison.cells)
    by_baseline: dict[str, list[list[Cell]]] = {}
    for name, contrasts in contrasts_by_cause(comparison):
        for baseline, other in contrasts if name == cause else []:
            by_baseline.setdefault(baseline[0].arm, [baseline]).append(other)
    groups, left_out = [], []
    for baseline, *others in by_baseline.values():
        drawn, cells = [baseline], None
        for arm in others:
            if found := at_equal_loss(_in_order(comparison, [*drawn, arm])):
                drawn, cells = [*drawn, arm], found
            else:
                left_out.append(arm[0].arm)
        if cells and _complete_seeds(cells, column):
            groups.append(cells)
    if not groups:
        return None
    without = f" Without {', '.join(left_out)}: too few losses in common." if left_out else ""
    return Doses(
        _flatness_label(column),
        drawing.accuracy_label(comparison),
        groups,
        column,
        f"A thin line is a seed, read in every arm at equal {comparison.scale.noun}. Black: the "
        "mean over seeds. Flatter is left, so a line that rises to the right means that flatter "
        f"models are less accurate.{without}",
    )


def _flatness_label(column: str) -> str:
    return f"← flatter        {COMPARED[column]}, log scale"


def accuracy_differences(comparison: Comparison) -> Differences | None:
    """Return each seed's difference in accuracy, in points, for the pairs that are compared."""

    def values(pair: Pair) -> list[float]:
        return [100 * one for one in seed_means([pair], accuracy_difference, PRIMARY_ACCURACY)]

    def interval(pair: Pair) -> Interval | None:
        return scaled(paired_difference(pair.first, pair.second, PRIMARY_ACCURACY), 100.0)

    mean = [100 * one for one in _over_sizes(comparison, accuracy_difference, PRIMARY_ACCURACY)]
    average = (_AVERAGE, mean, mean_interval(mean)) if mean else None
    label = f"{drawing.accuracy_label(comparison, '')}: difference (points)"
    return _differences(comparison, label, 0.0, values, interval, average)


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
    average = (_AVERAGE, mean, found) if found else None
    label = f"{COMPARED.get(column, 'Sharpness')}: ratio, log scale"
    return _differences(
        comparison, label, 1.0, values, lambda pair: pair.flatness.get(column), average
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
    changes = [
        change(column, comparison.plan.loss_ratio, *some) for some in (cells[:2], cells[2:], cells)
    ]
    names = ("exact targets", "sampled labels", "sampled over exact")
    rows = [
        Difference(name, values.tolist(), one.ratio, bool(one.equal and one.equal.holds))
        for name, values, one in zip(names, (control, noise, noise / control), changes, strict=True)
        if one.ratio
    ]
    label = f"{COMPARED[column]}: last over first checkpoint, log scale"
    return Differences(label, 1.0, rows, "")


_AVERAGE = "mean of the pairs at equal loss"


def _differences(
    comparison: Comparison,
    label: str,
    null: float,
    values: Callable[[Pair], list[float]],
    interval: Callable[[Pair], Interval | None],
    average: tuple[str, list[float], Interval] | None,
) -> Differences | None:
    pairs = compared_pairs(comparison)
    names, about = row_names(pairs)
    rows = [
        Difference(name, values(pair), found, pair.equivalence.holds)
        for name, pair in zip(names, pairs, strict=True)
        if (found := interval(pair))
    ]
    if len(rows) > MOST_ROWS:
        about += f" {MOST_ROWS} of {len(rows)} pairs, those of equal loss first."
        rows = sorted(rows, key=lambda row: not row.equal_loss)[:MOST_ROWS]
    if average and len(rows) > 1:
        rows.insert(0, Difference(*average))
    return Differences(label, null, rows, about) if rows else None


def row_names(pairs: Sequence[Pair]) -> tuple[list[str], str]:
    """Return a name for each pair, and the sentence for what all pairs have in common.

    Names of arms are lists of settings, such as "width 64, batch_size 32". If the settings in which
    the two models differ are the same in every pair, the names have only the others.
    """
    if len({pair.first.arm for pair in pairs}) == 1:
        return [pair.second.arm for pair in pairs], f"Against {pairs[0].first.arm}."
    both = [(pair.second.arm.split(", "), pair.first.arm.split(", ")) for pair in pairs]
    shared = [", ".join(part for part in second if part in first) for second, first in both]
    contrasts = {
        " against ".join(
            ", ".join(part for part in own if part not in other)
            for own, other in ((second, first), (first, second))
        )
        for second, first in both
    }
    if len(contrasts) == 1 and all(shared):
        return shared, f"{wording.capitalized(contrasts.pop())}, in each row's other settings."
    return [f"{pair.second.arm} against {pair.first.arm}" for pair in pairs], ""


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


def _in_order(comparison: Comparison, arms: Sequence[list[Cell]]) -> list[list[Cell]]:
    """Sort arms by the strengths of their penalties."""
    keys = strength_keys(comparison)

    def doses(arm: list[Cell]) -> list[float]:
        swept = next(iter(arm[0].rows.values())).swept
        return [read_number(swept.get(key, "")) or 0.0 for key in keys]

    return sorted(arms, key=doses)


def _complete_seeds(cells: Sequence[Cell], column: str) -> list[str]:
    if not column:
        return []
    accurate = [cell.by_seed(PRIMARY_ACCURACY) for cell in cells]
    flat = [{s: x for s, x in cell.by_seed(column).items() if x > 0} for cell in cells]
    return [seed for seed in cells[0].rows if all(seed in known for known in accurate + flat)]


def draw_picture(picture: Picture) -> Figure:
    """Draw any kind of picture, for a width of a phone or half a laptop."""
    if isinstance(picture, Doses | Seeds):
        figure = Figure(figsize=(WIDTH_INCHES, 3.6), layout="constrained")
        draw = _draw_doses if isinstance(picture, Doses) else _draw_seeds
        draw(figure.subplots(), picture)  # pyright: ignore[reportArgumentType]
    else:
        figure = Figure(figsize=(WIDTH_INCHES, 1.9), layout="constrained")
        draw_differences(figure.subplots(), picture)
    return figure


def draw_differences(ax: Axes, picture: Differences, size: float = 10.5, most: int = 60) -> None:
    """Draw a row a pair: its name, of at most `most` letters; below it dots, bar and numbers."""
    drawing.style(ax, "")
    drawing.make_taller(ax, 0.8 + 0.053 * size * len(picture.rows))
    ax.set_xlabel(picture.label, loc="left")  # it may be longer than the axis
    ax.grid(axis="y", visible=False)
    low, high = picture.limits
    if picture.is_log:
        ax.set_xscale("log")
    ax.set_xlim(low, high)
    if picture.is_log:
        drawing.log_ticks(ax, low, high)
    ax.axvline(picture.null, color=drawing.GREY, linewidth=1)
    for place, row in enumerate(picture.rows):
        y, color = -float(place), drawing.COLORS[0] if row.equal_loss else drawing.GREY
        filled = color if row.equal_loss else "none"
        dots = {"color": filled, "edgecolor": color, "alpha": 0.55, "s": 22, "linewidth": 0.8}
        ax.scatter(row.by_seed, [y - 0.17] * len(row.by_seed), **dots)
        drawing.bar(ax, row.interval, y, color, low, high)
        number = wording.ratio(row.interval) if picture.is_log else wording.points(row.interval, 1)
        at = {"transform": ax.get_yaxis_transform(), "fontsize": size}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        name = ax.text(0.0, y + 0.22, wording.short(row.name, most), bbox=box, **at)
        name.set_in_layout(False)  # it may reach over the numbers, which are on another line
        ax.text(1.02, y - 0.08, number, va="center", fontweight="bold", **at)
    ax.set_ylim(-len(picture.rows) + 0.6, 0.6)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def _draw_seeds(ax: Axes, picture: Seeds) -> None:
    drawing.style(ax, picture.y_label, picture.x_label)
    ax.set_xscale("log")
    traces, points = [], []
    for place, cell in enumerate(picture.settings):
        seeds = _complete_seeds([cell], picture.column)
        x = [cell.by_seed(picture.column)[seed] for seed in seeds]
        y = [100 * cell.by_seed(PRIMARY_ACCURACY)[seed] for seed in seeds]
        ax.plot(x, y, linestyle="none", label=cell.arm, **drawing.look(place))
        traces, points = [*traces, *x], [*points, *y]
    low, high = drawing.limits(traces, [], log=True)
    ax.set_xlim(low, high)
    drawing.log_ticks(ax, low, high)
    ax.set_ylim(*drawing.limits(points, []))
    if len(picture.settings) <= MOST_ROWS:
        drawing.legend(ax)


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
