"""Measure how much the loss rises near given parameters: on average, at worst, along a direction.

The loss is the mean over predictions, in nats. A perturbation is D u. D is the identity or, if
`adaptive`, diag(|theta|). Adaptive sharpness does not change under rescalings that preserve the
function, such as c W_Q and W_K / c (Kwon et al., ASAM, 2021).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, Over, ratio_estimate
from jaxflat.flatness.inputs import LossFn, check_inputs, documented, estimator
from jaxflat.flatness.landscape import loss_rises
from jaxflat.flatness.sampling import draw_normal
from jaxflat.flatness.terms import SampleFn, collect_terms
from jaxflat.flatness.trees import PyTree, add_scaled, at_least_float32, inner


@estimator("num_probes", "adaptive", "over", "probes_per_pass")
def average_sharpness(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    sigma: float,
    num_probes: int,
    adaptive: bool = False,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
) -> Estimate:
    """Return E[L(theta + D u)] - L(theta), u ~ N(0, sigma^2 I), in nats, with its error.

    sigma: in the parameters' unit; D is the identity or, if `adaptive`, diag |theta| (Kwon et al.,
    2021), and sigma has no unit. For small sigma it is sigma^2 / 2 tr(D H D). Each draw is the mean
    of L(theta + D u) and L(theta - D u), minus L(theta): the slope cancels within the pair.
    """
    params = at_least_float32(params)
    scales = _scales(params, adaptive)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        center, weight = loss_fn(params, batch)

        def sample(draw: jax.Array) -> jax.Array:
            probe = jax.tree.map(jnp.multiply, scales, draw_normal(key, over, index, draw, params))
            both = [loss_fn(add_scaled(params, s * sigma, probe), batch)[0] for s in (1, -1)]
            return (both[0] + both[1]) / 2 - center

        return sample, weight

    return collect_terms(sampler, batches, num_probes, probes_per_pass, over).total()


@estimator("num_steps", "adaptive")
def worst_sharpness(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    *,
    radius: float,
    num_steps: int = 1,
    adaptive: bool = False,
) -> Estimate:
    """Return the mean over microbatches of max over |u| <= radius of L(theta + D u) - L(theta).

    In nats, with its error over sentences. radius: in the parameters' unit. num_steps: steps of
    gradient ascent. D is the identity or, if `adaptive`, diag |theta| (Kwon et al., 2021). Each
    microbatch has its own maximum, as in the m-sharpness of Foret et al. (2021). One step is SAM's:
    the full radius along the gradient. More steps are projected ascent, each 2.5 radius / num_steps
    along the normalised gradient. Their highest point counts, a lower bound of the maximum.
    """
    params = at_least_float32(params)
    scales = _scales(params, adaptive)
    step_size = radius if num_steps == 1 else 2.5 * radius / num_steps

    def rise(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        def loss(offset: PyTree) -> jax.Array:
            moved = jax.tree.map(lambda p, d, u: p + d * u, params, scales, offset)
            return loss_fn(moved, batch)[0]

        def ascend(_: jax.Array, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
            offset, highest = carry
            gradient = jax.grad(loss)(offset)
            offset = add_scaled(offset, step_size / _norm(gradient), gradient)
            shrink = jnp.minimum(1, radius / _norm(offset))
            offset = jax.tree.map(lambda u: shrink * u, offset)
            return offset, jnp.maximum(highest, loss(offset))

        origin = jax.tree.map(jnp.zeros_like, params)
        center, weight = loss_fn(params, batch)
        _, highest = jax.lax.fori_loop(0, num_steps, ascend, (origin, center))
        return highest - center, weight

    return ratio_estimate(*jax.lax.map(rise, batches), over="sentences")


class NoCriticalStepError(ValueError):
    """The loss does not rise, or does not fall, at any step along an update."""


@documented
def critical_sharpness(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    update: PyTree,
    *,
    first: float = 1.0,
    max_doublings: int = 40,
    tolerance: float = 1e-3,
) -> Estimate:
    """Return 2 / eta, with eta the step beyond which L(theta + eta update) > L(theta).

    For a quadratic loss and update = -gradient it is the curvature g'Hg / g'g along the gradient
    (critical sharpness: Kalra et al., arXiv:2601.16979). eta is bracketed by doubling or halving
    `first`, then bisected to a relative `tolerance`. update: a pytree shaped like params. The error
    covers microbatches for a fixed update: the error of the rise at eta, divided by the slope
    there. Raises NoCriticalStepError, a ValueError, if no step within a factor 2^max_doublings of
    `first` brackets eta.
    """
    check_inputs({"loss_fn": loss_fn, "params": params, "batches": batches, "update": update})
    params = at_least_float32(params)
    center = mean_loss(loss_fn, params, batches).mean
    rounding = 8 * float(jnp.finfo(center.dtype).eps * abs(center))

    def rise(eta: float) -> float:
        moved = add_scaled(params, eta, update)
        return float(mean_loss(loss_fn, moved, batches).mean - center)

    # "not <=" instead of ">": a loss that is nan counts as a rise.
    halving = not rise(first) <= 0
    factors = (2.0 ** (-i if halving else i) for i in range(1, max_doublings + 1))
    for eta in (first * factor for factor in factors):
        if (rise(eta) < -rounding) if halving else not rise(eta) <= rounding:
            break
    else:
        reach = first * 2.0 ** (-max_doublings if halving else max_doublings)
        missing = "fall" if halving else "rise"
        raise NoCriticalStepError(
            f"critical_sharpness: the loss does not {missing} at any step of the update "
            f"from {first} to {reach:.1g}"
        )
    low, high = (eta, 2 * eta) if halving else (eta / 2, eta)
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rise(middle) <= 0 else (low, middle)
    eta = (low * high) ** 0.5
    width = 10 * tolerance * eta
    steps_GxD = jnp.asarray([[eta - width], [eta], [eta + width]], center.dtype)
    rises = loss_rises(loss_fn, params, batches, [update], steps_GxD)
    slope = (rises.mean[2] - rises.mean[0]) / (2 * width)
    sem = 2 / eta**2 * rises.sem[1] / jnp.abs(slope)
    return Estimate(jnp.asarray(2 / eta, center.dtype), sem, rises.num_samples, rises.over)


@estimator()
def mean_loss(loss_fn: LossFn, params: PyTree, batches: PyTree) -> Estimate:
    """Return L = sum(loss_sum) / sum(weight), in nats, with its error over microbatches."""
    return ratio_estimate(
        *jax.lax.map(lambda batch: loss_fn(params, batch), batches), over="sentences"
    )


def _scales(params: PyTree, adaptive: bool) -> PyTree:
    return jax.tree.map(jnp.abs if adaptive else jnp.ones_like, params)


def _norm(tree: PyTree) -> jax.Array:
    """Return the length of all leaves together, or a tiny number instead of 0."""
    squared = inner(tree, tree)
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(squared.dtype).tiny))
