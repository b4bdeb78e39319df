"""The causal model of sentences: what each prediction sees, and its cache, in both blocks."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import hessian_trace_samples
from jaxflat.flatness.sampling import draw_probe
from jaxflat.flatness.second_order import shared_hessian_form
from jaxflat.languages.batches import Batch
from jaxflat.models.causal import BLOCKS, empty_cache
from jaxflat.models.language_model import make_language_model
from jaxflat.training.objectives import masked_lm_loss

V, T, D = 5, 4, 8
TOKENS_BxT = np.array([[3, 0, 2, 1], [4, 1, 3, V], [2, V, V, V]], np.int32)  # no word twice
LENGTHS_B = np.array([4, 3, 1], np.int32)
SMALL = {"width": 4, "num_layers": 2, "head_size": 2, "tied_decoder": True}
IN_BOTH = pytest.mark.parametrize("block", BLOCKS)

pytestmark = pytest.mark.slow


@cache
def make(block: str, tied: bool = True):
    """Parameters far from any initialisation, biases and norms included; float64."""
    how = {"width": D, "num_layers": 3, "head_size": 4, "tied_decoder": tied}
    model = make_language_model(V, T, name="causal", block=block, **how)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BxT, LENGTHS_B)["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape)), shapes)
    return model, params


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@partial(jax.jit, static_argnames="model")
def apply(model, params, tokens_BxT=TOKENS_BxT, positions_BxM=None):
    return model.apply({"params": params}, tokens_BxT, LENGTHS_B, positions_BxM)


@IN_BOTH
def test_no_prediction_has_a_gradient_by_the_embedding_of_a_later_word(block):
    """Exactly 0, padding included; every word before has one. The decoder is not the embedding."""
    model, params = make(block, tied=False)

    @jax.jit
    @jax.jacobian
    def jacobian(embedding_RxD):
        return apply(model, params | {"token_embedding": embedding_RxD})[0].sum(-1)

    sizes_BxSxR = np.abs(jacobian(params["token_embedding"])).max(-1)
    for b, length in enumerate(LENGTHS_B):
        for s in range(length + 1):
            seen = {V + 2, *TOKENS_BxT[b, :s].tolist()}  # the start token and s words
            assert set(np.flatnonzero(sizes_BxSxR[b, s])) == seen


@IN_BOTH
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sentence(block):
    model, params = make(block)
    whole_BxSxU, _ = apply(model, params)
    assert whole_BxSxU.shape == (3, T + 1, V + 1)
    step = jax.jit(partial(model.apply, method="next_logits"))
    slots = empty_cache(model, 3, T + 1, jnp.float64)
    read_BxS = np.insert(TOKENS_BxT, 0, V + 2, axis=1)
    for s in range(T + 1):
        logits_Bx1xU, slots = step({"params": params}, read_BxS[:, s : s + 1], slots, np.int32(s))
        np.testing.assert_allclose(logits_Bx1xU[:, 0], whole_BxSxU[:, s], atol=1e-12)


@IN_BOTH
def test_asked_predictions_and_their_features_are_those_of_all(block):
    model, params = make(block)
    positions_BxM = np.array([[0, 4], [1, 3], [1, 0]], np.int32)
    logits_BxSxU, seen = apply(model, params)
    features_BxSxD = np.concatenate([seen["start_BxD"][:, None], seen["features_BxMxD"]], axis=1)
    assert seen["features_BxMxD"].shape == (3, T, D)
    some_BxMxU, some = apply(model, params, positions_BxM=positions_BxM)
    for found, everywhere in ((some_BxMxU, logits_BxSxU), (some["features_BxMxD"], features_BxSxD)):
        expected = np.take_along_axis(np.asarray(everywhere), positions_BxM[..., None], axis=1)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    decoder_UxD = params["token_embedding"][: V + 1]  # tied, and without a bias
    np.testing.assert_allclose(logits_BxSxU, features_BxSxD @ decoder_UxD.T, atol=1e-12)


@IN_BOTH
def test_features_after_a_word_depend_on_it(block):
    model, params = make(block)
    other_BxT = TOKENS_BxT.copy()
    other_BxT[0, 2] = 4
    before, after = (apply(model, params, x)[1]["features_BxMxD"] for x in (TOKENS_BxT, other_BxT))
    np.testing.assert_array_equal(before[0, :2], after[0, :2])
    assert np.abs(before[0, 2:] - after[0, 2:]).max(-1).min() > 1e-6


@pytest.mark.parametrize(("block", "present"), [("gpt", True), ("modern", False)])
def test_a_modern_block_has_neither_biases_nor_learned_positions(block, present):
    _, params = make(block)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert ("bias" in names) == ("position_embedding" in names) == present
    assert ("mlp_gate" in params["stack"]) != present


def test_a_sentence_with_its_start_token_must_fit():
    model, params = make("gpt")
    with pytest.raises(ValueError, match=r"positions 0\.\.5 do not fit.* have positions 0\.\.4"):
        apply(model, params, np.zeros((3, T + 1), np.int32))


@IN_BOTH
def test_samples_of_the_hessian_trace_are_forms_of_the_dense_hessian(block):
    """Each sample is z' H z, and the forms of the unit vectors sum to the trace."""
    model = make_language_model(3, 3, name="causal", block=block, **SMALL)
    keys = jax.random.split(jax.random.key(0), 4)
    tokens_BxT = jnp.asarray([[0, 2, 1], [1, 0, 3]], jnp.int32)
    positions_BxM = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[None], (2, 3))
    targets_BxMxU = jax.random.dirichlet(keys[0], jnp.ones(4), (2, 3))
    weights_BxM = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    batch = Batch(
        tokens_BxT, jnp.asarray([3, 2], jnp.int32), positions_BxM, targets_BxMxU, weights_BxM
    )
    shapes = jax.eval_shape(model.init, keys[1], tokens_BxT, batch.lengths_B)["params"]
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes))
    params, loss_fn = (
        unravel(0.5 * jax.random.normal(keys[2], flat.shape)),
        masked_lm_loss(model.apply),
    )
    hessian = jax.jit(jax.hessian(lambda x: loss_fn(unravel(x), batch)[0] / 5))(
        ravel_pytree(params)[0]
    )
    batches = jax.tree.map(lambda x: x[None], batch)
    how = {"num_probes": 3, "over": "probes"}
    terms = hessian_trace_samples(loss_fn, params, batches, keys[3], **how)
    zero = jnp.asarray(0)
    for draw, sample in enumerate(terms.terms / terms.weights_n):
        z = ravel_pytree(draw_probe(keys[3], "probes", zero, jnp.asarray(draw), params))[0]
        np.testing.assert_allclose(sample, z @ hessian @ z, rtol=1e-9)

    @jax.jit
    def forms(vectors):
        form, weight = shared_hessian_form(loss_fn, params, batch)
        return jax.lax.map(lambda v: form(unravel(v)), vectors) / weight

    np.testing.assert_allclose(forms(jnp.eye(flat.size)).sum(), jnp.trace(hessian), rtol=1e-9)
