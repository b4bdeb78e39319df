import jax
import jax.numpy as jnp
import numpy as np
import tiny_masked_lm as lm
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import gauss_newton_quadratic_form, hessian_vector_product


def problem():
    params, batches = lm.make_params(), lm.make_batches(3, 4)
    assert len(set(batches["weights"].sum((1, 2)).tolist())) > 1  # unequal microbatches
    assert len(set(batches["lengths"].ravel().tolist())) > 2  # ragged sentences
    flat, unravel = ravel_pytree(params)
    return params, batches, unravel(jax.random.normal(jax.random.key(5), flat.shape, flat.dtype))


def test_hessian_vector_product_equals_the_dense_one():
    params, batches, vector = problem()
    expected = lm.dense_hessian(params, batches) @ ravel_pytree(vector)[0]
    product = ravel_pytree(hessian_vector_product(lm.loss_fn, params, batches, vector))[0]
    np.testing.assert_allclose(product, expected, atol=1e-8 * float(jnp.abs(expected).max()))


def test_gauss_newton_quadratic_form_equals_the_dense_one():
    params, batches, vector = problem()
    flat = ravel_pytree(vector)[0]
    expected = flat @ lm.dense_gauss_newton(params, batches) @ flat
    form = gauss_newton_quadratic_form(lm.log_probs_fn, params, batches, vector)
    np.testing.assert_allclose(form, expected, rtol=1e-8)


def test_sixteen_bit_parameters_get_products_in_float32():
    def loss_fn(params, batch):
        return jnp.sum(batch * params**2) / 2, jnp.asarray(2.0)

    params = jnp.ones(3, jnp.bfloat16)
    scales = jnp.asarray([[1, 2, 3], [0, 1, 0.001]], jnp.float32)
    product = hessian_vector_product(loss_fn, params, scales, params)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, [0.25, 0.75, 3.001 / 4], rtol=1e-6)
