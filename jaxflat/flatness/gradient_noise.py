"""Estimate the noise of stochastic gradients, from triples of independent microbatches.

Sigma is the covariance of one prediction's gradient, so the mean gradient g_m over w_m predictions
has covariance Sigma / w_m. Two microbatches give (g_i - g_j)(g_i - g_j)' / (1/w_i + 1/w_j), with
mean Sigma, and g_i . g_j, with mean |E g|^2. The Hessian H_k of a third microbatch is independent
of both. Each triple of microbatches averages its three pairs and is one sample.

Predictions from one text depend on each other. Sigma then means w_m times the covariance of g_m and
includes this dependence. If w_m varies, g_m is a ratio, with a bias of order 1 / w_m.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, ratio_estimate
from jaxflat.flatness.inputs import LossFn, estimator
from jaxflat.flatness.products import linearized_gradient
from jaxflat.flatness.trees import PyTree, at_least_float32, inner


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GradientNoise:
    """Estimates over sentences; with fixed w_m all are unbiased except the ratio `noise_scale`.

    covariance_trace: tr Sigma, in nats^2. squared_gradient: |E g|^2, in nats^2. noise_scale: tr
    Sigma / |E g|^2, the number of predictions at which noise and gradient are equally long
    (McCandlish et al., 2018). alignment: tr(Sigma H), in nats^3. At an optimum Sigma = H by
    Bartlett's identity, and this is tr(H^2).
    """

    covariance_trace: Estimate
    squared_gradient: Estimate
    noise_scale: Estimate
    alignment: Estimate


@estimator()
def gradient_noise(loss_fn: LossFn, params: PyTree, batches: PyTree) -> GradientNoise:
    """Return tr Sigma, |E g|^2, their ratio and tr(Sigma H) at `params`, see `GradientNoise`.

    Sigma is the covariance of one prediction's gradient g (McCandlish et al., 2018). Consecutive
    triples of independent microbatches are the samples, up to two microbatches remain unused.
    Raises ValueError for fewer than two triples.
    """
    params = at_least_float32(params)
    num_triples = jax.tree.leaves(batches)[0].shape[0] // 3
    if num_triples < 2:
        raise ValueError("gradient_noise needs at least 6 microbatches, two triples")
    triples = jax.tree.map(
        lambda x: x[: 3 * num_triples].reshape(num_triples, 3, *x.shape[1:]), batches
    )

    def triple(batches_3: PyTree) -> tuple[jax.Array, ...]:
        parts = [jax.tree.map(lambda x, i=i: x[i], batches_3) for i in range(3)]
        gradients, weights, products = [], [], []
        for part in parts:
            gradient, product, weight = linearized_gradient(loss_fn, params, part)
            weight = weight.astype(jnp.result_type(float))
            gradients.append(jax.tree.map(lambda g, w=weight: g / w, gradient))
            weights.append(weight)
            products.append(product)
        samples = []
        for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            difference = jax.tree.map(jnp.subtract, gradients[i], gradients[j])
            spread = 1 / weights[i] + 1 / weights[j]
            covariance = inner(difference, difference) / spread
            curvature = jax.tree.map(lambda h, k=k: h / weights[k], products[k](difference))
            alignment = inner(difference, curvature) / spread
            samples.append((covariance, inner(gradients[i], gradients[j]), alignment))
        return tuple(jnp.stack(column).mean() for column in zip(*samples, strict=True))

    covariance_n, squared_n, alignment_n = jax.lax.map(triple, triples)
    ones_n = jnp.ones_like(covariance_n)
    return GradientNoise(
        covariance_trace=ratio_estimate(covariance_n, ones_n, over="sentences"),
        squared_gradient=ratio_estimate(squared_n, ones_n, over="sentences"),
        noise_scale=ratio_estimate(covariance_n, squared_n, over="sentences"),
        alignment=ratio_estimate(alignment_n, ones_n, over="sentences"),
    )
