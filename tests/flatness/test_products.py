import jax
import jax.numpy as jnp
import numpy as np
import tiny_masked_lm as lm
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import (
    fisher_vector_product,
    gauss_newton_quadratic_form,
    gauss_newton_vector_product,
    hessian_vector_product,
)


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


def test_gauss_newton_vector_product_equals_the_dense_one():
    params, batches, vector = problem()
    expected = lm.dense_gauss_newton(params, batches) @ ravel_pytree(vector)[0]
    product = gauss_newton_vector_product(lm.log_probs_fn, params, batches, vector)
    atol = 1e-8 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(ravel_pytree(product)[0], expected, atol=atol)


def test_fisher_vector_product_equals_a_sum_over_predictions():
    """By one gradient for every prediction, with the labels given."""
    params, batches, vector = problem()
    labels = jax.random.randint(jax.random.key(6), batches["weights"].shape, 0, lm.V)
    flat, unravel = ravel_pytree(params)
    batch, labels_BxM = lm.merge(batches), labels.reshape(-1, labels.shape[-1])

    def of_labels(flat):
        log_probs = lm.log_probs_fn(unravel(flat), batch)[0]
        return jnp.take_along_axis(log_probs, labels_BxM[..., None], axis=-1).ravel()

    scores_NxP, weights_N = jax.jit(jax.jacrev(of_labels))(flat), batch["weights"].ravel()
    fisher = jnp.einsum("n,ni,nj->ij", weights_N, scores_NxP, scores_NxP) / weights_N.sum()
    product = fisher_vector_product(lm.log_probs_fn, params, batches, labels, vector)
    expected = fisher @ ravel_pytree(vector)[0]
    atol = 1e-8 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(ravel_pytree(product)[0], expected, atol=atol)


def test_sixteen_bit_parameters_get_products_in_float32():
    def loss_fn(params, batch):
        return jnp.sum(batch * params**2) / 2, jnp.asarray(2.0)

    params = jnp.ones(3, jnp.bfloat16)
    scales = jnp.asarray([[1, 2, 3], [0, 1, 0.001]], jnp.float32)
    product = hessian_vector_product(loss_fn, params, scales, params)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, [0.25, 0.75, 3.001 / 4], rtol=1e-6)
