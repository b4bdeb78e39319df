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
from typing import Any

import jax

from jaxflat.flatness.estimate import Estimate, Over
from jaxflat.flatness.products import (
    LogProbsFn,
    LossFn,
    PyTree,
    at_least_float32,
    linearized_hessian,
)
from jaxflat.flatness.quadratic_forms import linearized_gauss_newton
from jaxflat.flatness.sampling import SampleFn, collect_terms, draw_probe, score_sampler
from jaxflat.flatness.second_order_adjoint import shared_hessian_form
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

    g as of `score_sampler`: E|g|^2 = sum_i w_i E|grad log p(y_i)|^2 = N tr F; for weights 0 and 1
    it is N times the squared gradient of the mean loss over N predictions. One backward pass each.
    Samples are squared norms, so skewed: prefer 64 or more (95% intervals of 16 cover about 92%).
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        score_fn, weight = score_sampler(log_probs_fn, params, index, batch)

        def sample(draw: jax.Array) -> PyTree:
            gradient = score_fn(jax.random.fold_in(key, draw))
            return leaf_products(gradient, gradient, stacked)

        return sample, weight

    return collect_terms(sampler, batches, num_samples, samples_per_pass, over)


@partial(jax.jit, static_argnames=("loss_fn", "num_probes", "over", "probes_per_pass"))
def hessian_trace_samples(
    loss_fn: LossFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
) -> TraceTerms:
    """tr H as one term, E[v' H v]: what the terms of `hessian_trace_terms` add up to.

    Adjoints are computed once a microbatch and kept, at more memory than two forward derivatives
    take; then each probe is one forward pass: see `second_order_adjoint`.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        quadratic_form, weight = shared_hessian_form(loss_fn, params, batch)
        return lambda draw: quadratic_form(draw_probe(key, over, index, draw, params)), weight

    return collect_terms(sampler, batches, num_probes, probes_per_pass, over)


@partial(jax.jit, static_argnames=("log_probs_fn", "num_probes", "over", "probes_per_pass"))
def gauss_newton_trace_samples(
    log_probs_fn: LogProbsFn,
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_probes: int,
    over: Over = "probes+sentences",
    probes_per_pass: int = 1,
) -> TraceTerms:
    """tr G as one term, E[v' G v]: each probe one forward pass.

    It does not split by leaf; since tr G_ll = tr F_ll, the traces by block are those of
    `fisher_trace_terms`.
    """
    params = at_least_float32(params)

    def sampler(index: jax.Array, batch: PyTree) -> tuple[SampleFn, jax.Array]:
        quadratic_form, weight = linearized_gauss_newton(log_probs_fn, params, batch)
        return lambda draw: quadratic_form(draw_probe(key, over, index, draw, params)), weight

    return collect_terms(sampler, batches, num_probes, probes_per_pass, over)


def hessian_trace(
    loss_fn: LossFn, params: PyTree, batches: PyTree, key: jax.Array, **how: Any
) -> Estimate:
    """tr H of the mean loss, with the keywords of `hessian_trace_samples`.

    May be negative off a minimum. By block: `hessian_trace_terms`.
    """
    return hessian_trace_samples(loss_fn, params, batches, key, **how).total()


def gauss_newton_trace(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, key: jax.Array, **how: Any
) -> Estimate:
    """tr G of the mean loss, with the keywords of `gauss_newton_trace_samples`."""
    return gauss_newton_trace_samples(log_probs_fn, params, batches, key, **how).total()


def fisher_trace(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, key: jax.Array, **how: Any
) -> Estimate:
    """tr F of the mean loss, labels drawn from the model; keywords of `fisher_trace_terms`."""
    return fisher_trace_terms(log_probs_fn, params, batches, key, **how).total()
