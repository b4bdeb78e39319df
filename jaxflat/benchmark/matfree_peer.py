"""Traces with standard errors by matfree (Krämer), for the same matrices and products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from matfree import stochtrace

Estimator = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # key -> mean, standard error


def hutchinson(matrix_PxP: np.ndarray, num_products: int) -> tuple[Estimator, int]:
    """Return Hutchinson's estimator, with one product for each sign vector, and their number."""
    like_P = jnp.zeros(len(matrix_PxP), matrix_PxP.dtype)
    estimate = stochtrace.estimator_monte_carlo_mean_and_sem(
        stochtrace.monte_carlo_trace(), stochtrace.sampler_signs(like_P, num=num_products)
    )
    return lambda key: estimate(lambda v: jnp.asarray(matrix_PxP) @ v, key), num_products


def xtrace(matrix_PxP: np.ndarray, num_products: int) -> tuple[Estimator, int]:
    """Return XTrace (Epperly, Tropp & Webber, 2024) and its vectors' number, half the products.

    Vectors lie on the sphere, as its rescaling of residuals requires.
    """
    like_P = jnp.zeros(len(matrix_PxP), matrix_PxP.dtype)
    num_vectors = num_products // 2
    estimate = stochtrace.estimator_leave_one_out_mean_and_sem(
        stochtrace.leave_one_out_xtrace(), stochtrace.sampler_sphere(like_P, num=num_vectors)
    )
    return lambda key: estimate(lambda v: jnp.asarray(matrix_PxP) @ v, key), num_vectors


ESTIMATORS = {"Hutchinson": hutchinson, "XTrace": xtrace}
