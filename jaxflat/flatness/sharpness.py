"""How much the loss rises near given parameters: on average, at worst, and along one direction.

The loss is the mean over predictions, in nats. Perturbations are D u, with D the identity or, where
`adaptive`, diag(|theta|): then rescaling weights in ways that leave the function as it is (c W_Q,
W_K / c) changes nothing (Kwon et al., ASAM, 2021).
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, Over, ratio_estimate
from jaxflat.flatness.landscape import loss_rises
from jaxflat.flatness.products import LossFn, PyTree, at_least_float32
from jaxflat.flatness.sampling import SampleFn, collect_terms, draw_normal
from jaxflat.flatness.trees import add_scaled, inner


@partial(jax.jit, static_argnames=("loss_fn", "num_probes", "adaptive", "over", "probes_per_pass"))
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
    """E[L(theta + D u)] - L(theta), u ~ N(0, sigma^2 I); for small sigma sigma^2 / 2 tr(D H D).

    Each draw is (L(theta + D u) + L(theta - D u)) / 2 - L(theta): in pairs the slope cancels.
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


@partial(jax.jit, static_argnames=("loss_fn", "num_steps", "adaptive"))
def worst_sharpness(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    *,
    radius: float,
    num_steps: int = 1,
    adaptive: bool = False,
) -> Estimate:
    """max over |u| <= radius of L(theta + D u) - L(theta), each microbatch having its own maximum.

    One step is SAM's: all the way along the gradient (Foret et al., 2021, where such a microbatch
    is what m-sharpness is of). More are projected ascent with steps of 2.5 radius / num_steps
    along the normalised gradient, of which the highest point counts: a lower bound of the maximum.
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
    """2 / eta, with eta the step from which on L(theta + eta update) > L(theta).

    For a quadratic loss and update = -gradient it is the curvature g'Hg / g'g along the gradient
    (critical sharpness: Kalra et al., arXiv:2601.16979). eta is bracketed by doubling or halving
    `first` and then bisected to a relative `tolerance`. The error is over microbatches, the update
    taken as given: that of the rise at eta over its slope there. Raises ValueError where no step
    within a factor 2^max_doublings of `first` brackets it.
    """
    params = at_least_float32(params)
    center = mean_loss(loss_fn, params, batches).mean
    rounding = 8 * float(jnp.finfo(center.dtype).eps * abs(center))

    def rise(eta: float) -> float:
        moved = add_scaled(params, eta, update)
        return float(mean_loss(loss_fn, moved, batches).mean - center)

    # Rises are asked for as "not <=": a loss that is not a number has risen.
    halving = not rise(first) <= 0
    factors = (2.0 ** (-i if halving else i) for i in range(1, max_doublings + 1))
    for eta in (first * factor for factor in factors):
        if (rise(eta) < -rounding) if halving else not rise(eta) <= rounding:
            break
    else:
        end = "falls however small" if halving else "rises however large"
        raise ValueError(f"no bracket: the loss never {end} a step of the update, from {first} on")
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


@partial(jax.jit, static_argnames="loss_fn")
def mean_loss(loss_fn: LossFn, params: PyTree, batches: PyTree) -> Estimate:
    """sum(loss_sum) / sum(weight) over microbatches, in nats."""
    return ratio_estimate(
        *jax.lax.map(lambda batch: loss_fn(params, batch), batches), over="sentences"
    )


def _scales(params: PyTree, adaptive: bool) -> PyTree:
    return jax.tree.map(jnp.abs if adaptive else jnp.ones_like, params)


def _norm(tree: PyTree) -> jax.Array:
    """The length of all leaves together; a tiny number in place of 0, to divide by."""
    squared = inner(tree, tree)
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(squared.dtype).tiny))
