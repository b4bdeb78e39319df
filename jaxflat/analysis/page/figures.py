"""The figures of a sweep: files for papers and talks, and the panels that the page inlines."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.page import drawing, line_panels
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, budgets

Panel = Callable[[Axes, Comparison], None]
PANEL_INCHES = (4.0, 3.7)


@dataclass(frozen=True)
class Plate:
    """A figure: its file name, its caption, and its panels with their titles."""

    name: str
    caption: str
    panels: tuple[tuple[str, Panel], ...]


BY_SIZE = Plate(
    "size",
    "Each size, read at one common excess loss (solid, with 95% t intervals over seeds); its "
    "checkpoints are faint. Only excess loss decides where a size is read. The lookup table is a "
    "probe of the exact conditional probabilities.",
    (
        ("Excess loss", drawing.excess_against_size),
        ("Flatness", drawing.trace_against_size),
        ("Transfer", drawing.accuracy_against_size),
    ),
)
TRAJECTORIES = Plate(
    "trajectories",
    "Every checkpoint, one line per model. A vertical line compares accuracies at equal loss or at "
    "equal trace. Rings: each arm at one common excess loss, with a grey band of the ratio within "
    "which losses count as equal. Bars: 95% t intervals over seeds.",
    (
        ("Transfer at equal loss", drawing.accuracy_against_excess),
        ("Transfer at equal trace", drawing.accuracy_against_trace),
    ),
)


ARMS = Plate(
    "arms",
    "Each arm. Rings: the baseline, and the arms compared with it at equal excess loss. Bars: 95% "
    "t intervals over seeds.",
    TRAJECTORIES.panels,
)
BY_STEP = Plate(
    "steps",
    "The same checkpoints by the step at which each was measured, one line per arm. Bars: 95% "
    "t intervals over seeds.",
    (
        ("Excess loss", line_panels.excess_against_step),
        ("Flatness", line_panels.trace_against_step),
        ("Transfer", line_panels.accuracy_against_step),
    ),
)
BY_LABELS = Plate(
    "labels",
    "Probe accuracy by the number of labelled sentences, mean over tasks: each arm's last "
    "checkpoint, and the untrained controls. Losses may differ. Bars: 95% t intervals over seeds.",
    (("Label budget", line_panels.accuracy_against_labels),),
)


def plates(comparison: Comparison) -> list[Plate]:
    """Return the figures for which this sweep has numbers."""
    chosen = [BY_SIZE] if comparison.matched and not comparison.arm_comparison else []
    if any(cell.interval(PRIMARY_ACCURACY) for cell in comparison.cells):
        chosen.append(ARMS if comparison.arm_comparison else TRAJECTORIES)
    if any(len(cells) > 1 for cells in comparison.arms.values()):
        chosen.append(BY_STEP)
    rows = [row for cell in comparison.cells for row in cell.rows.values()]
    return [*chosen, BY_LABELS] if len(budgets(rows)) > 1 else chosen


def save_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Save each plate, its panels side by side, as .png and .svg; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for plate in plates(comparison):
        figure = draw(plate.panels, comparison)
        for kind in ("png", "svg"):
            paths.append(folder / f"{plate.name}.{kind}")
            paths[-1].write_bytes(render(figure, kind, transparent=False))
    return paths


def draw(panels: Sequence[tuple[str, Panel]], comparison: Comparison) -> Figure:
    figure = Figure(figsize=(PANEL_INCHES[0] * len(panels), PANEL_INCHES[1]), layout="constrained")
    for ax, (title, panel) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        panel(ax, comparison)
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure


def render(figure: Figure, kind: str, transparent: bool) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "jaxflat"}):  # same results, same bytes
        figure.savefig(buffer, format=kind, dpi=160, transparent=transparent, metadata=metadata)
    return buffer.getvalue()
