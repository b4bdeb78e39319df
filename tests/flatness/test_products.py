"""Products and forms with microbatches, custom reverse rules and 16-bit parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import (
    curvature_along,
    hessian_trace,
    hessian_trace_terms,
    hessian_vector_product,
    ratio_estimate,
)
from jaxflat.flatness.products import mean_gradient
from tests.support import softmax_table


def test_mean_gradient_is_the_gradient_over_all_predictions():
    params, batches = softmax_table.make_params(), softmax_table.make_batches(3, 4)
    assert len(set(batches["weights"].sum(1).tolist())) > 1
    gradient = mean_gradient(softmax_table.loss_fn, params, batches)
    merged = jax.tree.map(lambda x: x.reshape(-1), batches)
    expected = jax.jit(jax.grad(lambda p: softmax_table.loss_fn(p, merged)[0]))(params)
    expected = jax.tree.map(lambda g: g / merged["weights"].sum(), expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), gradient, expected)


def test_curvature_along_directions_is_the_dense_one_of_every_microbatch():
    """Each microbatch m is one sample of v_k' H_m v_k; the error is their spread."""
    params, batches = softmax_table.make_params(), softmax_table.make_batches(5, 4)
    flat, unravel = ravel_pytree(params)
    vectors_KxP = jax.random.normal(jax.random.key(2), (3, flat.size), flat.dtype)
    directions = jax.vmap(unravel)(vectors_KxP)
    found = curvature_along(softmax_table.loss_fn, params, batches, directions)
    one_each = jax.tree.map(lambda x: x[:, None], batches)
    hessians_MxPxP = jax.lax.map(lambda b: softmax_table.dense_hessian(params, b), one_each)
    weights_M = batches["weights"].sum(axis=1)
    for k, vector_P in enumerate(vectors_KxP):
        forms_M = weights_M * jnp.einsum("i,mij,j->m", vector_P, hessians_MxPxP, vector_P)
        expected = ratio_estimate(forms_M, weights_M, "sentences")
        np.testing.assert_allclose(found.mean[k], expected.mean, rtol=1e-8)
        np.testing.assert_allclose(found.sem[k], expected.sem, rtol=1e-8)
    assert (found.num_samples, found.over) == (5, "sentences")


@jax.custom_vjp
def half_square(x):
    return x**2 / 2


half_square.defvjp(lambda x: (x**2 / 2, x), lambda x, slope: (slope * x,))


def test_a_loss_with_its_own_reverse_rule_has_no_forward_only_form():
    def loss_fn(params, batch):
        return jnp.sum(batch * half_square(params)), jnp.asarray(1.0)

    scales = jnp.asarray([[1.0, 2.0, 4.0], [0.5, 0.0, -1.5]])
    args = loss_fn, jnp.ones(3), scales, jax.random.key(0)
    terms = hessian_trace_terms(*args, num_probes=1)
    np.testing.assert_allclose(terms.total().mean, scales.sum() / 2, rtol=1e-12)
    with pytest.raises(NotImplementedError, match="custom_lin"):
        hessian_trace(*args, num_probes=1)


def test_sixteen_bit_parameters_get_products_in_float32():
    def loss_fn(params, batch):
        return jnp.sum(batch * params**2) / 2, jnp.asarray(2.0)

    params = jnp.ones(3, jnp.bfloat16)
    scales = jnp.asarray([[1, 2, 3], [0, 1, 0.001]], jnp.float32)
    product = hessian_vector_product(loss_fn, params, scales, params)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, [0.25, 0.75, 3.001 / 4], rtol=1e-6)
