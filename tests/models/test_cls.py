"""CLS before the words: seen by all, seeing all, and embedded in larger models like the rest."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.models.enlarge import enlarge
from jaxflat.models.masked import make_masked_model
from jaxflat.probes.features import sentence_features

V, T = 5, 4
TOKENS_BxT = np.array([[0, 1, 2, 3], [4, 4, 0, V], [V + 1, 2, V, V]], np.int32)
LENGTHS_B = np.array([4, 3, 2], np.int32)


def make(width=4, num_layers=2, tied=True, cls=True):
    how = {"width": width, "num_layers": num_layers, "head_size": 2, "tied_decoder": tied}
    return make_masked_model(V, T, name="transformer", cls=cls, **how)


def params_of(model):
    params = jax.jit(model.init)(jax.random.key(0), TOKENS_BxT, LENGTHS_B)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x.astype(float) + 0.3 * jax.random.normal(key, x.shape, float)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@partial(jax.jit, static_argnames="model")
def apply(model, params, tokens_BxT=TOKENS_BxT, positions_BxM=None):
    return model.apply({"params": params}, tokens_BxT, LENGTHS_B, positions_BxM)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_words_are_asked_for_by_their_own_places(num_layers):
    model = make(num_layers=num_layers)
    params, positions_BxM = params_of(model), np.array([[0, 3], [1, 2], [1, 0]])
    (logits_BxTxV, seen), (some_BxMxV, _) = (
        apply(model, params),
        apply(model, params, positions_BxM=positions_BxM),
    )
    assert logits_BxTxV.shape == (3, T, V)
    assert seen["features_BxMxD"].shape == (3, T, 4)
    expected = np.take_along_axis(np.asarray(logits_BxTxV), positions_BxM[..., None], axis=1)
    np.testing.assert_allclose(some_BxMxV, expected, atol=1e-12)


def test_it_depends_on_every_word_and_on_no_padding():
    model = make(num_layers=1)
    params = params_of(model)

    def cls_of(tokens_BxT):
        return np.asarray(apply(model, params, tokens_BxT)[1]["cls_BxD"])

    before_BxD = cls_of(TOKENS_BxT)
    for b, length in enumerate(LENGTHS_B):
        for t in range(T):
            changed_BxT = TOKENS_BxT.copy()
            changed_BxT[b, t] = (changed_BxT[b, t] + 1) % V
            moved = np.abs(cls_of(changed_BxT) - before_BxD).max(axis=1) > 1e-9
            assert moved[b] == (t < length)
            assert moved.sum() <= 1


def test_every_word_sees_it():
    model = make(num_layers=1)
    params = params_of(model)
    moved = {**params, "token_embedding": params["token_embedding"].at[V + 2, 0].add(2.0)}
    features, other = (apply(model, p)[1]["features_BxMxD"] for p in (params, moved))
    assert np.all(np.abs(features - other).max(-1) > 1e-6)
    without = make(num_layers=1, cls=False)
    with pytest.raises(KeyError):
        apply(without, params_of(without))[1]["cls_BxD"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_model_computes_the_same(tied):
    small, large = make(tied=tied), make(width=12, num_layers=3, tied=tied)
    params = params_of(small)
    (logits, seen), (wide_logits, wide) = (
        apply(small, params),
        apply(large, enlarge(params, 3, 1)),
    )
    np.testing.assert_allclose(wide_logits, logits, atol=1e-12)
    scale = 3 if tied else 1  # the final norm's gain is divided where the decoder is tied
    np.testing.assert_allclose(scale * wide["cls_BxD"], np.tile(seen["cls_BxD"], 3), atol=1e-12)


def test_a_head_may_see_it_alone():
    model = make()
    params = params_of(model)
    features_BxD = sentence_features(model.apply, params, TOKENS_BxT, LENGTHS_B, "cls")
    np.testing.assert_allclose(features_BxD, apply(model, params)[1]["cls_BxD"], atol=1e-12)
    assert not jnp.allclose(
        features_BxD, sentence_features(model.apply, params, TOKENS_BxT, LENGTHS_B, "mean")
    )
