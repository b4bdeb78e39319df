"""Estimate the local learning coefficient by stochastic gradient Langevin dynamics.

The volume of {w near w*: L(w) - L(w*) < e} shrinks like e^lambda (Watanabe, 2009). lambda is half
the number of parameters for a regular model, and less for a singular one.
"""

from dataclasses import dataclass
from functools import partial
from math import log

import jax
import jax.numpy as jnp

from jaxflat.flatness.products import LossFn
from jaxflat.flatness.sampling import normal_like
from jaxflat.flatness.trees import PyTree, at_least_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LearningCoefficient:
    """The result of C chains of T draws, without a standard error: draws are not independent.

    rises_CxT: L(w) - L(w*) at each draw, in nats, on one microbatch. per_chain_C: n beta times
    their mean in each chain. mean: over all chains. r_hat: `split_r_hat` of the rises. If a chain
    diverges, its coefficient, the mean and r_hat are not finite.
    """

    rises_CxT: jax.Array
    per_chain_C: jax.Array
    mean: jax.Array
    r_hat: jax.Array


def local_learning_coefficient(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_examples: int,
    num_chains: int,
    num_draws: int,
    num_burnin: int,
    step_size: float,
    localization: float,
    inverse_temperature: float | None = None,
) -> LearningCoefficient:
    """Return n beta (E[L(w)] - L(w*)), w ~ exp(-n beta L(w) - gamma / 2 |w - w*|^2), w* = params.

    Lau et al., arXiv:2308.12108. n is num_examples, the number of training sentences.
    beta is the inverse_temperature, 1 / log n if None. gamma is the localization. Every chain
    starts at w* and takes num_burnin + num_draws steps (Welling & Teh, 2011); the last num_draws
    are its draws. Each step follows the gradient of one microbatch m, drawn uniformly:

        w <- w - step_size / 2 (n beta grad L_m(w) + gamma (w - w*)) + N(0, step_size)

    L_m is the microbatch's loss sum times (number of microbatches) / (total weight). It is unbiased
    for L even if weights differ. The rise of a draw is L_m(w) - L_m(w*) before its step. m is drawn
    after w, so the mean of the rise is L(w) - L(w*). Both losses use the same sentences, so their
    noise at w*, much larger than the rise, cancels. Raises ValueError for counts or sizes out of
    range.
    """
    for name, value, least in (
        ("num_examples", num_examples, 2),
        ("num_chains", num_chains, 2),
        ("num_draws", num_draws, 4),
        ("num_burnin", num_burnin, 0),
        ("localization", localization, 0),
    ):
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if inverse_temperature is None:
        inverse_temperature = 1 / log(num_examples)
    for name, value in (("step_size", step_size), ("inverse_temperature", inverse_temperature)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")
    scale = float(num_examples * inverse_temperature)
    numbers = scale, float(step_size), float(localization), num_chains, num_burnin, num_draws
    rises_CxT = _rises(loss_fn, params, batches, key, *numbers)
    per_chain_C = scale * rises_CxT.mean(axis=1)
    return LearningCoefficient(rises_CxT, per_chain_C, per_chain_C.mean(), split_r_hat(rises_CxT))


@partial(jax.jit, static_argnames=("loss_fn", "num_chains", "num_burnin", "num_draws"))
def _rises(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    scale: float,
    step_size: float,
    localization: float,
    num_chains: int,
    num_burnin: int,
    num_draws: int,
) -> jax.Array:
    """Return the rises of all draws; chains run in sequence."""
    params = at_least_float32(params)
    center_M, weights_M = jax.lax.map(lambda batch: loss_fn(params, batch), batches)
    num_microbatches = len(weights_M)
    share = num_microbatches / weights_M.sum().astype(center_M.dtype)

    def step(chain_key: jax.Array, w: PyTree, index: jax.Array) -> tuple[PyTree, jax.Array]:
        batch_key, noise_key = jax.random.split(jax.random.fold_in(chain_key, index))
        m = jax.random.randint(batch_key, (), 0, num_microbatches)
        batch = jax.tree.map(lambda x: x[m], batches)
        (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(w, batch)

        def move(x: jax.Array, x_star: jax.Array, g: jax.Array, normal: jax.Array) -> jax.Array:
            drift = scale * share.astype(x.dtype) * g + localization * (x - x_star)
            return x - step_size / 2 * drift + step_size**0.5 * normal

        w = jax.tree.map(move, w, params, gradient, normal_like(noise_key, params))
        return w, share * (loss - center_M[m])

    def chain(index: jax.Array) -> jax.Array:
        run = partial(step, jax.random.fold_in(key, index))
        _, rises_S = jax.lax.scan(run, params, jnp.arange(num_burnin + num_draws))
        return rises_S[num_burnin:]

    return jax.lax.map(chain, jnp.arange(num_chains))


def split_r_hat(values_CxT: jax.Array) -> jax.Array:
    """Return sqrt(var+ / W) of C chains, each split in halves: 1 if they agree, larger if not.

    W is the mean variance within the 2C halves of n draws, and B is n times the variance of their
    means. var+ = (n - 1) / n W + B / n (Gelman et al., Bayesian Data Analysis 3, 2013, 11.4). It is
    not the rank-normalised version of Vehtari et al. (2021). A chain of odd length drops its first
    draw.
    """
    n = values_CxT.shape[1] // 2
    halves_2CxN = values_CxT[:, -2 * n :].reshape(-1, n)
    within = halves_2CxN.var(axis=1, ddof=1).mean()
    between = halves_2CxN.mean(axis=1).var(ddof=1)
    return jnp.sqrt((n - 1) / n + between / within)
