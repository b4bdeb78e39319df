"""The figure of a result: its panels side by side, as .png and .svg."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxflat.analysis.page.drawing import PANEL_INCHES
from jaxflat.analysis.page.figures import render


def save(
    name: str, panels: Sequence[tuple[str, Callable[[Axes], None]]], folder: Path
) -> list[Path]:
    """Draw each titled panel; return the files, <name>.png and .svg in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    size = (1.2 * PANEL_INCHES[0] * len(panels), PANEL_INCHES[1])
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, panel) in zip(axes, panels, strict=True):
        panel(ax)
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
        ax.spines[["top", "right"]].set_visible(False)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        path.write_bytes(render(figure, path.suffix[1:], transparent=False))
    return paths
