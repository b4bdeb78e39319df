"""Pictures of one checkpoint (density, slices, chains), and of several along training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxflat.analysis.page.drawing import COLORS, PANEL_INCHES, style
from jaxflat.analysis.page.figures import render

Curves = Mapping[str, Any]
MOST_COLUMNS = 3


class MeasuredDensity(Protocol):
    """What a density's picture reads, as of `jaxflat.flatness.SpectralDensity`."""

    @property
    def nodes_nxm(self) -> Any: ...
    @property
    def weights_nxm(self) -> Any: ...


class MeasuredValue(Protocol):
    """What the picture of a mean with its error reads, as of `jaxflat.flatness.Estimate`."""

    @property
    def mean(self) -> Any: ...
    def interval(self) -> tuple[Any, Any]: ...


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


def plot_density(density: MeasuredDensity) -> Figure:
    """Return a figure of the eigenvalues' density, a result of `jaxflat.flatness.hessian_density`.

    x: eigenvalues, in nats per squared unit of the parameters. y: their density, on a log scale.
    Each node is a normal density with a width of 1% of the eigenvalues' range; the curve is the
    mean over the draws. Save it by `figure.savefig("density.png")`.
    """
    nodes_nxm, weights_nxm = density.nodes_nxm, density.weights_nxm
    return _draw("hessian_density", {"nodes_nxm": nodes_nxm, "weights_nxm": weights_nxm})


def plot_path(steps_G: Any, rises: MeasuredValue) -> Figure:
    """Return a figure of the loss on the line between two checkpoints, and the chord.

    steps_G: G increasing fractions of the way, from 0 to 1. rises: the rise of the loss over the
    first checkpoint, in nats, mean and sem of shape (G,), as `jaxflat.flatness.loss_rises`
    returns it. The band is the 95% Student-t interval. Raises ValueError for other shapes.
    """
    steps_G = np.asarray(steps_G)
    if steps_G.ndim != 1 or np.shape(rises.mean) != steps_G.shape:
        raise ValueError(
            "plot_path needs one rise a step; steps_G has the shape "
            f"{steps_G.shape} and rises.mean {np.shape(rises.mean)}"
        )
    low_G, high_G = rises.interval()
    ends = {"low_G": low_G, "high_G": high_G}
    return _draw("loss_path", {"steps_G": steps_G, "rises_G": rises.mean, **ends})


def plot_trajectory(
    steps: Sequence[int], estimates: Mapping[str, Sequence[MeasuredValue]], *, x_label: str = "Step"
) -> Figure:
    """Return a figure of measures along training, one panel each, with 95% error bars.

    steps: the steps of S checkpoints, in any order. estimates: for each name, which labels its
    panel, the S estimates of a scalar. Bars are Student-t intervals, `Estimate.interval()`; an
    estimate whose sem is nan has none, and one whose mean is nan leaves a gap. Raises ValueError
    if there is nothing to draw, or a list has not S estimates.
    """
    if not len(steps) or not estimates:
        raise ValueError("plot_trajectory needs at least one step and one measure")
    for name, found in estimates.items():
        if len(found) != len(steps):
            raise ValueError(f"{name} has {len(found)} estimates for {len(steps)} steps")
    columns = min(len(estimates), MOST_COLUMNS)
    rows = -(-len(estimates) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    order = np.argsort(np.asarray(steps), kind="stable")
    for ax, (name, found) in zip(axes, estimates.items(), strict=False):
        style(ax, name, x_label)
        _over_steps(ax, np.asarray(steps)[order], [found[i] for i in order])
    for ax in axes[len(estimates) :]:
        ax.remove()
    return figure


def _over_steps(ax: Axes, steps: np.ndarray, found: Sequence[MeasuredValue]) -> None:
    means = np.array([float(one.mean) for one in found])
    lows = np.array([float(one.interval()[0]) for one in found])
    bars = np.nan_to_num(means - lows, posinf=0.0)
    look = {"color": COLORS[0], "marker": "o", "markersize": 5, "capsize": 3}
    ax.errorbar(steps, means, yerr=bars, linewidth=1.2, **look)  # pyright: ignore


def _draw(name: str, curves: Curves) -> Figure:
    """Return a figure of one measure's arrays."""
    title, panel = PANELS[name]
    figure = Figure(figsize=(1.5 * PANEL_INCHES[0], PANEL_INCHES[1]), layout="constrained")
    ax = figure.subplots()
    panel(ax, curves)
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure


def save_curves(curves: Mapping[str, Curves], folder: Path) -> list[Path]:
    """Draw each measure's arrays as <measure>.png and .svg; return the files."""
    return [
        path for name, arrays in curves.items() for path in _save(_draw(name, arrays), folder, name)
    ]


def save_trajectory(
    steps: Sequence[int],
    estimates: Mapping[str, Sequence[MeasuredValue]],
    x_label: str,
    folder: Path,
) -> list[Path]:
    """Draw `plot_trajectory` as trajectory.png and .svg; return the files."""
    return _save(plot_trajectory(steps, estimates, x_label=x_label), folder, "trajectory")


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        path.write_bytes(render(figure, path.suffix[1:], transparent=False))
    return paths
