"""CLS before the words: seen by all, seeing all, and embedded in larger models like the rest."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.models.enlarge import enlarge
from jaxflat.models.language_model import make_language_model
from jaxflat.probes.features import sentence_features
from tests.models.test_enlarge import LENGTHS_B, T, TOKENS_BxT, V, noisy_params
from tests.support.counts import in_full


def make(width=4, num_layers=2, tied=True, cls=True):
    how = {"width": width, "num_layers": num_layers, "head_size": 2, "tied_decoder": tied}
    return make_language_model(V, T, name="transformer", cls=cls, **how)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@partial(jax.jit, static_argnames="model")
def apply(model, params, tokens_BxT=TOKENS_BxT, positions_BxM=None):
    return model.apply({"params": params}, tokens_BxT, LENGTHS_B, positions_BxM)


@pytest.mark.parametrize("num_layers", [3, *in_full(1)])
@pytest.mark.slow
def test_words_are_asked_for_by_their_own_places(num_layers):
    model = make(num_layers=num_layers)
    params, positions_BxM = noisy_params(model), np.array([[0, 3], [1, 2], [1, 0]])
    (logits_BxTxV, seen), (some_BxMxV, _) = (
        apply(model, params),
        apply(model, params, positions_BxM=positions_BxM),
    )
    assert logits_BxTxV.shape == (3, T, V)
    assert seen["features_BxMxD"].shape == (3, T, 4)
    expected = np.take_along_axis(np.asarray(logits_BxTxV), positions_BxM[..., None], axis=1)
    np.testing.assert_allclose(some_BxMxV, expected, atol=1e-12)


@pytest.mark.slow
def test_it_depends_on_every_word_and_on_no_padding():
    model = make(num_layers=1)
    params = noisy_params(model)

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


@pytest.mark.slow
def test_every_word_sees_it():
    model = make(num_layers=1)
    params = noisy_params(model)
    moved = {**params, "token_embedding": params["token_embedding"].at[V + 2, 0].add(2.0)}
    features, other = (apply(model, p)[1]["features_BxMxD"] for p in (params, moved))
    assert np.all(np.abs(features - other).max(-1) > 1e-6)
    without = make(num_layers=1, cls=False)
    with pytest.raises(KeyError):
        apply(without, noisy_params(without))[1]["cls_BxD"]


@pytest.mark.parametrize("tied", [True, *in_full(False)])
@pytest.mark.slow
def test_a_larger_model_computes_the_same(tied):
    small, large = make(tied=tied), make(width=12, num_layers=3, tied=tied)
    params = noisy_params(small)
    (logits, seen), (wide_logits, wide) = (
        apply(small, params),
        apply(large, enlarge(params, 3, 1)),
    )
    np.testing.assert_allclose(wide_logits, logits, atol=1e-12)
    scale = 3 if tied else 1  # the final norm's gain is divided where the decoder is tied
    np.testing.assert_allclose(scale * wide["cls_BxD"], np.tile(seen["cls_BxD"], 3), atol=1e-12)


@pytest.mark.slow
def test_a_head_may_see_it_alone():
    model = make()
    params = noisy_params(model)
    features_BxD = sentence_features(model.apply, params, TOKENS_BxT, LENGTHS_B, "cls")
    np.testing.assert_allclose(features_BxD, apply(model, params)[1]["cls_BxD"], atol=1e-12)
    assert not jnp.allclose(
        features_BxD, sentence_features(model.apply, params, TOKENS_BxT, LENGTHS_B, "mean")
    )
