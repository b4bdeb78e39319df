"""A small model and the large one it is embedded in: one function, and traces that follow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.models.causal import BLOCKS
from jaxflat.models.enlarge import enlarge, gauss_newton_factors
from jaxflat.models.language_model import make_language_model
from tests.support.counts import in_full

V, T = 5, 4
TOKENS_BxT = np.array([[0, 1, 2, 3], [4, 4, 0, V], [V + 1, 2, V, V]], np.int32)
LENGTHS_B = np.array([4, 3, 2], np.int32)
POSITIONS_BxM = np.array([[0, 3], [1, 2], [1, 0]], np.int32)
FAMILIES = pytest.mark.parametrize("name", ["transformer", "lstm", "gpt", "modern"])


def make(name: str, num_layers: int, tied: bool, width: int = 4):
    """Return a model; the name of a causal one is its block."""
    how = {"width": width, "num_layers": num_layers, "head_size": 2, "tied_decoder": tied}
    if name in BLOCKS:
        return make_language_model(V, T, name="causal", block=name, **how)
    return make_language_model(V, T, name=name, **how)


def noisy_params(model):
    """Away from the initial zeros and ones, so that every leaf matters; float64."""
    params = jax.jit(model.init)(jax.random.key(0), TOKENS_BxT, LENGTHS_B)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf.astype(jnp.float64) + 0.3 * jax.random.normal(key, leaf.shape, jnp.float64)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@partial(jax.jit, static_argnames="model")
def apply(model, params):
    everywhere, _ = model.apply({"params": params}, TOKENS_BxT, LENGTHS_B)
    return everywhere, model.apply({"params": params}, TOKENS_BxT, LENGTHS_B, POSITIONS_BxM)[0]


@FAMILIES
@pytest.mark.parametrize(
    ("tied", "num_layers", "factor", "extra_layers"),
    [(False, 2, 1, 2), (True, 1, 3, 2), *in_full((True, 2, 3, 0), (False, 1, 2, 1))],
)
@pytest.mark.slow
def test_embedded_model_computes_the_same_logits(name, tied, num_layers, factor, extra_layers):
    small = make(name, num_layers, tied)
    large = make(name, num_layers + extra_layers, tied, width=4 * factor)
    params = noisy_params(small)
    embedded = enlarge(params, factor, extra_layers)
    shapes = jax.eval_shape(large.init, jax.random.key(0), TOKENS_BxT, LENGTHS_B)["params"]
    assert jax.tree.map(jnp.shape, embedded) == jax.tree.map(lambda x: x.shape, shapes)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=1e-10),
        apply(small, params),
        apply(large, embedded),
    )


@partial(jax.jit, static_argnames="model")
def gauss_newton_traces(model, params):
    """Per leaf or layer: the trace of the dense Gauss-Newton matrix, summed over predictions."""
    log_probs = lambda p: jax.nn.log_softmax(apply(model, p)[1]).reshape(-1)  # noqa: E731
    probs = jnp.exp(log_probs(params))

    def trace(path, j):
        layers = j.shape[1] if path[0].key == "stack" else 1
        squares = j.reshape(len(probs), layers, -1) ** 2 * probs[:, None, None]
        return squares.sum((0, 2)) if path[0].key == "stack" else squares.sum()

    return jax.tree_util.tree_map_with_path(trace, jax.jacobian(log_probs)(params))


def total(tree) -> float:
    return float(sum(leaf.sum() for leaf in jax.tree.leaves(tree)))


@FAMILIES
@pytest.mark.parametrize("tied", [True, *in_full(False)])
@pytest.mark.slow
def test_raw_block_traces_predict_the_dense_trace_of_the_embedded_model(name, tied):
    factor = 3 if name == "modern" else 2  # then some of its neurons are zeros
    small, large = make(name, 2, tied), make(name, 2, tied, width=4 * factor)
    params = noisy_params(small)
    raw = gauss_newton_traces(small, params)
    embedded = gauss_newton_traces(large, enlarge(params, factor))
    predicted = jax.tree.map(jnp.multiply, raw, gauss_newton_factors(params, factor))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-20), predicted, embedded)


@FAMILIES
@pytest.mark.slow
def test_of_extra_layers_only_biases_that_reach_the_hidden_state_add_to_the_trace(name):
    small, large = make(name, 1, tied=True), make(name, 3, tied=True, width=8)
    params = noisy_params(small)
    raw = gauss_newton_traces(small, params)
    embedded = gauss_newton_traces(large, enlarge(params, 2, 2))
    predicted = jax.tree.map(jnp.multiply, raw, gauss_newton_factors(params, 2, 2))
    np.testing.assert_allclose(total(predicted), total(embedded), rtol=1e-9)
    last = embedded.get("last") or jax.tree.map(lambda leaf: leaf[-1], embedded["stack"])
    if name == "modern":  # without biases, no gradient reaches a layer of zeros
        assert total(last) == 0
        return
    biases = [last["join"]] if name == "lstm" else [last["mlp_out"], last["attention"]["out"]]
    traces = [module["bias"] for module in biases]
    np.testing.assert_allclose(sum(traces), total(last), rtol=1e-12)
    np.testing.assert_allclose(traces, traces[0], rtol=1e-9)


@pytest.mark.parametrize("name", ["transformer", *in_full("lstm", "gpt", "modern")])
@pytest.mark.slow
def test_second_derivatives_follow_no_such_rule(name):
    """tr H - tr G differs between the embedded and the small model: it has to be measured."""
    small, large = make(name, 1, tied=True), make(name, 1, tied=True, width=8)
    params = noisy_params(small)
    residuals = []
    for model, at in ((small, params), (large, enlarge(params, 2))):
        flat, unravel = ravel_pytree(at)
        loss = lambda x, m=model, u=unravel: -jax.nn.log_softmax(apply(m, u(x))[1])[..., 0].sum()  # noqa: E731
        hessian_trace = jnp.trace(jax.jit(jax.hessian(loss))(flat))
        residuals.append(float(hessian_trace) - total(gauss_newton_traces(model, at)))
    assert abs(residuals[1] - residuals[0]) > 1e-3 * abs(residuals[0])
