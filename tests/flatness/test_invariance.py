"""Microbatches, padding, passes and devices do not change an estimate."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxflat import flatness
from jaxflat.flatness.sampling import draw_labels, signed_score_sampler
from tests.support import softmax_table
from tests.support import tiny_masked_lm as lm
from tests.support.counts import in_full

KEY = jax.random.key(3)


def test_labels_do_not_depend_on_microbatches():
    log_probs_BxMxV = jax.nn.log_softmax(jax.random.normal(KEY, (8, 2, 6)))
    labels = partial(draw_labels, KEY)
    halves = [labels(log_probs_BxMxV[i : i + 4], i) for i in (0, 4)]
    whole = labels(log_probs_BxMxV, 0)
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))
    assert len(set(whole.ravel().tolist())) > 1


def test_labels_follow_the_predictions():
    log_probs = jnp.log(jnp.asarray([0.5, 0.3, 0.2, 0.0]))
    labels = draw_labels(KEY, jnp.broadcast_to(log_probs, (20_000, 4)), jnp.asarray(0))
    np.testing.assert_allclose(
        jnp.bincount(labels, length=4) / 20_000, [0.5, 0.3, 0.2, 0], atol=0.015
    )


def sampled(problem, params, batches, over, per_pass):
    """All estimates from 6 draws, `per_pass` draws in one pass."""
    args, how = (params, batches, KEY), {"over": over}
    probes = how | {"num_probes": 6, "probes_per_pass": per_pass}
    draws = how | {"num_samples": 6, "samples_per_pass": per_pass}
    return {
        "H": flatness.hessian_trace(problem.loss_fn, *args, **probes),
        "G": flatness.gauss_newton_trace(problem.log_probs_fn, *args, **probes),
        "F": flatness.fisher_trace(problem.log_probs_fn, *args, **draws),
        "sharpness": flatness.average_sharpness(problem.loss_fn, *args, sigma=0.5, **probes),
    }


def exact(problem, params, batches):
    """The numbers that are means over predictions."""
    args = params, batches, params
    return {
        "loss": flatness.mean_loss(problem.loss_fn, params, batches).mean,
        "Hv": ravel_pytree(flatness.hessian_vector_product(problem.loss_fn, *args))[0],
        "Gv": ravel_pytree(flatness.gauss_newton_vector_product(problem.log_probs_fn, *args))[0],
    }


def eigenvalues(problem, params, batches):
    args, how = (params, batches, KEY), {"num_largest": 2, "num_smallest": 1, "num_steps": 12}
    found = [
        *flatness.hessian_extremes(problem.loss_fn, *args, **how),
        *flatness.gauss_newton_extremes(problem.log_probs_fn, *args, **how),
    ]
    return [pairs.values_k for pairs in found]


def assert_same(found, expected):
    """To 1e-10, in float64."""
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize(
    ("problem", "measure"),
    [
        (softmax_table, exact),
        pytest.param(softmax_table, eigenvalues, marks=pytest.mark.slow),
        pytest.param(lm, exact, marks=pytest.mark.slow),
        *in_full(pytest.param(lm, eigenvalues, marks=pytest.mark.slow)),
    ],
)
def test_microbatches_change_no_mean(problem, measure):
    check_microbatches(problem, lambda params, batches, _: measure(problem, params, batches))


@pytest.mark.parametrize("problem", [softmax_table, *in_full(lm)])
@pytest.mark.slow
def test_microbatches_change_no_sample(problem):
    """Except for the Fisher trace: each microbatch squares its gradient, at the same labels."""

    def measure(params, batches, per_pass):
        estimates = sampled(problem, params, batches, "probes", per_pass)
        del estimates["F"]
        return estimates

    check_microbatches(problem, measure)


def check_microbatches(problem, measure):
    """Twelve sentences as one, two or three microbatches of unequal weight."""
    params, batches = problem.make_params(), problem.make_batches(3, 4)
    weights_3 = batches["weights"].reshape(3, -1).sum(axis=1)
    assert len(set(weights_3.tolist())) > 1
    measure = jax.jit(measure, static_argnums=2)
    expected = measure(params, batches, 1)
    for shape in (1, 12), (2, 6):
        cut = jax.tree.map(lambda x, s=shape: x.reshape(*s, *x.shape[2:]), batches)
        assert_same(measure(params, cut, 4), expected)


@pytest.mark.slow
def test_probes_per_pass_changes_nothing():
    measure = jax.jit(partial(sampled, softmax_table), static_argnums=(2, 3))
    params, batches = softmax_table.make_params(), softmax_table.make_batches(3, 4)
    args = params, batches, "probes+sentences"
    assert_same(measure(*args, 4), measure(*args, 1))


@pytest.mark.slow
def test_padding_changes_nothing():
    """Three words of padding, in a tiny model with three more positions."""
    model = lm.MODEL.clone(max_length=lm.T + 3)

    def log_probs_fn(params, batch):
        inputs = batch["tokens"], batch["lengths"], batch["positions"]
        return jax.nn.log_softmax(model.apply({"params": params}, *inputs)[0]), batch["weights"]

    def loss_fn(params, batch):
        log_probs, weights = log_probs_fn(params, batch)
        return -jnp.sum(weights[..., None] * batch["targets"] * log_probs), weights.sum()

    batches = lm.make_batches(2, 4)
    first = jax.tree.map(lambda x: x[0], batches)
    inputs = first["tokens"], first["lengths"], first["positions"]
    shapes = jax.eval_shape(model.init, KEY, *inputs)["params"]
    params = jax.tree.map(lambda x: 0.5 * np.random.default_rng(0).normal(size=x.shape), shapes)
    padded = jnp.pad(batches["tokens"], ((0, 0), (0, 0), (0, 3)), constant_values=lm.V)
    problem = SimpleNamespace(loss_fn=loss_fn, log_probs_fn=log_probs_fn)

    @jax.jit
    def measure(batches):
        args = problem, params, batches
        return sampled(*args, "probes", 6), exact(*args)

    assert_same(measure(batches | {"tokens": padded}), measure(batches))


TRACES = {
    "hessian": (flatness.hessian_trace_samples, "loss_fn", {"num_probes": 4}),
    "hessian by leaf": (flatness.hessian_trace_terms, "loss_fn", {"num_probes": 4}),
    "gauss_newton": (flatness.gauss_newton_trace_samples, "log_probs_fn", {"num_probes": 4}),
    "fisher": (flatness.fisher_trace_terms, "log_probs_fn", {"num_samples": 4}),
}


@pytest.mark.parametrize(
    ("problem", "trace"),
    [
        *((softmax_table, trace) for trace in TRACES),
        *(
            pytest.param(lm, trace, marks=pytest.mark.slow)
            for trace in ("hessian by leaf", "fisher", *in_full("hessian", "gauss_newton"))
        ),
    ],
)
def test_eight_devices_give_what_one_gives(problem, trace):
    single = partial(jax.tree.map, lambda x: x.astype(jnp.float32) if x.dtype == float else x)
    params, batches = single(problem.make_params()), single(problem.make_batches(2, 8))
    terms_fn, function, options = TRACES[trace]
    function = getattr(problem, function)
    one = terms_fn(function, params, batches, KEY, **options).total()

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "data")))
    estimate = jax.jit(partial(terms_fn, function, **options))
    compiled = estimate.lower(params, batches, KEY).compile()
    eight = compiled(params, batches, KEY).total()
    assert "all-reduce" in compiled.as_text()
    assert eight.mean.dtype == jnp.float32
    np.testing.assert_allclose(eight.mean, one.mean, rtol=1e-4)
    np.testing.assert_allclose(eight.sem, one.sem, rtol=1e-3)


def test_signs_give_the_fisher_matrix_and_no_draw_misses_a_rare_word():
    """Four logits are the parameters: F = diag(p) - p p'. Word 3 has probability 1e-6."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2 - 1e-6, 1e-6]))
    probs = jax.nn.softmax(logits)

    def log_probs_fn(params, batch):
        return jnp.broadcast_to(jax.nn.log_softmax(params), (len(batch), 4)), jnp.ones(len(batch))

    score_fn, weight = signed_score_sampler(log_probs_fn, logits, jnp.asarray(2), jnp.zeros(1))
    assert weight == 1
    scores_NxV = jax.jit(jax.vmap(score_fn))(jax.random.split(KEY, 20_000))
    products_NxVxV = scores_NxV[:, :, None] * scores_NxV[:, None]
    error_VxV = products_NxVxV.std(0) / 20_000**0.5 + 1e-7
    fisher_VxV = jnp.diag(probs) - probs[:, None] * probs[None]
    assert np.abs((products_NxVxV.mean(0) - fisher_VxV) / error_VxV).max() < 4.5
    # The gradient of word 3 by its own logit is +-sqrt(p) in every draw, up to p.
    np.testing.assert_allclose(jnp.abs(scores_NxV[:, 3]), 1e-3, rtol=2e-3)


def test_signs_depend_on_the_global_index_alone():
    def log_probs_fn(params, batch):
        return jax.nn.log_softmax(params[None] * batch[:, None]), jnp.ones(len(batch))

    params, batch_B = jnp.arange(3.0), jnp.linspace(0.5, 1.5, 6)
    whole, _ = signed_score_sampler(log_probs_fn, params, jnp.asarray(0), batch_B)
    halves = [
        signed_score_sampler(log_probs_fn, params, jnp.asarray(i), batch_B[3 * i : 3 * i + 3])[0]
        for i in range(2)
    ]
    summed = jax.jit(lambda key: sum(half(key) for half in halves))
    np.testing.assert_allclose(jax.jit(whole)(KEY), summed(KEY), rtol=1e-5)
