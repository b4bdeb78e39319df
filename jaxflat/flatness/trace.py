"""Traces of the Hessian, the Gauss-Newton matrix and the Fisher information, with error bars.

tr F = tr G always, and tr H = tr G where the model equals the true conditional: a difference
between tr H and tr G measures how far the model is from saturation.

What the error bar covers is the caller's choice:
  over="probes+sentences": each microbatch draws its own `num_probes` probes and is one sample
    (n = number of microbatches, at least 2); the error covers sentences and probes.
  over="probes": the data are fixed, each probe goes through all microbatches and is one sample
    (n = num_probes); the error covers probes only.

Everything random derives from `key`. Memory grows with `*_per_pass`, the number of probes that run
side by side, not with the number of probes. Matmuls run at the precision the model or
`jax.default_matmul_precision` asks for (TF32 by default on recent GPUs); everything else is at
least float32. Functions passed in are static: pass the same function object to avoid recompiling.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, Over
from jaxflat.flatness.products import (
    LogProbsFn,
    LossFn,
    PyTree,
    at_least_float32,
    linearized_gauss_newton,
    linearized_hessian,
)
from jaxflat.flatness.sampling import SampleFn, collect_terms, draw_labels, draw_probe
from jaxflat.flatness.terms import TraceTerms, leaf_products


@partial(jax.jit, static_argnames=("loss_fn", "num_probes", "over", "probes_per_pass", "stacked"))
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
) -> TraceTerms:
    """tr H by parameter leaf: E[v_l . (H v)_l] = tr H_ll for random signs v (Hutchinson, 1990).

    `stacked(path)` marks leaves whose axis 0 is a stack of layers.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        product_fn, weight = linearized_hessian(loss_fn, params, batch)

        def sample(draw: jax.Array) -> PyTree:
            probe = draw_probe(key, over, index, draw, params)
            return leaf_products(probe, product_fn(probe), stacked)

        return sample, weight

    return collect_terms(sampler, batches, num_probes, probes_per_pass, over)


@partial(
    jax.jit, static_argnames=("log_probs_fn", "num_samples", "over", "samples_per_pass", "stacked")
)
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
) -> TraceTerms:
    """tr F by parameter leaf, from first derivatives: squared gradients at labels the model drew.

    g = sum_i sqrt(w_i) grad log p(y_i) with y_i ~ p_i. Scores are independent with mean zero, so
    E|g|^2 = sum_i w_i E|grad log p(y_i)|^2 = N tr F; for weights 0 and 1 it is N times the squared
    gradient of the mean loss over N predictions. A draw costs one backward pass. Labels depend on
    the key, the draw and the example's global index only, not on microbatches or devices.
    Samples are squared norms, so skewed: prefer 64 or more (95% intervals of 16 cover about 92%).
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        log_probs, pullback, weights = jax.vjp(
            lambda p: log_probs_fn(p, batch), params, has_aux=True
        )
        batch_size, vocabulary = log_probs.shape[0], log_probs.shape[-1]
        scales = jnp.sqrt(weights.astype(log_probs.dtype))[..., None]

        def sample(draw: jax.Array) -> PyTree:
            labels = draw_labels(jax.random.fold_in(key, draw), log_probs, index * batch_size)
            one_hot = jax.nn.one_hot(labels, vocabulary, dtype=log_probs.dtype)
            (gradient,) = pullback(scales * one_hot)
            return leaf_products(gradient, gradient, stacked)

        return sample, weights.sum()

    return collect_terms(sampler, batches, num_samples, samples_per_pass, over)


@partial(jax.jit, static_argnames=("loss_fn", "num_probes", "over", "probes_per_pass"))
def hessian_trace(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
) -> Estimate:
    """tr H of the mean loss; may be negative off a minimum. By block: `hessian_trace_terms`."""
    terms = hessian_trace_terms(
        loss_fn, params, batches, key,
        num_probes=num_probes, over=over, probes_per_pass=probes_per_pass,
    )  # fmt: skip
    return terms.total()


@partial(jax.jit, static_argnames=("log_probs_fn", "num_samples", "over", "samples_per_pass"))
def fisher_trace(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_samples: int,
    over: Over = "probes+sentences",
    samples_per_pass: int = 1,
) -> Estimate:
    """tr F of the mean loss, labels drawn from the model. By block: `fisher_trace_terms`."""
    terms = fisher_trace_terms(
        log_probs_fn, params, batches, key,
        num_samples=num_samples, over=over, samples_per_pass=samples_per_pass,
    )  # fmt: skip
    return terms.total()


@partial(jax.jit, static_argnames=("log_probs_fn", "num_probes", "over", "probes_per_pass"))
def gauss_newton_trace(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
) -> Estimate:
    """tr G = E[v' G v] for random signs v, each probe one forward pass.

    The forward-only form gives v' G v as one number that does not split by leaf; since
    tr G_ll = tr F_ll, the traces by block are those of `fisher_trace_terms`.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        quadratic_form, weight = linearized_gauss_newton(log_probs_fn, params, batch)
        return lambda draw: quadratic_form(draw_probe(key, over, index, draw, params)), weight

    return collect_terms(sampler, batches, num_probes, probes_per_pass, over).total()
