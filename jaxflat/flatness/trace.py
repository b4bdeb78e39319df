"""Estimate traces of the Hessian, Gauss-Newton matrix and Fisher information, with error bars.

tr F = tr G always. tr H = tr G if the model equals the true conditional, so tr H - tr G measures
how far the model is from saturation.

The caller chooses what the error bar covers:
  over="probes+sentences": each microbatch draws its own `num_probes` probes and is one sample
    (n = number of microbatches, at least 2). The error covers sentences and probes.
  over="probes": the data are fixed. Each probe sees all microbatches and is one sample
    (n = num_probes). The error covers probes only.

`rescale` is a linear map T of the parameters. The traces are then tr T' H T, tr T' G T and
tr T' F T: the curvature of the same function in other coordinates.

All randomness derives from `key`. Memory grows with `*_per_pass`, the number of probes in one pass,
not with the number of probes. Matrix products run at the precision that the model or
`jax.default_matmul_precision` sets (TF32 by default on recent GPUs); the rest is at least float32.
The functions passed in are static arguments: pass the same function object to avoid recompiling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, Over
from jaxflat.flatness.inputs import LogProbsFn, LossFn, documented, estimator
from jaxflat.flatness.products import gauss_newton_form, linearized_hessian
from jaxflat.flatness.sampling import draw_probe, score_sampler, signed_score_sampler
from jaxflat.flatness.second_order import shared_hessian_form
from jaxflat.flatness.terms import SampleFn, TraceTerms, collect_terms, leaf_products
from jaxflat.flatness.trees import PyTree, at_least_float32

Rescale = Callable[[jax.Array, PyTree], PyTree]
"""(index of a microbatch, v) -> T v, a jax.tree_util.Partial; traces are then those of T' H T."""


def rescaled(vector: PyTree, rescale: Rescale | None, index: jax.Array) -> PyTree:
    """Return T v for the microbatch of this index; v itself without `rescale`."""
    return vector if rescale is None else rescale(index, vector)


@estimator("num_probes", "over", "probes_per_pass", "stacked")
def hessian_trace_terms(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
    stacked: Callable[[str], bool] | None = None,
    rescale: Rescale | None = None,
) -> TraceTerms:
    """Return samples of tr H by leaf: E[v_l . (H v)_l] = tr H_ll for random signs v, in nats.

    H is the Hessian of the mean loss over predictions (Hutchinson, 1990). Of the result,
    `.total()` is tr H with its error, and `.by_block(block_of)` the trace of each block. Each
    probe costs one product H v.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        product_fn, weight = linearized_hessian(loss_fn, params, batch)

        def sample(draw: jax.Array) -> PyTree:
            probe = rescaled(draw_probe(key, over, index, draw, params), rescale, index)
            return leaf_products(probe, product_fn(probe), stacked)

        return sample, weight

    return collect_terms(sampler, batches, num_probes, probes_per_pass, over)


@estimator("num_samples", "over", "samples_per_pass", "stacked")
def fisher_trace_terms(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_samples: int,
    over: Over = "probes+sentences",
    samples_per_pass: int = 1,
    stacked: Callable[[str], bool] | None = None,
    rescale: Rescale | None = None,
) -> TraceTerms:
    """Return samples of tr F by leaf, in nats: squared gradients at labels that the model draws.

    F is the Fisher information of the mean over predictions, and tr F = tr G. Of the result,
    `.total()` is tr F with its error, and `.by_block(block_of)` the trace of each block. Each draw
    is one backward pass.

    With g of `score_sampler`, E|g|^2 = sum_i w_i E|grad log p(y_i)|^2 = N tr F. For weights 0 and 1
    |g|^2 is N times the squared gradient of the mean loss over N predictions. Samples are squared
    norms and skewed: prefer 64 or more (95% intervals of 16 samples cover about 92%).
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        score_fn, weight = score_sampler(log_probs_fn, params, index, batch)

        def sample(draw: jax.Array) -> PyTree:
            gradient = score_fn(jax.random.fold_in(key, draw))
            if rescale is not None:
                (gradient,) = jax.linear_transpose(partial(rescale, index), params)(gradient)
            return leaf_products(gradient, gradient, stacked)

        return sample, weight

    return collect_terms(sampler, batches, num_samples, samples_per_pass, over)


@estimator("num_probes", "over", "probes_per_pass")
def hessian_trace_samples(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
    rescale: Rescale | None = None,
) -> TraceTerms:
    """Return samples of tr H as one term, E[v' H v], in nats; `.total()` is tr H with its error.

    Each is the sum of the terms of `hessian_trace_terms`, cheaper, but without parts. The adjoints
    of a microbatch are computed once and stored, which takes more memory than two forward
    derivatives. Each probe is then one forward pass; see `second_order.adjoint`.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        quadratic_form, weight = shared_hessian_form(loss_fn, params, batch)

        def sample(draw: jax.Array) -> jax.Array:
            probe = draw_probe(key, over, index, draw, params)
            return quadratic_form(rescaled(probe, rescale, index))

        return sample, weight

    return collect_terms(sampler, batches, num_probes, probes_per_pass, over)


@estimator("num_probes", "over", "probes_per_pass")
def gauss_newton_trace_samples(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
    rescale: Rescale | None = None,
) -> TraceTerms:
    """Return samples of tr G as one term, E[v' G v], in nats; `.total()` is tr G with its error.

    G is the Gauss-Newton matrix of the mean loss (Schraudolph, 2002), v random signs (Hutchinson,
    1990). Each probe is one forward pass. It does not split by leaf. For traces by block use
    `fisher_trace_terms`: tr G_ll = tr F_ll.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        quadratic_form, weight = gauss_newton_form(log_probs_fn, params, batch)

        def sample(draw: jax.Array) -> jax.Array:
            probe = draw_probe(key, over, index, draw, params)
            return quadratic_form(rescaled(probe, rescale, index))

        return sample, weight

    return collect_terms(sampler, batches, num_probes, probes_per_pass, over)


@estimator("moment_fn", "num_samples", "num_groups")
def fisher_moments(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    moment_fn: Callable[[PyTree], PyTree],
    *,
    num_samples: int,
    num_groups: int,
) -> PyTree:
    """Return the mean of `moment_fn(gradient)` in each group of microbatches; axis 0 is the group.

    Group i has the microbatches i, i + num_groups, ... The gradients g have random signs, and
    E[g g'] = F for the mean over predictions (see `signed_score_sampler`). Labels drawn from the
    model would give the same means. But most draws miss the steep gradients of rare words, and
    coordinates chosen without them can make the trace several times too large. `moment_fn` returns
    products of two entries of g. Memory holds num_groups + 1 of its results. num_samples: draws of
    signs for each microbatch.
    """
    params = at_least_float32(params)
    num_microbatches = jax.tree.leaves(batches)[0].shape[0]
    shapes = jax.eval_shape(moment_fn, params)
    zeros_G = jax.tree.map(lambda x: jnp.zeros((num_groups, *x.shape), x.dtype), shapes)

    def add_microbatch(
        sums_G: PyTree, index_and_batch: tuple[jax.Array, PyTree]
    ) -> tuple[PyTree, jax.Array]:
        index, batch = index_and_batch
        score_fn, weight = signed_score_sampler(log_probs_fn, params, index, batch)

        def add_draw(sums_G: PyTree, draw: jax.Array) -> tuple[PyTree, None]:
            moments = moment_fn(score_fn(jax.random.fold_in(key, draw)))
            group = index % num_groups
            return jax.tree.map(lambda x_G, x: x_G.at[group].add(x), sums_G, moments), None

        return jax.lax.scan(add_draw, sums_G, jnp.arange(num_samples))[0], weight

    numbered = jnp.arange(num_microbatches), batches
    sums_G, weights_M = jax.lax.scan(add_microbatch, zeros_G, numbered)
    weights_G = jnp.stack([weights_M[g::num_groups].sum() for g in range(num_groups)])
    return jax.tree.map(
        lambda x: x / (num_samples * weights_G.reshape(-1, *[1] * (x.ndim - 1))), sums_G
    )


@documented
def hessian_trace(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
    rescale: Rescale | None = None,
) -> Estimate:
    """Return tr H = E[v' H v] for random signs v (Hutchinson, 1990), in nats, with its error.

    H is the Hessian of the mean loss L = sum(loss_sum) / sum(weight). tr H may be negative away
    from a minimum. For traces by block use `hessian_trace_terms`, also for a loss with
    `jax.custom_vjp`, which has no forward derivative.
    """
    return hessian_trace_samples(
        loss_fn,
        params,
        batches,
        key,
        num_probes=num_probes,
        over=over,
        probes_per_pass=probes_per_pass,
        rescale=rescale,
    ).total()


@documented
def gauss_newton_trace(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
    rescale: Rescale | None = None,
) -> Estimate:
    """Return tr G = E[v' G v] for random signs v (Hutchinson, 1990), in nats, with its error.

    G = sum_i w_i J_i' (diag p_i - p_i p_i') J_i / sum_i w_i is the Gauss-Newton matrix of the mean
    cross-entropy (Schraudolph, 2002), J_i the Jacobian of prediction i's logits. tr G = tr F, and
    tr G = tr H if the model equals the true conditional.
    """
    return gauss_newton_trace_samples(
        log_probs_fn,
        params,
        batches,
        key,
        num_probes=num_probes,
        over=over,
        probes_per_pass=probes_per_pass,
        rescale=rescale,
    ).total()


@documented
def fisher_trace(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_samples: int,
    over: Over = "probes+sentences",
    samples_per_pass: int = 1,
    stacked: Callable[[str], bool] | None = None,
    rescale: Rescale | None = None,
) -> Estimate:
    """Return tr F = E|grad log p(y)|^2, y drawn from the model, in nats, with its error.

    F is the Fisher information, the mean over predictions; tr F = tr G (Kunstner, Balles & Hennig,
    2019). Each draw is one backward pass. Samples are squared norms and skewed: prefer 64 or more.
    """
    return fisher_trace_terms(
        log_probs_fn,
        params,
        batches,
        key,
        num_samples=num_samples,
        over=over,
        samples_per_pass=samples_per_pass,
        stacked=stacked,
        rescale=rescale,
    ).total()
