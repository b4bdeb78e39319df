"""Every measure by its name: what a config or a command can ask for.

A measure turns a `Problem` and the settings into named estimates; most have one, named as the
measure. The settings are the `flatness` section of a config, or any object with these attributes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate
from jaxflat.flatness.gradient_noise import gradient_noise
from jaxflat.flatness.landscape import filter_normalized, loss_barrier, loss_rises
from jaxflat.flatness.learning_coefficient import local_learning_coefficient
from jaxflat.flatness.problem import Measured, Problem
from jaxflat.flatness.products import mean_gradient
from jaxflat.flatness.quadratic_forms import curvature_along
from jaxflat.flatness.sharpness import (
    average_sharpness,
    critical_sharpness,
    mean_loss,
    worst_sharpness,
)
from jaxflat.flatness.spectrum import hessian_density, hessian_extremes
from jaxflat.flatness.trace_measures import (
    fisher_trace_measure,
    gauss_newton_trace_measure,
    hessian_trace_measure,
    side_by_side,
)


def _hessian_eigenvalues(problem: Problem, settings: Any) -> Measured:
    """The extreme eigenvalues, with errors over sentences and the residuals of Lanczos."""
    loss_fn, params, batches = problem.loss_fn, problem.params, problem.sample(0)
    extremes = hessian_extremes(loss_fn, params, batches, problem.key, **settings.eigenvalues)
    estimates = {}
    for side, pairs in (("largest", extremes.largest), ("smallest", extremes.smallest)):
        if not len(pairs.values_k):
            continue
        along = curvature_along(loss_fn, params, batches, pairs.vectors)
        for k, value in enumerate(pairs.values_k):
            name = f"hessian_eigenvalue/{side}_{k + 1}"
            estimates[name] = Estimate(value, along.sem[k], along.num_samples, along.over)
            nothing = jnp.full_like(value, jnp.nan)
            residual = Estimate(pairs.residuals_k[k], nothing, along.num_samples, "sentences")
            estimates[f"{name}_residual"] = residual
    return Measured(estimates)


def _hessian_density(problem: Problem, settings: Any) -> Measured:
    args = problem.loss_fn, problem.params, problem.sample(0), problem.key
    density = hessian_density(*args, **settings.density)
    curves = {"nodes_nxm": density.nodes_nxm, "weights_nxm": density.weights_nxm}
    return Measured({"hessian_effective_rank": density.effective_rank()}, curves)


def _average_sharpness(adaptive: bool, problem: Problem, settings: Any) -> Measured:
    prefix, chosen = "adaptive_" if adaptive else "", settings.sharpness
    estimate = average_sharpness(
        problem.loss_fn,
        problem.params,
        problem.sample(0),
        problem.key,
        sigma=chosen[f"{prefix}sigma"],
        num_probes=settings.num_probes,
        adaptive=adaptive,
        probes_per_pass=side_by_side(settings),
    )
    return Measured({f"{prefix}average_sharpness": estimate})


def _worst_sharpness(adaptive: bool, problem: Problem, settings: Any) -> Measured:
    prefix, chosen = "adaptive_" if adaptive else "", settings.sharpness
    estimate = worst_sharpness(
        problem.loss_fn,
        problem.params,
        problem.sample(0),
        radius=chosen[f"{prefix}radius"],
        num_steps=chosen.ascent_steps,
        adaptive=adaptive,
    )
    return Measured({f"{prefix}worst_sharpness": estimate})


def _critical_sharpness(problem: Problem, settings: Any) -> Measured:
    """Along minus the gradient of the same sentences; not a number where no step brackets it."""
    args = loss_fn, params, batches = problem.loss_fn, problem.params, problem.sample(0)
    update = jax.tree.map(jnp.negative, mean_gradient(*args))
    try:
        estimate = critical_sharpness(*args, update)
    except ValueError:
        loss = mean_loss(loss_fn, params, batches)
        nothing = jnp.full_like(loss.mean, jnp.nan)
        estimate = Estimate(nothing, nothing, loss.num_samples, loss.over)
    return Measured({"critical_sharpness": estimate})


def _gradient_noise(problem: Problem, settings: Any) -> Measured:
    noise = gradient_noise(problem.loss_fn, problem.params, problem.sample(0))
    return Measured({f"gradient_noise/{name}": value for name, value in vars(noise).items()})


def _local_learning_coefficient(problem: Problem, settings: Any) -> Measured:
    """No standard errors: R-hat and the chains. step_size is in units of 1 / (n beta)."""
    how, n = settings.learning_coefficient.to_dict(), problem.num_examples
    how["step_size"] *= math.log(max(n, 2)) / max(n, 2)
    args = problem.loss_fn, problem.params, problem.sample(0), problem.key
    found = local_learning_coefficient(*args, num_examples=n, **how)
    nothing = jnp.full_like(found.mean, jnp.nan)
    estimates = {
        name: Estimate(value, nothing, how["num_chains"], "chains")
        for name, value in (("", found.mean), ("/r_hat", found.r_hat))
    }
    return Measured(
        {f"local_learning_coefficient{name}": estimate for name, estimate in estimates.items()},
        {"rises_CxT": found.rises_CxT},
    )


def _loss_slices(problem: Problem, settings: Any) -> Measured:
    """The rise of the loss along random filter-normalised directions: pictures, no estimates."""
    steps_G = settings.slices.extent * jnp.linspace(-1, 1, settings.slices.num_points)
    args = problem.loss_fn, problem.params, problem.sample(0)
    rises = []
    for key in jax.random.split(problem.key, settings.slices.num_directions):
        direction = filter_normalized(key, problem.params, problem.stacked)
        rises.append(loss_rises(*args, [direction], steps_G[:, None]))
    lows, highs = zip(*(r.interval() for r in rises), strict=True)
    means = jnp.stack([r.mean for r in rises])
    ends = {"lows_DxG": jnp.stack(lows), "highs_DxG": jnp.stack(highs)}
    return Measured({}, {"steps_G": steps_G, "rises_DxG": means, **ends})


def _loss_plane(problem: Problem, settings: Any) -> Measured:
    """The rise over the plane of two such directions, the slices' extent each way."""
    chosen, params = settings.slices, problem.params
    directions = [
        filter_normalized(k, params, problem.stacked) for k in jax.random.split(problem.key)
    ]
    steps_G = chosen.extent * jnp.linspace(-1, 1, chosen.plane_points)
    steps_Gx2 = jnp.stack(jnp.meshgrid(steps_G, steps_G, indexing="ij"), axis=-1).reshape(-1, 2)
    rises = loss_rises(problem.loss_fn, params, problem.sample(0), directions, steps_Gx2)
    square = (chosen.plane_points, chosen.plane_points)
    rises_GxG, sems_GxG = (x.reshape(square) for x in (rises.mean, rises.sem))
    return Measured({}, {"steps_G": steps_G, "rises_GxG": rises_GxG, "sems_GxG": sems_GxG})


def _loss_path(problem: Problem, settings: Any) -> Measured:
    """The loss on the straight line to other parameters, and the barrier: its highest point."""
    loss_fn, start, batches = problem.loss_fn, problem.params, problem.sample(0)
    if problem.toward is None:
        raise ValueError("loss_path needs parameters to lead to: Problem.toward")
    num_points = settings.slices.num_points
    steps_G = jnp.linspace(0, 1, num_points)
    difference = jax.tree.map(jnp.subtract, problem.toward, start)
    rises = loss_rises(loss_fn, start, batches, [difference], steps_G[:, None])
    low_G, high_G = rises.interval()
    above = loss_barrier(loss_fn, start, problem.toward, batches, num_points=num_points)
    highest, samples = jnp.argmax(above.mean), (above.num_samples, above.over)
    return Measured(
        {
            "loss_barrier": Estimate(above.mean[highest], above.sem[highest], *samples),
            "loss_change": Estimate(rises.mean[-1], rises.sem[-1], *samples),
        },
        {"steps_G": steps_G, "rises_G": rises.mean, "low_G": low_G, "high_G": high_G},
    )


MEASURES: dict[str, Callable[[Problem, Any], Measured]] = {
    "hessian_trace": hessian_trace_measure,
    "gauss_newton_trace": gauss_newton_trace_measure,
    "fisher_trace": fisher_trace_measure,
    "hessian_eigenvalues": _hessian_eigenvalues,
    "hessian_density": _hessian_density,
    "average_sharpness": partial(_average_sharpness, False),
    "adaptive_average_sharpness": partial(_average_sharpness, True),
    "worst_sharpness": partial(_worst_sharpness, False),
    "adaptive_worst_sharpness": partial(_worst_sharpness, True),
    "critical_sharpness": _critical_sharpness,
    "gradient_noise": _gradient_noise,
    "local_learning_coefficient": _local_learning_coefficient,
    "loss_slices": _loss_slices,
    "loss_plane": _loss_plane,
    "loss_path": _loss_path,
}
