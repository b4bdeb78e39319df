"""The transformer computes at the asked positions what it would compute everywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.models.transformer import Transformer

V, T = 5, 4
# int32 like the languages' own, and so the same arrays with and without float64.
TOKENS_BxT = np.array([[0, 1, 2, 3], [4, 4, 0, V], [V + 1, 2, V, V]], np.int32)
LENGTHS_B = np.array([4, 3, 2], np.int32)


def make(width: int, num_layers: int, tied: bool, seed: int = 0):
    model = Transformer(V, T, width, num_layers, width // 2, tied)
    params = jax.jit(model.init)(jax.random.key(seed), TOKENS_BxT, LENGTHS_B)["params"]
    # Away from the initial zeros and ones, so that every leaf matters.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.3 * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return model, jax.tree.unflatten(structure, noisy)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@partial(jax.jit, static_argnames="model")
def apply(model, params, positions_BxM=None, tokens_BxT=TOKENS_BxT):
    return model.apply({"params": params}, tokens_BxT, LENGTHS_B, positions_BxM)[0]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.slow
def test_only_asked_positions_are_computed_and_they_agree(num_layers, float64):
    model, params = make(8, num_layers, tied=False)
    params = float64(params)
    positions_BxM = np.array([[0, 3], [1, 2], [1, 0]])
    everywhere_BxTxV = apply(model, params)
    expected = np.take_along_axis(np.asarray(everywhere_BxTxV), positions_BxM[..., None], axis=1)
    np.testing.assert_allclose(apply(model, params, positions_BxM), expected, atol=1e-12)


@pytest.mark.slow
def test_what_stands_at_padding_never_matters():
    model, params = make(8, 2, tied=True)
    changed_BxT = np.where(TOKENS_BxT == V, 1, TOKENS_BxT)
    words_BxT = np.arange(T)[None] < LENGTHS_B[:, None]
    logits_BxTxV = apply(model, params, None, TOKENS_BxT)
    same = logits_BxTxV == apply(model, params, None, changed_BxT)
    assert np.all(np.asarray(same)[words_BxT])
    assert not np.all(np.asarray(same))


@pytest.mark.slow
def test_every_word_depends_on_every_other_word():
    model, params = make(8, 2, tied=True)
    tokens_1xT, lengths_1 = TOKENS_BxT[:1], LENGTHS_B[:1]

    def logits(embedding):
        changed = params | {"token_embedding": embedding}
        return model.apply({"params": changed}, tokens_1xT, lengths_1)[0].sum(-1)[0]

    jacobian_TxVxD = jax.jit(jax.jacobian(logits))(params["token_embedding"])
    assert np.all(np.abs(jacobian_TxVxD)[:, :4].max(-1) > 0)
