"""Compute extreme eigenvalues, and the density of all eigenvalues, by the Lanczos method.

The matrix belongs to the mean loss over the given microbatches. The sentences are fixed: residuals
are numerical errors, not standard errors.

m Lanczos steps from v give an m x m tridiagonal matrix T. Its eigenvalues (Ritz values) approach
the extreme eigenvalues first. A Ritz pair (theta, y) has the residual |M y - theta y| =
|beta_m s_m|, with s_m the last entry of T's eigenvector. Some eigenvalue is at most that far from
theta (Parlett, The Symmetric Eigenvalue Problem, 1998, ch. 13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, ratio_estimate
from jaxflat.flatness.inputs import LogProbsFn, LossFn, estimator
from jaxflat.flatness.products import Product, gauss_newton_product, hessian_product, mean_product
from jaxflat.flatness.sampling import normal_like, rademacher_like
from jaxflat.flatness.trees import PyTree, at_least_float32, inner


class Tridiagonal(NamedTuple):
    """m Lanczos steps: M basis ~ basis T; m orthonormal vectors along a leading axis of the basis.

    alphas_m is T's diagonal. betas_m is its off-diagonal; the last entry is the norm of the
    remainder M basis - basis T. If the basis is complete before step m, the rest is zero.
    """

    alphas_m: jax.Array
    betas_m: jax.Array
    basis: PyTree

    def eigenpairs(self) -> tuple[jax.Array, jax.Array]:
        """Return T's eigenvalues in ascending order, and its eigenvectors as columns."""
        off = self.betas_m[:-1]
        return jnp.linalg.eigh(jnp.diag(self.alphas_m) + jnp.diag(off, 1) + jnp.diag(off, -1))


def lanczos(product: Product, start: PyTree, num_steps: int) -> Tridiagonal:
    """Take num_steps steps with full reorthogonalisation; the basis holds num_steps vectors."""

    def orthogonalize(vector: PyTree, basis: PyTree) -> PyTree:
        def overlaps(q: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.tensordot(q, w, w.ndim, precision="highest")

        overlaps_m = jnp.stack(jax.tree.leaves(jax.tree.map(overlaps, basis, vector))).sum(axis=0)

        def subtract(q: jax.Array, w: jax.Array) -> jax.Array:
            return w - jnp.tensordot(overlaps_m, q, 1, precision="highest")

        return jax.tree.map(subtract, basis, vector)

    def step(i: jax.Array, carry: tuple) -> tuple:
        alphas_m, betas_m, basis = carry
        vector = jax.tree.map(lambda q: q[i], basis)
        following = product(vector)
        alpha = inner(vector, following)
        # Orthogonalising twice is enough (Kahan and Parlett).
        following = orthogonalize(orthogonalize(following, basis), basis)
        beta = jnp.sqrt(inner(following, following))
        scale = jnp.maximum(jnp.abs(alphas_m).max(), betas_m.max())
        scale = jnp.maximum(scale, jnp.abs(alpha))
        beta = jnp.where(beta > 100 * jnp.finfo(beta.dtype).eps * scale, beta, 0)
        inverse = jnp.where(beta > 0, 1 / jnp.where(beta > 0, beta, 1), 0)
        # The write follows every read of the basis, so XLA need not copy it. The write after step
        # m is out of bounds and is dropped.
        basis = jax.tree.map(lambda q, w: q.at[i + 1].set(w * inverse), basis, following)
        return alphas_m.at[i].set(alpha), betas_m.at[i].set(beta), basis

    norm = jnp.sqrt(inner(start, start))
    zeros_m = jnp.zeros(num_steps, norm.dtype)
    basis = jax.tree.map(
        lambda v: jnp.zeros((num_steps, *v.shape), v.dtype).at[0].set(v / norm), start
    )
    return Tridiagonal(*jax.lax.fori_loop(0, num_steps, step, (zeros_m, zeros_m, basis)))


class Eigenpairs(NamedTuple):
    """k Ritz values, their residuals, and unit vectors along a leading axis of each leaf.

    If the steps yield fewer pairs, the missing values and residuals are nan and the vectors 0.
    """

    values_k: jax.Array
    residuals_k: jax.Array
    vectors: PyTree


class Extremes(NamedTuple):
    """The largest eigenvalues in descending order and the smallest in ascending order."""

    largest: Eigenpairs
    smallest: Eigenpairs


@estimator("num_largest", "num_smallest", "num_steps")
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
    """Return the extreme eigenpairs of the Hessian H of the mean loss, in nats (`Extremes`).

    Residuals tell whether pairs have converged (Parlett, 1998, ch. 13); `curvature_along` gives
    errors over sentences. At a minimum the smallest eigenvalue is not negative. Raises ValueError
    for more pairs than steps or parameters.
    """
    params = at_least_float32(params)
    product = partial(mean_product, partial(hessian_product, loss_fn, params), batches)
    return _extremes(product, params, key, num_largest, num_smallest, num_steps)


@estimator("num_largest", "num_smallest", "num_steps")
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
    """Return the extreme eigenpairs of the Gauss-Newton matrix G of the mean loss, in nats.

    Residuals tell whether pairs have converged (Parlett, 1998, ch. 13). G has no negative
    eigenvalues. Raises ValueError for more pairs than steps or parameters.
    """
    params = at_least_float32(params)
    product = partial(mean_product, partial(gauss_newton_product, log_probs_fn, params), batches)
    return _extremes(product, params, key, num_largest, num_smallest, num_steps)


def _extremes(
    product: Product, params: PyTree, key: jax.Array, num_largest: int, num_smallest: int, m: int
) -> Extremes:
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    if num_largest + num_smallest > (m := min(m, num_params)):
        raise ValueError(
            f"{num_largest} largest and {num_smallest} smallest eigenvalues need at least "
            f"{num_largest + num_smallest} steps and parameters, not {m}"
        )
    tridiagonal = lanczos(product, normal_like(key, params), m)
    # Steps after a complete basis give rows of zeros in T, which are not eigenvalues.
    valid_m = jnp.cumprod(jnp.append(True, tridiagonal.betas_m[:-1] > 0)) > 0
    beyond = 1 + 4 * jnp.maximum(jnp.abs(tridiagonal.alphas_m).max(), tridiagonal.betas_m.max())
    tridiagonal = tridiagonal._replace(alphas_m=jnp.where(valid_m, tridiagonal.alphas_m, beyond))
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

    Each draw v of random signs has v' f(M) v / P = sum_j weights_j f(nodes_j), for P parameters and
    polynomials f up to degree 2m - 1. Its mean is (1/P) tr f(M) (Ubaru, Chen & Saad, 2017).
    """

    nodes_nxm: jax.Array
    weights_nxm: jax.Array
    num_params: int = field(metadata={"static": True})

    def mean_of(self, function: Callable[[jax.Array], jax.Array]) -> Estimate:
        """Return (1/P) tr f(M), the mean of a function over all eigenvalues; errors over draws."""
        sums_n = (self.weights_nxm * function(self.nodes_nxm)).sum(axis=1)
        return ratio_estimate(sums_n, jnp.ones_like(sums_n), over="probes")

    def effective_rank(self) -> Estimate:
        """Return (tr M)^2 / tr M^2, with the error of the ratio linearised around the means."""
        first_n, second_n = ((self.weights_nxm * self.nodes_nxm**k).sum(axis=1) for k in (1, 2))
        first, second = first_n.mean(), second_n.mean()
        rank, n = self.num_params * first**2 / second, len(first_n)
        errors_n = rank * (2 * (first_n / first - 1) - (second_n / second - 1))
        sem = jnp.sqrt((errors_n**2).sum() / (n * (n - 1))) if n > 1 else jnp.nan * rank
        return Estimate(rank, sem, n, "probes")


@estimator("num_probes", "num_steps")
def hessian_density(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    num_steps: int,
) -> SpectralDensity:
    """Return the density of the eigenvalues of the Hessian H of the mean loss, in nats.

    Stochastic Lanczos quadrature (Ubaru, Chen & Saad, 2017). num_probes: n, random start vectors;
    errors over them need 2. num_steps: Lanczos steps of each, one product H v a step; the density
    has m = min(num_steps, number of parameters) nodes. `jaxflat.analysis.plot_density` draws it.
    """
    params = at_least_float32(params)
    product = partial(mean_product, partial(hessian_product, loss_fn, params), batches)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = rademacher_like(key, params)
        values_m, vectors_mxm = lanczos(product, start, min(num_steps, num_params)).eigenpairs()
        return values_m, vectors_mxm[0] ** 2

    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    nodes_nxm, weights_nxm = jax.lax.map(draw, jax.random.split(key, num_probes))
    return SpectralDensity(nodes_nxm, weights_nxm, num_params)
