"""How much the loss rises, against closed forms, other samplers and other optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import brentq

from jaxflat.flatness import (
    average_sharpness,
    critical_sharpness,
    fisher_trace_terms,
    mean_loss,
    worst_sharpness,
)
from tests.support import softmax_table
from tests.support import tiny_masked_lm as lm

RNG = np.random.default_rng(0)
ROOT_PxP = RNG.normal(size=(6, 6))
CURVATURE_PxP = ROOT_PxP @ ROOT_PxP.T
PARAMS_P = RNG.normal(size=6)


@pytest.fixture(scope="module")
def key():
    return jax.random.key(5)


def quadratic(params, batch):
    """A loss sum over two predictions a microbatch, of mean (1 + batch) theta' A theta / 2."""
    return (1 + batch) * params @ CURVATURE_PxP @ params, jnp.asarray(2.0)


BATCHES_M = np.asarray([-0.5, 0.0, 0.5])  # the mean loss over them is theta' A theta / 2


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_over_a_quadratic_is_half_the_trace(key, adaptive):
    options = {"sigma": 0.3, "num_probes": 4000, "adaptive": adaptive, "over": "probes"}
    found = average_sharpness(quadratic, PARAMS_P, BATCHES_M, key, probes_per_pass=500, **options)
    scales_P = jnp.abs(PARAMS_P) if adaptive else jnp.ones(6)
    truth = 0.3**2 / 2 * jnp.sum(scales_P**2 * jnp.diag(CURVATURE_PxP))
    assert abs(found.mean - truth) < 3 * found.sem
    assert found.sem < 0.03 * truth


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.slow
def test_average_over_a_model_equals_plain_sampling(key, adaptive):
    """Large perturbations, beyond any expansion; NumPy's random numbers, no pairs."""
    params, batches = softmax_table.make_params(), softmax_table.make_batches(3, 8)
    flat_P, unravel = ravel_pytree(params)
    merged = jax.tree.map(lambda x: x.reshape(-1), batches)

    @jax.jit
    def loss(flat_P):
        loss_sum, weight = softmax_table.loss_fn(unravel(flat_P), merged)
        return loss_sum / weight

    scales_P = np.abs(np.asarray(flat_P)) if adaptive else np.ones(flat_P.size)
    noise_NxP = np.random.default_rng(1).normal(size=(20_000, flat_P.size)) * scales_P
    rises_N = np.asarray(jax.vmap(loss)(flat_P[None] + 1.5 * noise_NxP)) - float(loss(flat_P))
    args = softmax_table.loss_fn, params, batches, key
    options = {"sigma": 1.5, "num_probes": 2000, "adaptive": adaptive, "over": "probes"}
    found = average_sharpness(*args, probes_per_pass=500, **options)
    sem = np.hypot(found.sem, rises_N.std(ddof=1) / len(rises_N) ** 0.5)
    assert abs(found.mean - rises_N.mean()) < 3 * sem
    assert sem < 0.05 * rises_N.mean()


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_goes_along_the_gradient(adaptive):
    def linear(params, batch):
        return batch * 3 * (np.arange(6.0) @ params), jnp.asarray(3.0)

    slopes_P = np.arange(6.0) * (np.abs(PARAMS_P) if adaptive else 1)
    batches_M = np.asarray([1.0, 2.0])
    found = worst_sharpness(linear, PARAMS_P, batches_M, radius=0.1, adaptive=adaptive)
    np.testing.assert_allclose(found.mean, 0.1 * np.linalg.norm(slopes_P) * 1.5, rtol=1e-10)
    assert (found.num_samples, found.over) == (2, "sentences")


def test_ascent_finds_the_highest_point_of_a_ball():
    """By the multiplier of the constraint: (mu - A) u = A theta with |u| = radius."""
    values_P, vectors_PxP = np.linalg.eigh(CURVATURE_PxP)
    slope_P, radius = vectors_PxP.T @ np.asarray(CURVATURE_PxP @ PARAMS_P), 0.7

    def offset_P(mu):
        return slope_P / (mu - values_P)

    top = values_P[-1]
    mu = brentq(lambda mu: np.linalg.norm(offset_P(mu)) - radius, top * (1 + 1e-12), top + 1e6)
    best = slope_P @ offset_P(mu) + offset_P(mu) ** 2 @ values_P / 2
    args = quadratic, PARAMS_P, np.zeros(1)
    one, many = (worst_sharpness(*args, radius=radius, num_steps=k).mean for k in (1, 50))
    assert one < many <= best * (1 + 1e-9)
    np.testing.assert_allclose(many, best, rtol=1e-3)


def test_critical_sharpness_of_a_quadratic_is_its_curvature_along_the_update():
    gradient_P = CURVATURE_PxP @ PARAMS_P
    truth = gradient_P @ CURVATURE_PxP @ gradient_P / (gradient_P @ gradient_P)
    for first in (1e-4, 1.0, 1e4):
        found = critical_sharpness(quadratic, PARAMS_P, BATCHES_M, -gradient_P, first=first)
        np.testing.assert_allclose(found.mean, truth, rtol=1e-3)


def test_the_error_of_critical_sharpness_is_the_spread_over_resampled_microbatches():
    """Rises eta b_m + eta^2 a_m / 2 of weight w_m give 2 / eta = -sum(w a) / sum(w b)."""
    rng = np.random.default_rng(2)
    weights_M = rng.integers(1, 5, size=400).astype(float)
    slopes_M, curvatures_M = -2 + rng.normal(size=400), 3 + rng.normal(size=400)
    batches = {"weight": weights_M, "slope": slopes_M, "curvature": curvatures_M}

    def loss_fn(params, batch):
        rise = batch["slope"] * params + batch["curvature"] * params**2 / 2
        return batch["weight"] * (7 + rise), batch["weight"]

    found = critical_sharpness(loss_fn, jnp.asarray(0.0), batches, jnp.asarray(1.0))
    truth = -(weights_M @ curvatures_M) / (weights_M @ slopes_M)
    np.testing.assert_allclose(found.mean, truth, rtol=1e-3)
    assert (found.num_samples, found.over) == (400, "sentences")
    counts_RxM = rng.multinomial(400, np.full(400, 1 / 400), size=20_000)
    repeated_R = -(counts_RxM @ (weights_M * curvatures_M)) / (counts_RxM @ (weights_M * slopes_M))
    spread = repeated_R.std(ddof=1)
    # A standard deviation of 20,000 numbers is known to 0.5%.
    np.testing.assert_allclose(found.sem, spread, rtol=0.02)


def test_the_mean_loss_has_the_error_of_its_microbatches():
    batches = {"loss_sum": np.asarray([3.0, 1.0, 8.0]), "weight": np.asarray([2.0, 1.0, 3.0])}
    found = mean_loss(lambda p, b: (p * b["loss_sum"], b["weight"]), np.asarray(2.0), batches)
    residuals_M = 2 * batches["loss_sum"] - 4 * batches["weight"]  # the mean loss is 2 * 12 / 6
    sem = np.sqrt(3 / 2 * np.sum(residuals_M**2)) / 6
    np.testing.assert_allclose([found.mean, found.sem], [4, sem], rtol=1e-12)
    assert (found.num_samples, found.over) == (3, "sentences")


@pytest.mark.parametrize(("sign", "message"), [(1, "fall"), (0, "rise")])
def test_no_bracket_is_an_error(sign, message):
    update_P = sign * (CURVATURE_PxP @ PARAMS_P)
    with pytest.raises(ValueError, match=f"the loss does not {message} at any step"):
        critical_sharpness(quadratic, PARAMS_P, BATCHES_M, update_P)


def rescaled(params, factor: float):
    """The same function: the last block's values times a factor, its readers divided by it."""
    factors_3 = jnp.asarray([1.0, 1.0, factor])
    last, attention = params["last"], params["last"]["attention"]
    qkv, out = attention["qkv"], attention["out"]
    kernel, bias = qkv["kernel"] * factors_3[None, :, None], qkv["bias"] * factors_3[:, None]
    attention = {
        "qkv": {"kernel": kernel, "bias": bias},
        "out": {"kernel": out["kernel"] / factor, "bias": out["bias"]},
    }
    return {**params, "last": {**last, "attention": attention}}


@pytest.mark.slow
def test_a_rescaling_moves_the_plain_trace_as_predicted_and_no_adaptive_measure(key):
    params, batches = lm.make_params(), lm.make_batches(4, 4)
    factor = 3.0
    moved = rescaled(params, factor)
    batch = lm.merge(batches)
    before, after = (lm.logits_fn(p, batch) for p in (params, moved))
    np.testing.assert_allclose(after, before, atol=1e-12)

    # theta' = s theta, so H' = H / (s s'), and every diagonal entry is divided by s squared.
    shrunk = jax.tree.map(lambda s: s**-2, rescaled(jax.tree.map(jnp.ones_like, params), factor))
    diagonal_P = jnp.diag(lm.dense_hessian(params, batches))
    predicted = jnp.sum(diagonal_P * ravel_pytree(shrunk)[0])
    np.testing.assert_allclose(jnp.trace(lm.dense_hessian(moved, batches)), predicted, rtol=1e-10)
    # A Fisher sample needs labels and gradients alone: it moves exactly, draw by draw.
    before, after = (
        fisher_trace_terms(lm.log_probs_fn, p, batches, key, num_samples=8).by_block(str)
        for p in (params, moved)
    )
    for path, estimate in before.items():
        if "last/attention/qkv" not in path:  # of these only the values have moved
            ratio = factor**2 if path == "last/attention/out/kernel" else 1
            np.testing.assert_allclose(after[path].mean, ratio * estimate.mean, rtol=1e-9)

    def measures(params, adaptive):
        average = average_sharpness(
            lm.loss_fn, params, batches, key, sigma=0.1, num_probes=8, adaptive=adaptive
        )
        worst = worst_sharpness(
            lm.loss_fn, params, batches, radius=0.1, num_steps=5, adaptive=adaptive
        )
        return np.asarray([average.mean, worst.mean])

    np.testing.assert_allclose(measures(moved, True), measures(params, True), rtol=1e-9)
    assert (np.abs(measures(moved, False) / measures(params, False) - 1) > 0.01).all()
