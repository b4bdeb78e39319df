"""The local learning coefficient, by stochastic gradient Langevin dynamics around the parameters.

lambda is half the number of parameters where the model is regular and less where it is singular:
the volume of {w near w*: L(w) - L(w*) < e} shrinks like e^lambda (Watanabe, 2009).
"""

from dataclasses import dataclass
from functools import partial
from math import log

import jax
import jax.numpy as jnp

from jaxflat.flatness.products import LossFn, PyTree, at_least_float32
from jaxflat.flatness.sampling import normal_like


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LearningCoefficient:
    """What C chains of T draws say; no standard error, as draws of a chain are not independent.

    rises_CxT: L(w) - L(w*) at each draw, in nats, from one microbatch. per_chain_C: n beta times
    their mean in each chain; mean: over all chains. r_hat: `split_r_hat` of the rises. Where a
    chain has diverged, its coefficient, the mean and r_hat are not finite.
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
    """n beta (E[L(w)] - L(w*)) over w ~ exp(-n beta L(w) - gamma / 2 |w - w*|^2), w* = params.

    Lau et al., arXiv:2308.12108. n is num_examples, the number of predictions that the posterior
    is of; beta the inverse_temperature, 1 / log n if None; gamma the localization. Every chain
    starts at w* and takes num_burnin + num_draws steps (Welling & Teh, 2011), of which the last
    num_draws count, each along the gradient of one microbatch drawn uniformly:
        w <- w - step_size / 2 (n beta grad L_m(w) + gamma (w - w*)) + N(0, step_size),
    L_m the microbatch's loss sum times (number of microbatches) / (total weight), which is unbiased
    for L however weights differ. A draw is L_m(w) - L_m(w*) before its step. As m is drawn after w,
    its mean is L(w) - L(w*); as both losses are of the same sentences, what these differ by at w*
    cancels, which is much more than the rise. Raises ValueError for numbers no chain can run with.
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
    """The rises at every draw of every chain; chains run one after the other."""
    params = at_least_float32(params)
    center_M, weights_M = jax.lax.map(lambda batch: loss_fn(params, batch), batches)
    num_microbatches = len(weights_M)
    share = num_microbatches / weights_M.sum().astype(center_M.dtype)

    def step(chain_key: jax.Array, w: PyTree, index: jax.Array) -> tuple[PyTree, jax.Array]:
        which, noise = jax.random.split(jax.random.fold_in(chain_key, index))
        m = jax.random.randint(which, (), 0, num_microbatches)
        batch = jax.tree.map(lambda x: x[m], batches)
        (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(w, batch)

        def move(x: jax.Array, x_star: jax.Array, g: jax.Array, normal: jax.Array) -> jax.Array:
            drift = scale * share.astype(x.dtype) * g + localization * (x - x_star)
            return x - step_size / 2 * drift + step_size**0.5 * normal

        w = jax.tree.map(move, w, params, gradient, normal_like(noise, params))
        return w, share * (loss - center_M[m])

    def chain(index: jax.Array) -> jax.Array:
        run = partial(step, jax.random.fold_in(key, index))
        _, rises_S = jax.lax.scan(run, params, jnp.arange(num_burnin + num_draws))
        return rises_S[num_burnin:]

    return jax.lax.map(chain, jnp.arange(num_chains))


def split_r_hat(values_CxT: jax.Array) -> jax.Array:
    """sqrt(var+ / W) of C chains cut in halves: 1 where they agree, above it where they do not.

    W is the mean variance within the 2C halves of n draws, B = n times the variance of their means,
    var+ = (n - 1) / n W + B / n (Gelman et al., Bayesian Data Analysis 3, 2013, 11.4; not the
    rank-normalised one of Vehtari et al., 2021). An odd chain leaves out its first draw.
    """
    n = values_CxT.shape[1] // 2
    halves_2CxN = values_CxT[:, -2 * n :].reshape(-1, n)
    within = halves_2CxN.var(axis=1, ddof=1).mean()
    between = halves_2CxN.mean(axis=1).var(ddof=1)
    return jnp.sqrt((n - 1) / n + between / within)
