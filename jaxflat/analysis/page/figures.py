"""The figures of a sweep: files for papers and talks, and the panels that the page inlines."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.loss_scale import LossScale
from jaxflat.analysis.page import drawing, line_panels
from jaxflat.analysis.page import equal_loss_panels as panels
from jaxflat.analysis.page.primary_picture import (
    Picture,
    accuracy_differences,
    draw_differences,
    draw_picture,
    flatness_ratios,
)
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, budgets

Panel = Callable[[Axes, Comparison], None]


@dataclass(frozen=True)
class Plate:
    """A figure: its file name, its caption, and its panels with their titles."""

    name: str
    caption: str
    panels: tuple[tuple[str, Panel], ...]


TRAJECTORIES = Plate(
    "trajectories",
    "Every checkpoint, one line an arm. Rings: where each arm is compared.",
    (
        ("Accuracy against loss", drawing.accuracy_against_excess),
        ("Accuracy against flatness", drawing.accuracy_against_trace),
    ),
)
RESCALING = Plate(
    "rescaling",
    "Rescaling weights without changing the function changes a trace, but not the invariant one. "
    "If the arms' order differs between the axes, the parametrisation decides which is flatter.",
    (("Before and after rescaling", panels.invariant_against_raw),),
)
BY_LABELS = Plate(
    "labels",
    "Each arm's last checkpoint, and the controls that no training produced. Losses may differ.",
    (("Accuracy by labelled examples", line_panels.accuracy_against_labels),),
)


def plates(comparison: Comparison, picture: Picture | None) -> list[Plate]:
    """Return the figures for which this sweep has numbers; the first picture is not repeated."""
    found = [_seed_differences(comparison, picture)]
    if comparison.matched and not comparison.arm_comparison:
        found.append(_by_size(comparison.scale))
    if any(cell.interval(PRIMARY_ACCURACY) for cell in comparison.cells):
        found.append(TRAJECTORIES)
    if panels.cells_of_one_size(comparison):
        found.append(_one_loss(comparison.scale))
    if panels.rescaled_columns(comparison):
        found.append(RESCALING)
    if any(len(cells) > 1 for cells in comparison.arms.values()):
        found.append(_by_step(comparison.scale))
    rows = [row for cell in comparison.cells for row in cell.rows.values()]
    if len(budgets(rows)) > 1:
        found.append(BY_LABELS)
    return [plate for plate in found if plate.panels]


def _by_size(scale: LossScale) -> Plate:
    """Return the figure of each size."""
    return Plate(
        "size",
        f"Solid: each size where the sizes are compared, at equal {scale.nouns} or at the "
        "checkpoints of nearest loss. Faint: every checkpoint.",
        (
            (f"{scale.noun.capitalize()} by size", drawing.excess_against_size),
            ("Flatness by size", drawing.trace_against_size),
            ("Accuracy by size", drawing.accuracy_against_size),
        ),
    )


def _one_loss(scale: LossScale) -> Plate:
    """Return the figure of one size's runs."""
    return Plate(
        "one_loss",
        "Accuracy against flatness of single runs of one size. A dot is a seed. A seed's runs are "
        f"read at the same {scale.nouns}; those of another seed may differ. With one arm, all "
        "seeds are read at the same losses.",
        (("One size, equal losses", panels.accuracy_against_flatness),),
    )


def _by_step(scale: LossScale) -> Plate:
    """Return the figure of checkpoints by step."""
    return Plate(
        "steps",
        "The checkpoints by the step at which each was measured.",
        (
            (f"{scale.noun.capitalize()} by step", line_panels.excess_against_step),
            ("Flatness by step", line_panels.trace_against_step),
            ("Accuracy by step", line_panels.accuracy_against_step),
        ),
    )


def _seed_differences(comparison: Comparison, picture: Picture | None) -> Plate:
    """Return the paired differences of accuracy and of flatness that `picture` does not show."""
    found = {
        "Accuracy, seed by seed": accuracy_differences(comparison),
        "Flatness, seed by seed": flatness_ratios(comparison),
    }
    drawn = {title: one for title, one in found.items() if one and one != picture}
    caption = next((one.caption for one in drawn.values()), "")
    return Plate(
        "differences",
        caption,
        tuple(
            (title, lambda ax, _, one=one: draw_differences(ax, one, 8.5, 54))
            for title, one in drawn.items()
        ),
    )


def save_figures(comparison: Comparison, picture: Picture | None, folder: Path) -> list[Path]:
    """Save the first picture as `answer`, and each plate, as .png and .svg; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"answer": draw_picture(picture)} if picture else {}
    drawn |= {one.name: draw(one.panels, comparison) for one in plates(comparison, picture)}
    paths = []
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            paths.append(folder / f"{name}.{kind}")
            paths[-1].write_bytes(render(figure, kind, transparent=False))
    return paths


def draw(panels: Sequence[tuple[str, Panel]], comparison: Comparison) -> Figure:
    figure = Figure(
        figsize=(drawing.PANEL_INCHES[0] * len(panels), drawing.PANEL_INCHES[1]),
        layout="constrained",
    )
    for ax, (title, panel) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        panel(ax, comparison)
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure


def render(figure: Figure, kind: str, transparent: bool) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "jaxflat",  # same results, same bytes
            "svg.fonttype": "none",  # letters as text, not as outlines: half the size
            "font.sans-serif": ["DejaVu Sans", "Verdana"],
        }
    ):
        figure.savefig(buffer, format=kind, dpi=160, transparent=transparent, metadata=metadata)
    return buffer.getvalue()
