"""Models that recompute activations, or compute products in bfloat16: the same function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.models.causal import BLOCKS
from jaxflat.models.language_model import make_language_model

V, T = 7, 5
TOKENS_BxT = np.random.default_rng(0).integers(0, V, (6, T), np.int32)
LENGTHS_B = np.array([5, 4, 3, 5, 2, 5], np.int32)
POSITIONS_BxM = np.array([[0], [1], [2], [4], [1], [3]], np.int32)
SHAPE = {"width": 16, "num_layers": 3, "head_size": 8, "tied_decoder": True}
CAUSAL = [pytest.param(block, marks=pytest.mark.slow) for block in BLOCKS]
NAMES = pytest.mark.parametrize("name", ["transformer", "lstm", *CAUSAL])


def make(name):
    own = {"name": "causal", "block": name} if name in BLOCKS else {"name": name}
    model = make_language_model(V, T, **own, **SHAPE)
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS_BxT, LENGTHS_B)["params"]


def loss(model, params):
    logits_BxMxV, _ = model.apply({"params": params}, TOKENS_BxT, LENGTHS_B, POSITIONS_BxM)
    return -jax.nn.log_softmax(logits_BxMxV)[..., 0].mean()


def relative_difference(left, right):
    return max(
        float(jnp.linalg.norm(x - y) / jnp.linalg.norm(x))
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@NAMES
@pytest.mark.slow
def test_recomputed_activations_have_the_same_first_and_second_derivatives(name):
    with jax.enable_x64(True):
        model, params = make(name)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        vector = jax.tree.map(jnp.ones_like, params)

        @partial(jax.jit, static_argnums=0)
        def derivatives(model, params):
            gradient_fn = jax.grad(partial(loss, model))
            return jax.jvp(gradient_fn, (params,), (vector,))

        stored, recomputed = (derivatives(m, params) for m in (model, model.clone(remat=True)))
        assert relative_difference(stored, recomputed) < 1e-12


@pytest.mark.parametrize(
    "name", ["transformer", pytest.param("lstm", marks=pytest.mark.slow), *CAUSAL]
)
def test_remat_stores_less_for_the_backward_pass(name):
    model, params = make(name)

    def stored(model):
        pullback = jax.eval_shape(lambda p: jax.vjp(partial(loss, model), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert stored(model.clone(remat=True)) < 0.6 * stored(model)


@NAMES
def test_all_products_are_bfloat16_and_everything_else_float32(name):
    model, params = make(name)
    loss_fn = partial(loss, model.clone(dtype=jnp.bfloat16))
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss_fn))(params)
    inputs = {var.aval.dtype for eqn in products(jaxpr.jaxpr) for var in eqn.invars}
    assert inputs == {jnp.dtype(jnp.bfloat16)}
    for primitive in (
        "exp",
        "rsqrt",
        "reduce_sum",
        "logistic",
        "cos",
    ):  # softmax, loss, norms, gates, turns
        for eqn in equations(jaxpr.jaxpr, primitive):
            assert all(var.aval.dtype == jnp.float32 for var in eqn.invars), primitive
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@NAMES
@pytest.mark.slow
def test_bfloat16_rounds_and_is_otherwise_the_same(name):
    """A bfloat16 has 8 significant bits, so a product has a relative error near 2^-9."""
    model, params = make(name)
    exact, rounded = (
        jax.jit(jax.value_and_grad(partial(loss, m)))(params)
        for m in (model, model.clone(dtype=jnp.bfloat16))
    )
    assert rounded[0].dtype == jnp.float32
    assert 0 < relative_difference(exact[0], rounded[0]) < 0.01
    assert 1e-4 < relative_difference(exact[1], rounded[1]) < 0.1


def products(jaxpr):
    return list(equations(jaxpr, "dot_general"))


def equations(jaxpr, primitive):
    """Yield the equations of a primitive in a jaxpr and in all that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive:
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, primitive)
