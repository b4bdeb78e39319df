"""Estimate the local learning coefficient by Langevin dynamics, where the chains can be trusted.

The volume of {w near w*: L(w) - L(w*) < e} shrinks like e^lambda (Watanabe, 2009). lambda is half
the number of parameters for a regular model, and less for a singular one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import log
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate
from jaxflat.flatness.inputs import LossFn, documented, estimator
from jaxflat.flatness.sampling import normal_like
from jaxflat.flatness.spectrum import hessian_extremes
from jaxflat.flatness.trees import PyTree, add_scaled, at_least_float32, inner

MAX_R_HAT = 1.05
MIN_EFFECTIVE_SAMPLES = 100
RELAXATIONS = 20  # a burn-in, in relaxation times of the spring; rejections slow it down
STEP = 0.25  # squared step size times the largest curvature; leapfrog is unstable above 4
LANCZOS_STEPS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LearningCoefficient:
    """The result of C independent chains of T draws each.

    rises_CxT: L(w) - L(w*) at each draw, in nats, on all given sentences. per_chain_C: n beta times
    their mean in each chain. num_burnin_C: the steps before the draws. r_hat: `split_r_hat` of the
    rises. effective_samples: `effective_sample_size` of the rises; 0 if the burn-in of a chain was
    too short.
    """

    rises_CxT: jax.Array
    per_chain_C: jax.Array
    num_burnin_C: jax.Array
    r_hat: jax.Array
    effective_samples: jax.Array

    @property
    def estimate(self) -> Estimate:
        """The mean over chains; nan unless R-hat < 1.05 and at least 100 effective samples.

        The standard error is std(per_chain_C, ddof=1) / sqrt(C): the chains are independent.
        """
        num_chains = len(self.per_chain_C)
        trusted = (self.r_hat < MAX_R_HAT) & (self.effective_samples >= MIN_EFFECTIVE_SAMPLES)
        mean, sem = self.per_chain_C.mean(), self.per_chain_C.std(ddof=1) / num_chains**0.5
        mean, sem = (jnp.where(trusted, x, jnp.nan) for x in (mean, sem))
        return Estimate(mean, sem, num_chains, "chains")


@documented
def local_learning_coefficient(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_examples: int,
    num_chains: int,
    num_draws: int,
    localization: float,
    inverse_temperature: float | None = None,
) -> LearningCoefficient:
    """Return n beta (E[L(w)] - L(w*)), w ~ exp(-U(w)), U = n beta L + gamma / 2 |w - w*|^2.

    Lau et al., arXiv:2308.12108. w* is `params`, and L the mean loss over all `batches`. n is
    num_examples, the number of training sentences. beta is the inverse_temperature, 1 / log n if
    None. gamma is the localization, a spring to w*. If L is quadratic around its minimum w*, with
    curvatures h_i, the result is sum_i n beta h_i / (2 (n beta h_i + gamma)). A slope g_i of L at
    w* along eigenvector i lowers it by (n beta g_i)^2 (n beta h_i + 2 gamma) /
    (2 (n beta h_i + gamma)^2).

    A chain starts at w*. Its step is `Posterior.step` with size e = sqrt(STEP / a). a is the
    largest curvature of U that the chain has met, by Lanczos at w* and whenever the number of its
    burn-in's steps has doubled. In directions without curvature of L the relaxation time is
    1 / (e sqrt(gamma)) steps; in others it is not longer. A burn-in of RELAXATIONS relaxation times
    or more comes first, then num_draws steps, each with its draw. A burn-in that is still too short
    after num_draws steps ends there. One step takes the gradient of every microbatch.

    num_chains: C, at least 2. num_draws: T of each chain, at least 8. Raises ValueError for counts
    or sizes out of range.
    """
    for name, value, least in (
        ("num_examples", num_examples, 2),
        ("num_chains", num_chains, 2),
        ("num_draws", num_draws, 8),
    ):
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if inverse_temperature is None:
        inverse_temperature = 1 / log(num_examples)
    for name, value in (
        ("localization", localization),
        ("inverse_temperature", inverse_temperature),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")
    scale = num_examples * inverse_temperature
    return _sample(loss_fn, params, batches, key, scale, localization, num_chains, num_draws)


class ChainState(NamedTuple):
    """Parameters w, velocities v, and at w the rise of the loss and the gradient of U."""

    w: PyTree
    v: PyTree
    rise: jax.Array
    slope: PyTree


@estimator("num_chains", "num_draws")
def _sample(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    scale: float,
    localization: float,
    num_chains: int,
    num_draws: int,
) -> LearningCoefficient:
    """Return the result of all chains, which run in sequence; scale is n beta."""
    params = at_least_float32(params)
    losses_M, weights_M = jax.lax.map(lambda batch: loss_fn(params, batch), batches)
    weight = weights_M.sum().astype(losses_M.dtype)
    posterior = Posterior(loss_fn, params, batches, losses_M, weight, scale, localization)
    rises_CxT, num_burnin_C, is_relaxed_C = jax.lax.map(
        lambda index: _run_chain(posterior, jax.random.fold_in(key, index), num_draws),
        jnp.arange(num_chains),
    )
    return LearningCoefficient(
        rises_CxT,
        scale * rises_CxT.mean(axis=1),
        num_burnin_C,
        split_r_hat(rises_CxT),
        jnp.where(is_relaxed_C.all(), effective_sample_size(rises_CxT), 0),
    )


class Posterior(NamedTuple):
    """The density exp(-U(w)), U = n beta L(w) + gamma / 2 |w - w*|^2.

    params: w*. losses_M: the loss sums of the microbatches at w*. weight: the total weight. scale:
    n beta. localization: gamma.
    """

    loss_fn: LossFn
    params: PyTree
    batches: PyTree
    losses_M: jax.Array
    weight: jax.Array
    scale: float
    localization: float

    def rise_and_slope(self, w: PyTree) -> tuple[jax.Array, PyTree]:
        """Return L(w) - L(w*) and grad U(w)."""

        def add(sums: tuple[jax.Array, PyTree], inputs: tuple) -> tuple[tuple, None]:
            center, batch = inputs
            (loss, _), gradient = jax.value_and_grad(self.loss_fn, has_aux=True)(w, batch)
            return jax.tree.map(jnp.add, sums, (loss - center, gradient)), None

        zeros = jnp.zeros_like(self.weight), jax.tree.map(jnp.zeros_like, w)
        (rise, gradient), _ = jax.lax.scan(add, zeros, (self.losses_M, self.batches))
        share = self.scale / self.weight
        slope = jax.tree.map(
            lambda g, w, w_star: share.astype(g.dtype) * g + self.localization * (w - w_star),
            *(gradient, w, self.params),
        )
        return rise / self.weight, slope

    def largest_curvature(self, w: PyTree, key: jax.Array) -> jax.Array:
        """Return the largest curvature of U at w, or more: the Lanczos residual is added."""
        how = {"num_largest": 1, "num_smallest": 0, "num_steps": LANCZOS_STEPS}
        (values_1, residuals_1, _), _ = hessian_extremes(self.loss_fn, w, self.batches, key, **how)
        return self.scale * jnp.maximum(values_1[0] + residuals_1[0], 0) + self.localization

    def step(self, key: jax.Array, step_size: jax.Array, state: ChainState) -> ChainState:
        """Return the next state; exp(-U(w) - |v|^2 / 2) is stationary for every step size.

        Generalized hybrid Monte Carlo (Horowitz, Physics Letters B 268, 1991), with step size e and
        friction 2 sqrt(gamma):

            v <- c v + sqrt(1 - c^2) N(0, 1),  c = exp(-2 sqrt(gamma) e)
            v' = v - e / 2 grad U(w),  w' = w + e v',  v' <- v' - e / 2 grad U(w')

        (w', v') is accepted with probability exp(U(w) + |v|^2 / 2 - U(w') - |v'|^2 / 2), at most 1.
        Otherwise w stays and v changes its sign. Langevin steps without this test are biased: for
        U = a w^2 / 2, w <- w - e / 2 a w + N(0, e) has the variance e / (1 - (1 - e a / 2)^2) =
        1 / (a (1 - e a / 4)).
        """
        normal_key, uniform_key = jax.random.split(key)
        kept = jnp.exp(-2 * self.localization**0.5 * step_size)
        normal = normal_like(normal_key, self.params)
        v = add_scaled(jax.tree.map(lambda v: kept * v, state.v), jnp.sqrt(1 - kept**2), normal)
        half = add_scaled(v, -step_size / 2, state.slope)
        w = add_scaled(state.w, step_size, half)
        rise, slope = self.rise_and_slope(w)
        proposed = ChainState(w, add_scaled(half, -step_size / 2, slope), rise, slope)
        offset, previous = (add_scaled(x, -1, self.params) for x in (w, state.w))
        energy = self.scale * (rise - state.rise)
        energy += self.localization / 2 * _increase(offset, previous)
        energy += _increase(proposed.v, v) / 2
        accepted = jnp.log(jax.random.uniform(uniform_key)) < -energy
        rejected = state._replace(v=jax.tree.map(jnp.negative, v))
        return jax.tree.map(partial(jnp.where, accepted), proposed, rejected)


def _run_chain(
    posterior: Posterior, key: jax.Array, num_draws: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the rises of the draws, the number of burn-in steps and whether they suffice."""
    step_key, lanczos_key, velocity_key = jax.random.split(key, 3)

    def is_relaxed(curvature: jax.Array, num_steps: jax.Array) -> jax.Array:
        return num_steps * jnp.sqrt(STEP / curvature * posterior.localization) >= RELAXATIONS

    def run(carry: tuple) -> tuple:
        """Double the number of steps; if the burn-in is over, take num_draws steps instead."""
        state, curvature, taken, rises_T, _ = carry
        met = posterior.largest_curvature(state.w, jax.random.fold_in(lanczos_key, taken))
        curvature = jnp.maximum(curvature, met)
        is_burnt_in = is_relaxed(curvature, taken) | (taken >= num_draws)
        after = taken + jnp.where(is_burnt_in, num_draws, jnp.maximum(1, taken))

        def take(i: jax.Array, carry: tuple) -> tuple:
            state, rises_T = carry
            key = jax.random.fold_in(step_key, i)
            state = posterior.step(key, jnp.sqrt(STEP / curvature), state)
            return state, rises_T.at[i - taken].set(state.rise)

        state, rises_T = jax.lax.fori_loop(taken, after, take, (state, rises_T))
        return state, curvature, after, rises_T, is_burnt_in

    # Any step from an infinite rise is accepted: the first one needs no gradient at w*.
    zero, still = jnp.zeros_like(posterior.weight), jax.tree.map(jnp.zeros_like, posterior.params)
    velocity = normal_like(velocity_key, posterior.params)
    start = ChainState(posterior.params, velocity, zero + jnp.inf, still)
    rises_T, curvature = jnp.zeros(num_draws, zero.dtype), zero + posterior.localization
    carry = start, curvature, jnp.asarray(0), rises_T, jnp.asarray(False)
    _, curvature, taken, rises_T, _ = jax.lax.while_loop(lambda carry: ~carry[-1], run, carry)
    return rises_T, taken - num_draws, is_relaxed(curvature, taken - num_draws)


def _increase(after: PyTree, before: PyTree) -> jax.Array:
    """Return |after|^2 - |before|^2 with less rounding than a difference of large sums has."""
    return inner(add_scaled(after, -1, before), add_scaled(after, 1, before))


def split_r_hat(values_CxT: jax.Array) -> jax.Array:
    """Return sqrt(var+ / W) of C chains, each split in halves: 1 if they agree, larger if not.

    values_CxT: T draws of a quantity in each chain. W is the mean variance within the 2C halves of
    n draws, and B is n times the variance of their means. var+ = (n - 1) / n W + B / n (Gelman et
    al., Bayesian Data Analysis 3, 2013, 11.4). It is not the rank-normalised version of Vehtari et
    al. (2021). A chain of odd length drops its first draw.
    """
    halves_2CxN = _halves(values_CxT)
    within, pooled = _variances(halves_2CxN)
    return jnp.sqrt(pooled / within)


def effective_sample_size(values_CxT: jax.Array) -> jax.Array:
    """Return 2C n / tau of C chains, each split in halves of n draws; nan if a value is not finite.

    values_CxT: T draws of a quantity in each chain. Vehtari et al., Bayesian Analysis 16, 2021, eq.
    10: rho_t = 1 - (W - mean_m s_m^2 rho_tm) / var+, with W and var+ as in `split_r_hat`, and s_m^2
    rho_tm the autocovariance of half m at lag t. tau = -1 + 2 sum_k (rho_2k + rho_2k+1): the sum
    ends before the first pair that is not positive, and no pair exceeds an earlier one (Geyer,
    1992). tau is at least 1 / log10(2C n).
    """
    halves_2CxN = _halves(values_CxT)
    n = halves_2CxN.shape[1]
    within, pooled = _variances(halves_2CxN)
    centered_2CxN = halves_2CxN - halves_2CxN.mean(axis=1, keepdims=True)
    spectrum_2CxF = jnp.fft.rfft(centered_2CxN, n=2 * n, axis=1)
    products_2CxN = jnp.fft.irfft(jnp.abs(spectrum_2CxF) ** 2, n=2 * n, axis=1)[:, :n]
    autocovariance_N = products_2CxN.mean(axis=0) / (n - 1)  # over n - 1, so that rho_0m is 1
    rho_N = 1 - (within - autocovariance_N) / pooled
    pairs_K = rho_N[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
    pairs_K = jnp.where(jnp.cumprod(pairs_K > 0) > 0, pairs_K, 0)
    tau = jnp.maximum(2 * jax.lax.cummin(pairs_K).sum() - 1, 1 / jnp.log10(halves_2CxN.size))
    return jnp.where(jnp.isfinite(pooled), halves_2CxN.size / tau, jnp.nan)


def _halves(values_CxT: jax.Array) -> jax.Array:
    n = values_CxT.shape[1] // 2
    return values_CxT[:, -2 * n :].reshape(-1, n)


def _variances(halves_2CxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return W and var+."""
    n = halves_2CxN.shape[1]
    within = halves_2CxN.var(axis=1, ddof=1).mean()
    between = halves_2CxN.mean(axis=1).var(ddof=1)
    return within, (n - 1) / n * within + between
