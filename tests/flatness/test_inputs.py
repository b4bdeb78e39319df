"""Inputs that do not fit end in one line that says what to do, before anything is computed."""

import inspect
import logging
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat import flatness
from jaxflat.flatness import from_mean_loss, hessian_trace
from tests.support import softmax_table as table

KEY = jax.random.key(0)
PARAMS = {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)}
X_MxBxD = np.linspace(-1, 1, 160, dtype=np.float32).reshape(5, 8, 4)
Y_MxB = np.arange(40).reshape(5, 8) % 3
BATCHES = (X_MxBxD, Y_MxB)


def log_probs_fn(params, batch):
    inputs, labels = batch
    log_probs = jax.nn.log_softmax(inputs @ params["w"] + params["b"][None])
    return log_probs, jnp.ones(labels.shape, jnp.float32)


def losses_of(params, batch):
    log_probs, _ = log_probs_fn(params, batch)
    return -jnp.take_along_axis(log_probs, batch[1][:, None], axis=1)[:, 0]


def loss_fn(params, batch, weight=lambda batch: jnp.float32(8)):
    return losses_of(params, batch).sum(), weight(batch)


def trace(loss_fn, params=PARAMS, batches=BATCHES, **options):
    return hessian_trace(loss_fn, params, batches, KEY, **{"num_probes": 2, **options})


def fisher(log_probs_fn, params=PARAMS, batches=BATCHES, num_samples=2):
    return flatness.fisher_trace(log_probs_fn, params, batches, KEY, num_samples=num_samples)


def weighted(weight):
    return partial(loss_fn, weight=weight)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(3)(inputs)


MODULE = Dense()
VARIABLES = MODULE.init(KEY, X_MxBxD[0])


def cross_entropy(logits, batch):
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, batch[1][:, None], axis=1).sum(), 8.0


def of_params(params, batch):
    return cross_entropy(MODULE.apply({"params": params}, batch[0]), batch)


def of_variables(variables, batch):
    return cross_entropy(MODULE.apply(variables, batch[0]), batch)


def of_bound_module(params, batch):
    return cross_entropy(MODULE.apply(VARIABLES, batch[0]), batch)


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    """A module that is itself a pytree, as in Equinox: its activation is a leaf, too."""

    kernel: Any
    activation: Any

    def __call__(self, params, batch):
        return cross_entropy(self.activation(batch[0] @ params.kernel), batch)


LAYER = Layer(PARAMS["w"], jax.nn.relu)
ONLY_ARRAYS = r"; pass only floating-point arrays and let the function add the rest \(Flax: "
NO_MICROBATCHES = r"batches has no leading axis of microbatches: \w+ takes it whole; cut it into M"
A_PAIR = r"loss_fn must return two scalars \(loss_sum, weight\); it returned "
LOG_PROBS = r"log_probs_fn must return log-probabilities \(..., V\), with an axis of examples, and "
FIRST = (X_MxBxD[0], Y_MxB[0])

MISTAKES = {
    "a mean loss": (
        lambda: trace(lambda p, b: losses_of(p, b).mean()),
        A_PAIR + r"one scalar; if it is the mean over a batch, pass "
        r"jaxflat.flatness.from_mean_loss\(loss_fn, num_predictions\)",
    ),
    "a vector": (lambda: trace(losses_of), A_PAIR + r"shapes \(8,\); sum over the predictions"),
    "losses not summed": (
        lambda: trace(lambda p, b: (losses_of(p, b), 8.0)),
        A_PAIR + r"shapes \(\(8,\), \(\)\); sum over the predictions",
    ),
    "no microbatches": (lambda: trace(loss_fn, batches=FIRST), NO_MICROBATCHES),
    "no microbatches, labels": (lambda: fisher(log_probs_fn, batches=FIRST), NO_MICROBATCHES),
    "a list of microbatches": (
        lambda: trace(loss_fn, batches=[FIRST, FIRST]),
        r"batches is a list of microbatches; stack it: jax.tree.map\(lambda \*leaves: jnp.stack",
    ),
    "a loader": (
        lambda: trace(loss_fn, batches=zip(X_MxBxD, Y_MxB, strict=True)),
        r"batches is a zip, not an array; stack the microbatches: jax.tree.map\(lambda \*leaves",
    ),
    "axes that disagree": (
        lambda: trace(loss_fn, batches=(X_MxBxD, Y_MxB[:4])),
        "the leading axis of batches/0 has 5 entries, that of batches/1 4: every leaf must have",
    ),
    "a scalar in a batch": (
        lambda: trace(loss_fn, batches=(X_MxBxD, np.asarray(1))),
        "batches/1 is a scalar; every leaf needs an axis of microbatches",
    ),
    "a number as key": (
        lambda: hessian_trace(loss_fn, PARAMS, (X_MxBxD, Y_MxB), 0, num_probes=1),
        r"key must be a key such as jax.random.key\(0\), not 0",
    ),
    "no data": (lambda: trace(loss_fn, batches=()), "batches holds no microbatch"),
    "wrapped parameters": (
        lambda: trace(of_params, VARIABLES),
        r"params is wrapped: loss_fn takes params\['params'\]",
    ),
    "unwrapped parameters": (
        lambda: trace(of_variables, VARIABLES["params"]),
        r"params is not wrapped: loss_fn takes \{'params': params\}",
    ),
    "a bound module": (lambda: trace(of_params, MODULE.bind(VARIABLES)), "params is a Dense, not "),
    "a loss of a bound module": (
        lambda: trace(of_bound_module, VARIABLES["params"]),
        r"loss_fn does not use params: its curvature is 0 \(is its module already bound to",
    ),
    "a compiled loss of a bound module": (
        lambda: trace(jax.jit(of_bound_module), VARIABLES["params"]),
        r"loss_fn does not use params: its curvature is 0 \(is its module already bound to",
    ),
    "module.apply as a loss": (
        lambda: trace(MODULE.apply, VARIABLES, X_MxBxD),
        A_PAIR + r"shapes \(8, 3\); sum over the predictions of a microbatch",
    ),
    "running statistics": (
        lambda: trace(of_variables, {**VARIABLES, "batch_stats": {"mean": jnp.zeros(3)}}),
        r"params holds all variables of a Flax module; pass variables\['params'\] and let",
    ),
    "a module with functions": (
        lambda: trace(of_params, LAYER),
        r"params/activation is a \w+, not an array" + ONLY_ARRAYS,
    ),
    "the same at the end of a path": (
        lambda: flatness.loss_barrier(of_params, PARAMS, LAYER, BATCHES, num_points=3),
        r"end/activation is a \w+, not an array" + ONLY_ARRAYS,
    ),
    "the same in critical_sharpness": (
        lambda: flatness.critical_sharpness(of_params, LAYER, BATCHES, LAYER),
        r"params/activation is a \w+, not an array" + ONLY_ARRAYS,
    ),
    "a module as a loss": (
        lambda: trace(LAYER),
        "loss_fn must be a function without arrays of its own, not a Layer: pass arrays as params",
    ),
    "a counter among the parameters": (
        lambda: trace(loss_fn, {**PARAMS, "step": np.asarray(3)}),
        "params/step has dtype int64" + ONLY_ARRAYS,
    ),
    "no parameters": (lambda: trace(loss_fn, {}), "params has no arrays; pass the parameters that"),
    "weight zero": (lambda: trace(weighted(lambda _: 0)), "weights that loss_fn returns sum to 0 "),
    "weight nan": (
        lambda: trace(weighted(lambda _: jnp.nan)),
        "the weights that loss_fn returns sum to nan over all microbatches; they must be the "
        "numbers of predictions",
    ),
    "negative weight": (lambda: trace(weighted(lambda _: -1.0)), "loss_fn returns sum to -5 over"),
    "complex weight": (lambda: trace(weighted(lambda _: 1j)), "loss_fn must return a real weight"),
    "a weight a prediction": (
        lambda: trace(weighted(lambda batch: jnp.ones(8))),
        A_PAIR + r"shapes \(\(\), \(8,\)\); sum over the predictions",
    ),
    "a number of errors": (
        lambda: trace(lambda p, b: (log_probs_fn(p, b)[0].argmax(), 8.0)),
        "loss_fn must return a floating loss_sum; it returned int",
    ),
    "log-probabilities of labels": (
        lambda: fisher(lambda p, b: (losses_of(p, b), jnp.ones(8))),
        LOG_PROBS + r"weights \(...\); it returned shapes \(\(8,\), \(8,\)\)",
    ),
    "logits": (
        lambda: fisher(lambda p, b: (b[0] @ p["w"], jnp.ones(8))),
        r"log_probs_fn must return log-probabilities, which sum to 1; the log of a sum is [\d.]+ "
        "away from 0: apply jax.nn.log_softmax to the logits",
    ),
    "one-hot labels": (
        lambda: flatness.fisher_vector_product(
            log_probs_fn, PARAMS, BATCHES, np.ones((5, 8, 3)), PARAMS
        ),
        r"labels must be integers, one a prediction: \(8,\) in a microbatch, not float64 \(8, 3\)",
    ),
    "labels in one axis": (
        lambda: flatness.fisher_vector_product(
            log_probs_fn, PARAMS, BATCHES, Y_MxB.reshape(-1), PARAMS
        ),
        "the leading axis of labels has 40 entries, that of batches/0 5",
    ),
    "another vector": (
        lambda: flatness.hessian_vector_product(loss_fn, PARAMS, BATCHES, PARAMS["w"]),
        "vector must be shaped like params",
    ),
    "no probes": (
        lambda: trace(loss_fn, num_probes=0),
        "num_probes must be a whole number of at least 1, not 0",
    ),
    "half a probe": (
        lambda: trace(loss_fn, num_probes=2.5),
        "num_probes must be a whole number of at least 1, not 2.5",
    ),
    "no number of probes": (
        lambda: flatness.hessian_diagonal(loss_fn, PARAMS, BATCHES, KEY),
        "hessian_diagonal: missing a required (keyword-only )?argument: 'num_probes'",
    ),
}
READ_VALUES = {"weight zero", "weight nan", "negative weight", "logits", "one-hot labels"}
FUNCTIONS = [name for name in flatness.__all__ if inspect.isroutine(getattr(flatness, name))]


def compiled(caplog):
    """Return the names of the functions that were compiled."""
    return set(re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_before_an_estimator_compiles(name, caplog):
    mistake, line = MISTAKES[name]
    with (
        jax.log_compiles(),
        caplog.at_level(logging.DEBUG, logger="jax"),
        pytest.raises((TypeError, ValueError)) as caught,
    ):
        mistake()
    assert re.search(line, str(caught.value).split("\n")[0])
    assert not compiled(caplog) & set(FUNCTIONS)
    assert "_total_weight" not in compiled(caplog) or name in READ_VALUES


def test_inputs_that_fit_are_read_and_then_measured(caplog):
    """So the names that the test above does not find are names that it could find."""
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        trace(lambda params, batch: loss_fn(params, batch))
    assert {"_total_weight", "hessian_trace_samples"} <= compiled(caplog)


def test_an_error_of_the_loss_itself_is_raised_as_it_is():
    with pytest.raises(KeyError, match="scale"):
        trace(lambda params, batch: params["scale"])


@pytest.mark.parametrize(
    "weight",
    [lambda _: 8, lambda batch: jnp.asarray(batch[1].size), lambda _: 8.0],
    ids=["int", "array", "float"],
)
def test_numbers_of_predictions_may_be_integers(weight):
    assert trace(weighted(weight)).mean == trace(loss_fn).mean


def test_transformed_inputs_give_the_same_number():
    """Their values are not known, so only shapes are checked."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    found = jax.jit(lambda p: trace(loss_fn, p))(params)
    np.testing.assert_allclose(found.mean, trace(loss_fn).mean, rtol=1e-5)
    with pytest.raises(TypeError, match=r"pass jaxflat\.flatness\.from_mean_loss"):
        jax.jit(lambda p: trace(lambda p, b: losses_of(p, b).mean(), p))(params)


def count(batch):
    return batch["weights"].sum()


def mean_loss(params, batch):
    loss_sum, weight = table.loss_fn(params, batch)
    return loss_sum / weight


def test_a_mean_loss_of_unequal_microbatches_has_the_dense_hessian():
    params, batches = table.make_params(), table.make_batches(6, 4)
    assert len(set(batches["weights"].sum(1).tolist())) > 1
    adapted = from_mean_loss(mean_loss, count)
    flat_P, unravel = jax.flatten_util.ravel_pytree(params)
    product = jax.jit(partial(flatness.hessian_vector_product, adapted, params, batches))
    rows = [product(unravel(row_P)) for row_P in np.eye(len(flat_P))]
    hessian_PxP = np.stack([jax.flatten_util.ravel_pytree(row)[0] for row in rows])
    expected_PxP = table.dense_hessian(params, batches)
    np.testing.assert_allclose(hessian_PxP, expected_PxP, atol=1e-12)
    found, own = (
        hessian_trace(f, params, batches, KEY, num_probes=3) for f in (adapted, table.loss_fn)
    )
    np.testing.assert_allclose(np.array([found.mean, found.sem]), [own.mean, own.sem], rtol=1e-10)


def test_a_mean_loss_of_equal_microbatches_takes_their_size():
    """A diagonal Hessian: random signs give its trace without an error of the probes."""
    scales = jnp.asarray([1.0, 2.0, 5.0])

    def mean_square(params, batch):
        return ((batch - params[None]) ** 2 @ scales).mean()

    found = hessian_trace(
        from_mean_loss(mean_square, 7), jnp.ones(3), jnp.ones((2, 7, 3)), KEY, num_probes=1
    )
    assert float(found.mean) == pytest.approx(2 * float(scales.sum()))
    assert from_mean_loss(mean_square, 7) == from_mean_loss(mean_square, 7.0)
    assert hash(from_mean_loss(mean_square, 7)) == hash(from_mean_loss(mean_square, 7.0))


def test_the_adapter_refuses_what_is_not_a_mean():
    with pytest.raises(ValueError, match="num_predictions must be positive, not 0"):
        from_mean_loss(mean_loss, 0)
    with pytest.raises(TypeError, match=r"must return one scalar, .*; it returned shapes \(8,\)"):
        trace(from_mean_loss(losses_of, 8))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_shows_every_argument(name):
    function = getattr(flatness, name)
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert parameter.annotation is not parameter.empty
        name = parameter.name
        assert re.search(rf"\b{name}\b", inspect.getdoc(function)), name


def test_an_estimator_works_where_only_the_key_is_traced():
    def mean(key):
        return hessian_trace(loss_fn, PARAMS, BATCHES, key, num_probes=2).mean

    np.testing.assert_allclose(jax.jit(mean)(KEY), mean(KEY))
