"""Extreme eigenvalues and the density of all eigenvalues, from Lanczos runs.

All is of the mean loss over the given microbatches: the sentences are fixed, so residuals are
numerical, not statistical errors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, ratio_estimate
from jaxflat.flatness.lanczos import lanczos
from jaxflat.flatness.products import (
    LogProbsFn,
    LossFn,
    Product,
    PyTree,
    at_least_float32,
    linearized_gauss_newton_product,
    mean_product,
    unshared_hessian,
)
from jaxflat.flatness.sampling import normal_like, rademacher_like


class Eigenpairs(NamedTuple):
    """values_k, their residuals_k (an eigenvalue is at most that far away), and unit vectors with
    a leading axis. Not a number, and vectors 0, where the steps found fewer."""

    values_k: jax.Array
    residuals_k: jax.Array
    vectors: PyTree


class Extremes(NamedTuple):
    """The largest eigenvalues in descending order, and the smallest in ascending order."""

    largest: Eigenpairs
    smallest: Eigenpairs


@partial(jax.jit, static_argnames=("loss_fn", "num_largest", "num_smallest", "num_steps"))
def hessian_extremes(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_largest: int,
    num_smallest: int,
    num_steps: int,
) -> Extremes:
    """The extreme eigenpairs of H; at a minimum the smallest eigenvalue is not negative."""
    params = at_least_float32(params)
    product = partial(mean_product, partial(unshared_hessian, loss_fn, params), batches)
    return _extremes(product, params, key, num_largest, num_smallest, num_steps)


@partial(jax.jit, static_argnames=("log_probs_fn", "num_largest", "num_smallest", "num_steps"))
def gauss_newton_extremes(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_largest: int,
    num_smallest: int,
    num_steps: int,
) -> Extremes:
    """The extreme eigenpairs of G, which has no negative eigenvalues."""
    params = at_least_float32(params)
    linearized = partial(linearized_gauss_newton_product, log_probs_fn, params)
    product = partial(mean_product, linearized, batches)
    return _extremes(product, params, key, num_largest, num_smallest, num_steps)


def _extremes(
    product: Product, params: PyTree, key: jax.Array, num_largest: int, num_smallest: int, m: int
) -> Extremes:
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    if num_largest + num_smallest > (m := min(m, num_params)):
        raise ValueError(
            f"{num_largest} largest and {num_smallest} smallest need more than {m} steps"
        )
    tridiagonal = lanczos(product, normal_like(key, params), m)
    # Steps after the basis was complete made rows of zeros, which are no eigenvalues.
    made_m = jnp.cumprod(jnp.append(True, tridiagonal.betas_m[:-1] > 0)) > 0
    beyond = 1 + 4 * jnp.maximum(jnp.abs(tridiagonal.alphas_m).max(), tridiagonal.betas_m.max())
    tridiagonal = tridiagonal._replace(alphas_m=jnp.where(made_m, tridiagonal.alphas_m, beyond))
    values_m, vectors_mxm = tridiagonal.eigenpairs()
    real_m = values_m < beyond
    residuals_m = jnp.abs(tridiagonal.betas_m[-1] * vectors_mxm[-1])

    def choose(order_m: jax.Array, number: int) -> Eigenpairs:
        chosen_k = order_m[:number]
        vectors = jax.tree.map(
            lambda q: jnp.tensordot(vectors_mxm[:, chosen_k], q, (0, 0), precision="highest"),
            tridiagonal.basis,
        )
        values_k, residuals_k = (
            jnp.where(real_m[chosen_k], x_m[chosen_k], jnp.nan) for x_m in (values_m, residuals_m)
        )
        return Eigenpairs(values_k, residuals_k, vectors)

    smallest = jnp.argsort(jnp.where(real_m, values_m, jnp.inf))
    largest = jnp.argsort(jnp.where(real_m, -values_m, jnp.inf))
    return Extremes(choose(largest, num_largest), choose(smallest, num_smallest))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpectralDensity:
    """Stochastic Lanczos quadrature: n draws of m nodes with weights that sum to 1.

    v' f(M) v / P = sum_j weights_j f(nodes_j) in each draw v of random signs, for polynomials f up
    to degree 2m - 1; its mean is (1/P) tr f(M), P parameters (Ubaru, Chen & Saad, 2017).
    """

    nodes_nxm: jax.Array
    weights_nxm: jax.Array
    num_params: int = field(metadata={"static": True})

    def mean_of(self, function: Callable[[jax.Array], jax.Array]) -> Estimate:
        """(1/P) tr f(M): the mean of a function over all eigenvalues; the error is of the draws."""
        sums_n = (self.weights_nxm * function(self.nodes_nxm)).sum(axis=1)
        return ratio_estimate(sums_n, jnp.ones_like(sums_n), over="probes")

    def effective_rank(self) -> Estimate:
        """(tr M)^2 / tr M^2, with the error of a ratio linearised around the means."""
        first_n, second_n = ((self.weights_nxm * self.nodes_nxm**k).sum(axis=1) for k in (1, 2))
        first, second = first_n.mean(), second_n.mean()
        rank, n = self.num_params * first**2 / second, len(first_n)
        errors_n = rank * (2 * (first_n / first - 1) - (second_n / second - 1))
        sem = jnp.sqrt((errors_n**2).sum() / (n * (n - 1))) if n > 1 else jnp.nan * rank
        return Estimate(rank, sem, n, "probes")


@partial(jax.jit, static_argnames=("loss_fn", "num_probes", "num_steps"))
def hessian_density(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    num_steps: int,
) -> SpectralDensity:
    """The density of H's eigenvalues, from num_probes runs of num_steps products each.

    No more steps than parameters are taken: m is then the number of these.
    """
    params = at_least_float32(params)
    product = partial(mean_product, partial(unshared_hessian, loss_fn, params), batches)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = rademacher_like(key, params)
        values_m, vectors_mxm = lanczos(product, start, min(num_steps, num_params)).eigenpairs()
        return values_m, vectors_mxm[0] ** 2

    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    nodes_nxm, weights_nxm = jax.lax.map(draw, jax.random.split(key, num_probes))
    return SpectralDensity(nodes_nxm, weights_nxm, num_params)
