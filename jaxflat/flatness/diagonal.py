"""Estimate the diagonals of the Hessian and the Fisher information, each entry with an error.

Every microbatch draws its own probes or labels and is one sample, so errors cover draws and
sentences. Running sums hold the samples: memory is a few times the parameters' memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate
from jaxflat.flatness.inputs import LogProbsFn, LossFn, estimator
from jaxflat.flatness.products import linearized_hessian
from jaxflat.flatness.sampling import draw_probe, score_sampler
from jaxflat.flatness.terms import SampleFn, Sampler
from jaxflat.flatness.trees import PyTree, at_least_float32


@estimator("num_probes")
def hessian_diagonal(
    loss_fn: LossFn, params: PyTree, batches: PyTree, key: jax.Array, *, num_probes: int
) -> Estimate:
    """Return diag H = E[v * H v] for random signs v (Bekas, Kokiopoulou & Saad, 2007), in nats.

    H is the Hessian of the mean loss. num_probes: random vectors in each microbatch. Mean and sem
    are shaped like params; the error covers probes and sentences, n = M >= 2 microbatches. The
    variance of an entry over probes is the sum of squares of the other entries of its row, so noise
    hides small entries of large rows.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        product_fn, weight = linearized_hessian(loss_fn, params, batch)

        def sample(draw: jax.Array) -> PyTree:
            probe = draw_probe(key, "probes+sentences", index, draw, params)
            return jax.tree.map(jnp.multiply, probe, product_fn(probe))

        return sample, weight

    return _entrywise(sampler, params, batches, num_probes)


@estimator("num_samples")
def fisher_diagonal(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, key: jax.Array, *, num_samples: int
) -> Estimate:
    """Return diag F = E[g * g], which equals diag G, in nats; g = grad log p(y), y ~ the model.

    num_samples: draws of labels in each microbatch. Mean and sem are shaped like params, no entry
    is negative. The error covers draws and sentences, n = M >= 2 microbatches. g sums over a
    microbatch's independent predictions; see `sampling.score_sampler`.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        score_fn, weight = score_sampler(log_probs_fn, params, index, batch)

        def sample(draw: jax.Array) -> PyTree:
            return jax.tree.map(jnp.square, score_fn(jax.random.fold_in(key, draw)))

        return sample, weight

    return _entrywise(sampler, params, batches, num_samples)


def _entrywise(sampler: Sampler, params: PyTree, batches: PyTree, num_draws: int) -> Estimate:
    """Return sum(s) / sum(w) over microbatches with its error, entrywise; see `ratio_estimate`.

    The running sums add s_i - R w_i, with R the first microbatch's ratio. These terms are near 0,
    so little cancels.
    """
    num_samples = jax.tree.leaves(batches)[0].shape[0]
    if num_samples < 2:
        raise ValueError("the error of a diagonal needs at least 2 microbatches")
    zeros = jax.tree.map(jnp.zeros_like, params)

    def sum_draws(index: jax.Array, batch: PyTree) -> tuple[PyTree, jax.Array]:
        sample_fn, weight = sampler(index, batch)

        def add(draw: jax.Array, total: PyTree) -> PyTree:
            return jax.tree.map(lambda t, s: t + s / num_draws, total, sample_fn(draw))

        return jax.lax.fori_loop(0, num_draws, add, zeros), weight.astype(jnp.result_type(float))

    def add_microbatch(carry: tuple, index_and_batch: tuple) -> tuple[tuple, None]:
        reference, sums, squares, crosses, weights = carry
        sample, weight = sum_draws(*index_and_batch)
        is_first, divisor = index_and_batch[0] == 0, jnp.where(weight > 0, weight, 1)
        reference = jax.tree.map(
            lambda r, s: jnp.where(is_first, s / divisor, r), reference, sample
        )
        offset = jax.tree.map(lambda s, r: s - r * weight, sample, reference)
        sums = jax.tree.map(jnp.add, sums, offset)
        squares = jax.tree.map(lambda t, d: t + d**2, squares, offset)
        crosses = jax.tree.map(lambda t, d: t + d * weight, crosses, offset)
        weights += jnp.stack([weight, weight**2])
        return (reference, sums, squares, crosses, weights), None

    start = (zeros, zeros, zeros, zeros, jnp.zeros(2))
    indices = jnp.arange(num_samples)
    carry, _ = jax.lax.scan(add_microbatch, start, (indices, batches))
    reference, sums, squares, crosses, weights = carry
    weight, squared_weight = weights[0], weights[1]
    shift = jax.tree.map(lambda s: s / weight, sums)

    def standard_error(square: jax.Array, cross: jax.Array, shift: jax.Array) -> jax.Array:
        residual = square - 2 * shift * cross + shift**2 * squared_weight
        return jnp.sqrt(num_samples / (num_samples - 1) * jnp.maximum(residual, 0)) / weight

    sem = jax.tree.map(standard_error, squares, crosses, shift)
    mean = jax.tree.map(jnp.add, reference, shift)
    return Estimate(mean, sem, num_samples, "probes+sentences")
