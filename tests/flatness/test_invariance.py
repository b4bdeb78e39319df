"""How the work is divided, into microbatches, passes or devices, does not change an estimate."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import softmax_table
import tiny_masked_lm as lm
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxflat import flatness
from jaxflat.flatness.sampling import draw_labels

KEY = jax.random.key(3)


def test_labels_do_not_depend_on_microbatches():
    params, batches = lm.make_params(), lm.make_batches(2, 4)

    @jax.jit
    def labels(batch, first_example):
        return draw_labels(KEY, lm.log_probs_fn(params, batch)[0], first_example)

    whole = labels(lm.merge(batches), 0)
    halves = [labels(jax.tree.map(lambda x, m=m: x[m], batches), 4 * m) for m in range(2)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))
    assert len(set(whole.ravel().tolist())) > 1


def test_labels_follow_the_predictions():
    log_probs = jnp.log(jnp.asarray([0.5, 0.3, 0.2, 0.0]))
    labels = draw_labels(KEY, jnp.broadcast_to(log_probs, (20_000, 4)), jnp.asarray(0))
    np.testing.assert_allclose(
        jnp.bincount(labels, length=4) / 20_000, [0.5, 0.3, 0.2, 0], atol=0.015
    )


@pytest.mark.parametrize("over", ["probes", "probes+sentences"])
def test_probes_per_pass_changes_nothing(over):
    params, batches = softmax_table.make_params(), softmax_table.make_batches(3, 4)
    one, four = (
        flatness.hessian_trace(
            softmax_table.loss_fn, params, batches, KEY, num_probes=6, over=over, probes_per_pass=k
        )
        for k in (1, 4)
    )
    np.testing.assert_allclose(one.mean, four.mean, rtol=1e-10)
    np.testing.assert_allclose(one.sem, four.sem, rtol=1e-10)


@pytest.mark.parametrize("trace", ["hessian", "fisher"])
@pytest.mark.parametrize("problem", [softmax_table, pytest.param(lm, marks=pytest.mark.slow)])
def test_eight_devices_give_what_one_gives(problem, trace):
    single = partial(jax.tree.map, lambda x: x.astype(jnp.float32) if x.dtype == float else x)
    params, batches = single(problem.make_params()), single(problem.make_batches(2, 8))
    if trace == "hessian":
        estimate_fn, function = flatness.hessian_trace, problem.loss_fn
        options = {"num_probes": 4}
    else:
        estimate_fn, function = flatness.fisher_trace, problem.log_probs_fn
        options = {"num_samples": 4}
    one = estimate_fn(function, params, batches, KEY, **options)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "data")))
    compiled = estimate_fn.lower(function, params, batches, KEY, **options).compile()
    eight = compiled(params, batches, KEY)
    assert "all-reduce" in compiled.as_text()
    assert eight.mean.dtype == jnp.float32
    np.testing.assert_allclose(eight.mean, one.mean, rtol=1e-4)
    np.testing.assert_allclose(eight.sem, one.sem, rtol=1e-3)
