"""v' H v by the second-order adjoint method against dense Hessians, for many kinds of losses."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.flatness.products import hessian_form
from jaxflat.flatness.second_order import shared_hessian_form
from jaxflat.flatness.second_order.equations import is_transparent
from jaxflat.models.bert import Bert
from jaxflat.models.causal import CausalTransformer
from jaxflat.models.lstm import Lstm
from tests.support import tiny_masked_lm as lm
from tests.support.counts import FULL

KEY = jax.random.key(8)


def vector_like(params, seed=9):
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))


def forms(loss_fn, params, batch, vectors):
    """Return the forms of the vectors (axis 0), in sequence as in a trace, and the weight."""

    @jax.jit
    def compiled(params, batch, vectors):
        form, weight = shared_hessian_form(loss_fn, params, batch)
        return jax.lax.map(form, vectors), weight

    return compiled(params, batch, vectors)


def stack(*vectors):
    return jax.tree.map(lambda *x: jnp.stack(x), *vectors)


@pytest.mark.slow
def test_forms_of_the_masked_lm_equal_the_dense_ones():
    params, batches = lm.make_params(), lm.make_batches(1, 6)
    assert len(set(batches["lengths"].ravel().tolist())) > 2
    hessian, batch = lm.dense_hessian(params, batches), lm.merge(batches)
    vectors = [vector_like(params, seed) for seed in (1, 2)]
    found, weight = forms(lm.loss_fn, params, batch, stack(*vectors))
    flat = [ravel_pytree(vector)[0] for vector in vectors]
    expected = jnp.stack([v @ hessian @ v for v in flat])
    np.testing.assert_allclose(found / weight, expected, rtol=1e-10)


def mean_of(outputs):
    return jnp.mean(outputs), jnp.asarray(1.0)


def logistic_regression(params, batch):
    scores = batch @ params["w"] + params["b"][0]
    return jnp.sum(jax.nn.softplus(scores) - 0.3 * scores), jnp.asarray(1.0 * len(batch))


def scanned(params, batch):
    """Carries: a counter, one that starts constant and becomes active, and one that is reset."""

    def step(carry, weight):
        x, late, count, same, steps = carry
        x = jnp.tanh(x * weight + late.sum() + same) * (1 + 0.1 * count.astype(x.dtype))
        seen = (x, x * x, count + 1, jnp.zeros(()), steps + (x.sum() > 0).astype(int))
        return seen, (x / (1 + late**2), steps)

    still = (batch[0], jnp.zeros(4), 0, jnp.ones(()), jnp.zeros((), int))
    (x, late, *_), (ys, counts) = jax.lax.scan(step, still, params["w"], reverse=True)
    return mean_of((ys + late[None]) * x[None] * (1 + counts[:, None].astype(x.dtype)))


def branches(params, batch):
    """Comparisons, indices, branches, products of a value with itself, a custom forward rule."""
    w = params["w"]
    chosen = jnp.where(w > 0, w**2, jnp.sin(w)) * jnp.sort(w)[::-1] + jax.nn.relu(w - 0.1)
    looked_up = jnp.exp(w)[jnp.argsort(w)] / (2 + jnp.cos(w))
    either = jax.lax.cond(batch[0, 0] > 0, jnp.tanh, jnp.exp, w)
    gram = jnp.outer(w, w) @ batch[:4, :4]
    held = jax.lax.stop_gradient(jnp.exp(w)) * w * jax.lax.stop_gradient(w).max()
    return mean_of(chosen + looked_up + either + held + (gram**2).sum(0) + jnp.cumprod(w))


def blocks(params, batch):
    """Recomputed blocks: one with two outputs, one within a scan."""
    pair = jax.checkpoint(lambda w: (jnp.sin(w), w**3))
    first, second = pair(params["w"])
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ batch[:4, :4] * w), None))
    return mean_of(jax.lax.scan(step, first, params["w"])[0] * second + second)


def linear(params, batch):
    return jnp.sum(batch @ params["w"]), jnp.asarray(1.0)


def constant(params, batch):
    return jnp.sum(batch), jnp.asarray(1.0)


def looped(params, batch):
    """A loop with a length that depends on the data: it has no reverse derivative."""
    x = jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 1.5, params["w"] ** 2)
    return mean_of(x * x)


def mixing_blocks(params, batch):
    """Elementwise operations with one shape in and out that together are not elementwise."""

    def step(c, t):
        return (jnp.tanh(c + t),) * 2

    running = jax.checkpoint(lambda x: jax.lax.scan(step, jnp.zeros((), x.dtype), x)[1])
    return mean_of(running(params["w"]) ** 2)


def filled(params, batch):
    """An index out of range gives a constant."""
    found = params["w"].at[jnp.asarray([0, 9])].get(mode="fill", fill_value=1.0)
    return mean_of(jnp.sin(found))


def of_complex_numbers(params, batch):
    w, zero = params["w"], jnp.zeros_like(params["w"])
    turned = jnp.exp(jax.lax.complex(zero, w)) * jax.lax.complex(w, zero)
    return jnp.real(jnp.sum(turned) ** 2), jnp.asarray(1.0)


def gradient_penalty(params, batch):
    """A gradient within the loss, of a recomputed block with a scan."""

    def inner(x):
        return jax.lax.scan(lambda c, t: (jnp.tanh(c * t), None), jnp.ones((), x.dtype), x)[0]

    gradient = jax.grad(jax.checkpoint(inner))(params["w"])
    return gradient @ gradient, jnp.asarray(1.0)


LOSSES = (
    *(logistic_regression, scanned, branches, blocks, linear, constant, looped),
    *(mixing_blocks, filled, of_complex_numbers, gradient_penalty),
)


def plain(loss_fn):
    return loss_fn


@pytest.mark.parametrize(
    ("wrap", "loss_fn"),
    [
        *((plain, loss_fn) for loss_fn in LOSSES),
        *product((jax.checkpoint, jax.jit), LOSSES if FULL else (scanned, branches, blocks)),
    ],
    ids=lambda f: f.__name__,
)
def test_forms_equal_those_of_the_dense_hessian(loss_fn, wrap):
    params = {"w": jnp.asarray([0.7, -0.4, 0.2, 1.1]), "b": jnp.asarray([0.3])}
    batch, vector = jax.random.normal(KEY, (5, 4)), vector_like(params)
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.jacfwd(jax.jacfwd(lambda x: loss_fn(unravel(x), batch)[0])))(flat)
    found, _ = forms(wrap(loss_fn), params, batch, stack(vector))
    v = ravel_pytree(vector)[0]
    np.testing.assert_allclose(found[0], v @ hessian @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_losses_that_are_not_transparent_are_recognised():
    params, batch = {"w": jnp.ones(4), "b": jnp.ones(1)}, jnp.ones((5, 4))
    told = {f.__name__ for f in LOSSES if not taken_apart(f, params, batch)}
    assert told == {"looped", "of_complex_numbers"}
    assert taken_apart(lm.loss_fn, lm.make_params(), lm.merge(lm.make_batches(1, 2)))


def taken_apart(loss_fn, params, batch):
    return is_transparent(jax.make_jaxpr(loss_fn)(params, batch).jaxpr)


def language_model(model, params, tokens):
    logits, _ = model.apply({"params": params}, tokens, jnp.full(len(tokens), 4))
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs[:, : len(tokens[0]) - 1], tokens[:, 1:, None], axis=2)
    return -picked.sum(), jnp.asarray(1.0 * picked.size)


@pytest.mark.parametrize(
    "model",
    [
        CausalTransformer(7, 7, 8, 3, 2, 12, "relu"),
        Bert(7, 6, 8, 2, 2, 12, "gelu", 2, 1e-9),
        Lstm(7, 4, 2, True),
    ],
    ids=["causal", "bert", "lstm"],
)
@pytest.mark.slow
def test_other_models_have_the_forms_of_two_forward_derivatives(model):
    tokens = jax.random.randint(KEY, (2, 6), 0, 7)
    params = vector_like(jax.jit(model.init)(KEY, tokens, jnp.full(2, 4))["params"], 3)
    params = jax.tree.map(lambda x: 0.3 * x.astype(float), params)
    loss_fn = partial(language_model, model)
    assert taken_apart(loss_fn, params, tokens)
    vector = vector_like(params)
    found, _ = forms(loss_fn, params, tokens, stack(vector))
    expected, _ = jax.jit(partial(hessian_form, loss_fn))(params, tokens, vector)
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)


def test_one_more_vector_multiplies_three_times_by_each_weight():
    """A gradient also multiplies three times; two forward derivatives multiply five times."""

    def loss_fn(params, batch):
        for weight in params:
            batch = jnp.tanh(batch @ weight)
        return mean_of(batch)

    params, batch = [jnp.ones((64, 64))] * 5, jnp.ones((256, 64))
    one = 2.0 * 256 * 64 * 64 * len(params)  # the first needs one, as the batch has no tangent

    def flops(function, count):
        vectors = [[(1.0 + i) * x for x in params] for i in range(count)]
        compiled = jax.jit(function).lower(params, batch, vectors).compile()
        return (compiled.cost_analysis() or {})["flops"]

    def shared(params, batch, vectors):
        form, _ = shared_hessian_form(loss_fn, params, batch)
        return [form(vector) for vector in vectors]

    more = flops(shared, 2) - flops(shared, 1)
    assert 2.5 < more / one < 2.9
    assert flops(shared, 1) / one < 5
