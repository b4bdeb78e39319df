"""The LSTM against plain numpy, what each position sees, and its second derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.models.lstm import Lstm

V, T = 5, 4
TOKENS_BxT = np.array([[0, 1, 2, 3], [4, 4, 0, V], [V + 1, 2, V, V]], np.int32)
LENGTHS_B = np.array([4, 3, 2], np.int32)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(num_layers: int, tied: bool, width: int = 3):
    """Return a model and parameters far from any initialisation, in float64."""
    model = Lstm(V, width, num_layers, tied)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BxT, LENGTHS_B)["params"]
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: np.zeros(x.shape), shapes))
    return model, unravel(0.7 * jax.random.normal(jax.random.key(1), flat.shape, flat.dtype))


@partial(jax.jit, static_argnames="model")
def apply(model, params, positions_BxM=None, tokens_BxT=TOKENS_BxT):
    return model.apply({"params": params}, tokens_BxT, LENGTHS_B, positions_BxM)[0]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x_D, norm):
    return (x_D - x_D.mean()) / np.sqrt(x_D.var() + 1e-6) * norm["scale"] + norm["bias"]


def outputs(words, direction):
    """Hochreiter & Schmidhuber's cell with forget gate, a word and a gate at a time."""
    cell = output = np.zeros_like(words[0])
    found = []
    for x in words:
        i, f, g, o = (
            x @ direction["input_kernel"][:, gate]
            + output @ direction["recurrent_kernel"][:, gate]
            + direction["bias"][gate]
            for gate in range(4)
        )
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        output = sigmoid(o) * np.tanh(cell)
        found.append(output)
    return found


def sentence_logits(params, words):
    """Logits of a sentence that has no padding, by numpy alone."""
    hidden = [params["token_embedding"][word] for word in words]
    num_stacked = len(params["stack"]["norm"]["scale"]) if "stack" in params else 0
    layers = [jax.tree.map(lambda x, i=i: x[i], params["stack"]) for i in range(num_stacked)]
    for layer in [*layers, params["last"]]:
        read = [normed(x, layer["norm"]) for x in hidden]
        forward, backward = outputs(read, layer["forward"]), outputs(read[::-1], layer["backward"])
        join = layer["join"]
        hidden = [
            x + a @ join["kernel"][0] + b @ join["kernel"][1] + join["bias"]
            for x, a, b in zip(hidden, forward, backward[::-1], strict=True)
        ]
    decoder = params["decoder"] if "decoder" in params else params["token_embedding"][:V].T
    return [normed(x, params["final_norm"]) @ decoder + params["decoder_bias"] for x in hidden]


@pytest.mark.parametrize(("num_layers", "tied"), [(1, True), (3, False)])
@pytest.mark.slow
def test_logits_are_those_of_numpy_everywhere_and_at_asked_positions(num_layers, tied):
    model, params = make(num_layers, tied)
    plain = jax.tree.map(np.asarray, params)
    positions_BxM = np.array([[0, 3], [1, 2], [1, 0]], np.int32)
    everywhere_BxTxV, asked_BxMxV = apply(model, params), apply(model, params, positions_BxM)
    for b, (tokens, length) in enumerate(zip(TOKENS_BxT, LENGTHS_B, strict=True)):
        expected = np.array(sentence_logits(plain, tokens[:length]))
        np.testing.assert_allclose(everywhere_BxTxV[b, :length], expected, atol=1e-12)
        np.testing.assert_allclose(asked_BxMxV[b], expected[positions_BxM[b]], atol=1e-12)


def test_what_stands_at_padding_never_matters():
    model, params = make(2, tied=True)
    changed_BxT = np.where(TOKENS_BxT == V, 1, TOKENS_BxT)
    words_BxT = np.arange(T)[None] < LENGTHS_B[:, None]
    logits_BxTxV = apply(model, params, None, TOKENS_BxT)
    same = logits_BxTxV == apply(model, params, None, changed_BxT)
    assert np.all(np.asarray(same)[words_BxT])
    assert not np.all(np.asarray(same))


def test_a_position_depends_on_every_word_of_its_sentence_and_on_no_padding():
    model, params = make(1, tied=False)
    words_VxD = params["token_embedding"]
    # Each position its own row of the embedding, so that gradients tell positions apart.
    apart = params | {"token_embedding": jnp.concatenate([words_VxD[:1] + 0.1 * i
                                                          for i in range(V + 3)])}  # fmt: skip
    tokens_1xT = np.arange(T, dtype=np.int32)[None]

    @jax.jit
    @partial(jax.jacobian, argnums=0)
    def jacobian(embedding, length_1):
        changed = apart | {"token_embedding": embedding}
        return model.apply({"params": changed}, tokens_1xT, length_1)[0][0, :, 0]

    for length in (T, T - 1, 1):
        found = jacobian(apart["token_embedding"], np.array([length], np.int32))
        seen_TxT = np.abs(np.asarray(found))[:, :T].max(-1) > 0
        assert np.all(seen_TxT[:length, :length])
        assert not np.any(seen_TxT[:length, length:])


@pytest.mark.slow
def test_hessian_vector_products_are_those_of_central_differences_of_the_gradient():
    model, params = make(2, tied=True, width=2)
    flat, unravel = ravel_pytree(params)
    vectors = jax.random.normal(jax.random.key(2), (2, *flat.shape), flat.dtype)

    def loss(x):
        return -jax.nn.log_softmax(apply(model, unravel(x), None))[:, :2, 0].sum()

    gradient = jax.jit(jax.grad(loss))
    product = jax.jit(lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1])
    for vector in vectors:
        step = 1e-5 * vector
        expected = (gradient(flat + step) - gradient(flat - step)) / 2e-5
        np.testing.assert_allclose(product(flat, vector), expected, rtol=1e-6, atol=1e-7)
    hessian = jax.jit(jax.hessian(loss))(flat)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-10)
    np.testing.assert_allclose(product(flat, vectors[0]), hessian @ vectors[0], atol=1e-10)
