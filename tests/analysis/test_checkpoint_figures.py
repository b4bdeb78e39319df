"""Pictures of measured checkpoints from Python show the numbers that they are given."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.analysis.page.checkpoint_figures import (
    plot_density,
    plot_path,
    plot_trajectory,
    save_curves,
)
from jaxflat.analysis.page.figures import render
from jaxflat.flatness import Estimate, SpectralDensity

STEPS = [300, 100, 200]
NODES_nxm = jnp.asarray([[-1.0, 0.5, 3.0], [-0.5, 1.0, 2.0]])
WEIGHTS_nxm = jnp.asarray([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]])
STUDENT_8 = 2.306004  # the 0.975 quantile of Student's t with 8 degrees of freedom


def estimate(mean, sem):
    return Estimate(jnp.asarray(mean), jnp.asarray(sem), 9, "probes")


def test_a_trajectory_has_a_panel_a_measure_and_its_intervals_as_bars():
    nan = jnp.nan
    estimates = {
        "hessian_trace": [estimate(3.0, 0.1), estimate(5.0, 0.4), estimate(4.0, 0.2)],
        "r_hat": [estimate(1.0, nan), estimate(nan, nan), estimate(1.5, nan)],
        **{name: [estimate(0.0, 0.0)] * 3 for name in ("third", "fourth")},
    }
    axes = plot_trajectory(STEPS, estimates).axes
    assert [ax.get_ylabel() for ax in axes] == list(estimates)
    (trace,), (r_hat,) = axes[0].containers, axes[1].containers
    np.testing.assert_allclose(trace.lines[0].get_xydata(), [[100, 5], [200, 4], [300, 3]])
    ends_Sx2 = [path.vertices[:, 1] for path in trace.lines[2][0].get_paths()]
    bars_S = STUDENT_8 * np.array([0.4, 0.2, 0.1])
    means_S = np.array([5.0, 4.0, 3.0])
    np.testing.assert_allclose(ends_Sx2, np.stack([means_S - bars_S, means_S + bars_S], 1), 1e-6)
    np.testing.assert_allclose(r_hat.lines[0].get_ydata(), [nan, 1.5, 1.0])
    low, high = axes[0].get_ylim()
    assert low < np.min(ends_Sx2)
    assert np.max(ends_Sx2) < high


@pytest.mark.parametrize(
    ("steps", "estimates", "line"),
    [
        ([], {"loss": []}, "plot_trajectory needs at least one step and one measure"),
        (STEPS, {}, "plot_trajectory needs at least one step and one measure"),
        (STEPS, {"loss": [estimate(1.0, 0.1)]}, "loss has 1 estimates for 3 steps"),
    ],
)
def test_a_trajectory_with_gaps_is_refused_in_one_line(steps, estimates, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        plot_trajectory(steps, estimates)


def test_a_density_has_unit_area_and_the_mean_of_its_nodes():
    density = SpectralDensity(NODES_nxm, WEIGHTS_nxm, num_params=10)
    (line,) = plot_density(density).axes[0].lines
    x, y = line.get_xdata(), line.get_ydata()
    assert np.trapezoid(y, x) == pytest.approx(1, rel=1e-3)
    mean = float((NODES_nxm * WEIGHTS_nxm).sum(1).mean())
    assert np.trapezoid(x * y, x) == pytest.approx(mean, rel=1e-3)


def test_python_and_the_command_draw_the_same_picture(tmp_path):
    density = SpectralDensity(NODES_nxm, WEIGHTS_nxm, num_params=10)
    curves = {"nodes_nxm": NODES_nxm, "weights_nxm": WEIGHTS_nxm}
    png, _ = save_curves({"hessian_density": curves}, tmp_path)
    assert png.read_bytes() == render(plot_density(density), "png", transparent=False)


def test_a_path_has_its_rises_their_intervals_and_the_chord():
    steps_G, means_G = jnp.linspace(0, 1, 3), jnp.asarray([0.0, 2.0, 1.0])
    sems_G = jnp.asarray([0.0, 0.2, 0.1])
    ax = plot_path(steps_G, estimate(means_G, sems_G)).axes[0]
    rises, chord = ax.lines
    np.testing.assert_allclose(rises.get_xydata(), np.stack([steps_G, means_G], 1))
    np.testing.assert_allclose(chord.get_xydata(), [[0, 0], [1, 1]])
    highest = ax.collections[0].get_paths()[0].vertices[:, 1].max()
    assert highest == pytest.approx(2 + STUDENT_8 * 0.2, rel=1e-6)
    with pytest.raises(ValueError, match=r"one rise a step; steps_G has the shape \(3,\)"):
        plot_path(steps_G, estimate(1.0, 0.1))
