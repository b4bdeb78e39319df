"""The Lanczos method with full reorthogonalisation, on vectors that are pytrees.

m steps from v give an m x m tridiagonal matrix T whose eigenvalues (Ritz values) approach the
extreme ones first. A Ritz pair (theta, y) has the residual |M y - theta y| = |beta_m s_m|, s_m the
last entry of T's eigenvector: some eigenvalue is at most that far from theta (Parlett, The
Symmetric Eigenvalue Problem, 1998, ch. 13).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.flatness.products import Product, PyTree
from jaxflat.flatness.trees import inner


class Tridiagonal(NamedTuple):
    """m Lanczos steps: M basis ~ basis T, basis with a leading axis of m orthonormal vectors.

    alphas_m on T's diagonal, betas_m beside it, the last one the norm of what T leaves out. Where
    the basis is complete before the m-th step, the rest is zero.
    """

    alphas_m: jax.Array
    betas_m: jax.Array
    basis: PyTree

    def eigenpairs(self) -> tuple[jax.Array, jax.Array]:
        """T's eigenvalues in ascending order, and its eigenvectors as columns."""
        beside = self.betas_m[:-1]
        return jnp.linalg.eigh(jnp.diag(self.alphas_m) + jnp.diag(beside, 1) + jnp.diag(beside, -1))


def lanczos(product: Product, start: PyTree, num_steps: int) -> Tridiagonal:
    """num_steps steps from a start vector; the basis takes num_steps times its memory."""

    def orthogonal(vector: PyTree, basis: PyTree) -> PyTree:
        def overlaps(q: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.tensordot(q, w, w.ndim, precision="highest")

        overlaps_m = jnp.stack(jax.tree.leaves(jax.tree.map(overlaps, basis, vector))).sum(axis=0)

        def rest(q: jax.Array, w: jax.Array) -> jax.Array:
            return w - jnp.tensordot(overlaps_m, q, 1, precision="highest")

        return jax.tree.map(rest, basis, vector)

    def step(i: jax.Array, carry: tuple) -> tuple:
        alphas_m, betas_m, basis = carry
        vector = jax.tree.map(lambda q: q[i], basis)
        following = product(vector)
        alpha = inner(vector, following)
        # Twice is enough (Kahan and Parlett).
        following = orthogonal(orthogonal(following, basis), basis)
        beta = jnp.sqrt(inner(following, following))
        scale = jnp.maximum(jnp.abs(alphas_m).max(), betas_m.max())
        scale = jnp.maximum(scale, jnp.abs(alpha))
        beta = jnp.where(beta > 100 * jnp.finfo(beta.dtype).eps * scale, beta, 0)
        inverse = jnp.where(beta > 0, 1 / jnp.where(beta > 0, beta, 1), 0)
        # Written last, after every read of the basis, so that it need not be copied; the vector
        # after the m-th has no place and is dropped.
        basis = jax.tree.map(lambda q, w: q.at[i + 1].set(w * inverse), basis, following)
        return alphas_m.at[i].set(alpha), betas_m.at[i].set(beta), basis

    norm = jnp.sqrt(inner(start, start))
    zeros_m = jnp.zeros(num_steps, norm.dtype)
    basis = jax.tree.map(
        lambda v: jnp.zeros((num_steps, *v.shape), v.dtype).at[0].set(v / norm), start
    )
    return Tridiagonal(*jax.lax.fori_loop(0, num_steps, step, (zeros_m, zeros_m, basis)))
