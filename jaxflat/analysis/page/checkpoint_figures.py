"""Pictures of single checkpoints: spectral density, slices of the loss, sampling chains."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxflat.analysis.page.drawing import COLORS, PANEL_INCHES
from jaxflat.analysis.page.figures import render

Curves = Mapping[str, Any]


def density(ax: Axes, curves: Curves) -> None:
    """Draw the eigenvalues' density, smoothed by 1% of their range; mean over the draws."""
    nodes_nxm, weights_nxm = (np.asarray(curves[name]) for name in ("nodes_nxm", "weights_nxm"))
    low, high = nodes_nxm.min(), nodes_nxm.max()
    width = 0.01 * max(high - low, np.finfo(float).tiny)
    grid_g = np.linspace(low - 5 * width, high + 5 * width, 1000)
    z_nxmxg = (grid_g - nodes_nxm[..., None]) / width
    bumps_nxmxg = np.exp(-0.5 * z_nxmxg**2) / (width * np.sqrt(2 * np.pi))
    ax.plot(grid_g, (weights_nxm[..., None] * bumps_nxmxg).sum(1).mean(0), color=COLORS[0])
    ax.set_yscale("log")
    ax.set_ylim(bottom=1e-6 / width)
    ax.set_xlabel("Eigenvalue of the Hessian")
    ax.set_ylabel("Density")


def slices(ax: Axes, curves: Curves) -> None:
    """Draw the rise of the loss along each direction, with 95% intervals over microbatches."""
    steps_G = np.asarray(curves["steps_G"])
    rises, lows, highs = (np.asarray(curves[f"{name}_DxG"]) for name in ("rises", "lows", "highs"))
    for d, rise_G in enumerate(rises):
        color = COLORS[d % len(COLORS)]
        ax.plot(steps_G, rise_G, color=color, linewidth=1)
        ax.fill_between(steps_G, lows[d], highs[d], color=color, alpha=0.2)
    ax.set_xlabel("Step along each random filter-normalised direction")
    ax.set_ylabel("Loss above the centre (nats)")


def plane(ax: Axes, curves: Curves) -> None:
    """Draw filled contours of the rise of the loss over the plane of two directions."""
    steps_G, rises_GxG = np.asarray(curves["steps_G"]), np.asarray(curves["rises_GxG"])
    filled = ax.contourf(steps_G, steps_G, rises_GxG.T, levels=20)
    ax.figure.colorbar(filled, ax=ax, label="Loss above the centre (nats)")
    ax.plot(0, 0, "+", color="white")
    ax.set_aspect("equal")
    ax.set_xlabel("Step along the first direction")
    ax.set_ylabel("Step along the second")


def path(ax: Axes, curves: Curves) -> None:
    """Draw the rise of the loss up to a second checkpoint, with 95% intervals, and the chord."""
    names = ("steps_G", "rises_G", "low_G", "high_G")
    steps_G, rises_G, low_G, high_G = (np.asarray(curves[name]) for name in names)
    ax.plot(steps_G, rises_G, color=COLORS[0])
    ax.fill_between(steps_G, low_G, high_G, color=COLORS[0], alpha=0.2)
    ax.plot([0, 1], rises_G[[0, -1]], color="gray", linestyle="--", linewidth=1)
    ax.set_xlabel("Fraction of the way to the second checkpoint")
    ax.set_ylabel("Loss above the first (nats)")


def chains(ax: Axes, curves: Curves) -> None:
    """Draw the rise of the loss along every chain."""
    for c, rises_T in enumerate(np.asarray(curves["rises_CxT"])):
        ax.plot(rises_T, color=COLORS[c % len(COLORS)], linewidth=0.6)
    ax.set_xlabel("Draw")
    ax.set_ylabel("Loss above the centre (nats)")


PANELS: dict[str, tuple[str, Callable[[Axes, Curves], None]]] = {
    "hessian_density": ("Eigenvalues of the Hessian", density),
    "loss_slices": ("Slices of the loss", slices),
    "loss_plane": ("A plane through the loss", plane),
    "loss_path": ("The straight line to another checkpoint", path),
    "local_learning_coefficient": ("Chains of the learning coefficient", chains),
}


def save_curves(curves: Mapping[str, Curves], folder: Path) -> list[Path]:
    """Draw each measure's arrays as <measure>.png and .svg; return the files."""
    if curves:
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, arrays in curves.items():
        title, panel = PANELS[name]
        figure = Figure(figsize=(1.5 * PANEL_INCHES[0], PANEL_INCHES[1]), layout="constrained")
        ax = figure.subplots()
        panel(ax, arrays)
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
        for kind in ("png", "svg"):
            paths.append(folder / f"{name}.{kind}")
            paths[-1].write_bytes(render(figure, kind, transparent=False))
    return paths
