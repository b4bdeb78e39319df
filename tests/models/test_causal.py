"""The decoder-only transformer against plain numpy, and its cache against the full forward."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.models.causal import CausalTransformer, empty_cache

V, B, S = 11, 3, 9
TOKENS_BxS = np.random.default_rng(0).integers(0, V, (B, S)).astype(np.int32)


@cache
def make(activation: str = "gelu", seed: int = 0):
    model = CausalTransformer(V, S + 3, 8, 3, 2, 12, activation)
    params = jax.jit(model.init)(jax.random.key(seed), TOKENS_BxS)["params"]
    # Away from the initial zeros and ones, so that every leaf matters.
    rng = np.random.default_rng(seed)
    noise = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), params)
    return model, jax.tree.map(jnp.add, params, noise)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@partial(jax.jit, static_argnames="model")
def apply(model, params, tokens_BxS, cache=None, start=0):
    return model.apply({"params": params}, tokens_BxS, cache, start)


def normed(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def dense_logits(model, params, tokens_S):
    """One sentence at a time, one layer, head and position after the other, in numpy."""
    params = jax.tree.map(np.asarray, params)
    stack, head_size = params["stack"], model.width // model.num_heads
    x_SxD = params["token_embedding"][tokens_S] + params["position_embedding"][: len(tokens_S)]
    for layer in range(model.num_layers):
        p = jax.tree.map(lambda leaf: leaf[layer], stack)  # noqa: B023
        y_SxD = normed(x_SxD, **p["attention_norm"])
        q, k, v = (
            y_SxD @ p["attention"]["qkv"]["kernel"][:, c] + p["attention"]["qkv"]["bias"][c]
            for c in range(3)
        )
        mixed_SxD = np.zeros_like(x_SxD)
        for head in range(model.num_heads):
            part = slice(head * head_size, (head + 1) * head_size)
            for t in range(len(tokens_S)):
                weights = np.exp(k[: t + 1, part] @ q[t, part] / np.sqrt(head_size))
                mixed_SxD[t, part] = weights @ v[: t + 1, part] / weights.sum()
        x_SxD = x_SxD + mixed_SxD @ p["attention"]["out"]["kernel"] + p["attention"]["out"]["bias"]
        inner = normed(x_SxD, **p["mlp_norm"]) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
        if model.activation == "relu":
            inner = np.maximum(inner, 0)
        else:
            cubic = np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)
            inner = inner / 2 * (1 + np.tanh(cubic))
        x_SxD = x_SxD + inner @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
    return normed(x_SxD, **params["final_norm"]) @ params["token_embedding"].T


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.slow
def test_forward_is_that_of_plain_numpy(activation, float64):
    model, params = make(activation)
    params = float64(params)
    logits_BxSxV, _ = apply(model, params, TOKENS_BxS)
    assert logits_BxSxV.dtype == np.float64
    expected = [dense_logits(model, params, tokens_S) for tokens_S in TOKENS_BxS]
    np.testing.assert_allclose(logits_BxSxV, expected, atol=1e-10)


@pytest.mark.slow
def test_a_logit_depends_on_this_and_all_earlier_positions_and_on_no_later_one():
    model, params = make()

    def logits(positions_PxD):
        changed = params | {"position_embedding": positions_PxD}
        return model.apply({"params": changed}, TOKENS_BxS[:1])[0][0].sum(-1)

    jacobian_SxPxD = jax.jit(jax.jacobian(logits))(params["position_embedding"])
    depends_SxS = np.abs(jacobian_SxPxD).max(-1)[:, :S] > 0
    np.testing.assert_array_equal(depends_SxS, np.tri(S, dtype=bool))


@pytest.mark.parametrize("t", range(S))
def test_other_tokens_later_change_no_logit_before(t):
    model, params = make()
    changed_BxS = TOKENS_BxS.copy()
    changed_BxS[:, t] = (changed_BxS[:, t] + 1) % V
    logits, _ = apply(model, params, TOKENS_BxS)
    changed, _ = apply(model, params, changed_BxS)
    np.testing.assert_array_equal(logits[:, :t], changed[:, :t])
    assert np.all(np.any(logits[:, t:] != changed[:, t:], axis=-1))


@pytest.mark.parametrize("chunks", [[1] * S, [4, 3, 2], [S], [2, 1, 6]])
@pytest.mark.slow
def test_decoding_by_chunks_is_the_full_forward(chunks, float64):
    model, params = make()
    params = float64(params)
    full_BxSxV, full_cache = apply(model, params, TOKENS_BxS)
    # Whatever stands in slots yet to be written is never seen.
    filled = jax.tree.map(lambda x: x + 1e6, empty_cache(model, B, S + 2, jnp.float64))
    start = 0
    for size in chunks:
        tokens = TOKENS_BxS[:, start : start + size]
        logits, filled = apply(model, params, tokens, filled, np.int32(start))
        np.testing.assert_allclose(logits, full_BxSxV[:, start : start + size], atol=1e-10)
        start += size
    for slots, expected in zip(filled, full_cache, strict=True):
        np.testing.assert_allclose(slots[:, :, :S], expected, atol=1e-10)
        np.testing.assert_array_equal(slots[:, :, S:], 1e6)


def test_candidates_share_a_prefix(float64):
    model, params = make()
    params = float64(params)
    prefix_1xP, candidates_NxS = TOKENS_BxS[:1, :5], TOKENS_BxS[:, 5:]
    whole_NxS = np.concatenate([np.repeat(prefix_1xP, B, axis=0), candidates_NxS], axis=1)
    expected_NxSxV = apply(model, params, whole_NxS)[0][:, 5:]
    prefix = empty_cache(model, 1, S, jnp.float64)
    _, prefix = apply(model, params, prefix_1xP, prefix)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, B, axis=1), prefix)
    logits_NxSxV, _ = apply(model, params, candidates_NxS, repeated, 5)
    np.testing.assert_allclose(logits_NxSxV, expected_NxSxV, atol=1e-10)

    def one(tokens_S, start):
        return apply(model, params, tokens_S[None], prefix, start)[0][0]

    starts_N = jnp.full(B, 5, jnp.int32)
    np.testing.assert_allclose(jax.vmap(one)(candidates_NxS, starts_N), expected_NxSxV, atol=1e-10)


def test_logits_of_some_tokens_are_those_of_all_in_the_order_asked_for():
    model, params = make()
    some = np.array([7, 0, 3], np.int32)
    all_BxSxV, _ = apply(model, params, TOKENS_BxS)
    logits_BxSx3, filled = model.apply({"params": params}, TOKENS_BxS, None, 0, some)
    np.testing.assert_allclose(logits_BxSx3, np.asarray(all_BxSxV)[..., some], atol=1e-5)
    assert filled.keys_LxBxTxHxE.shape[:3] == (model.num_layers, B, S)


def test_tokens_without_room_are_refused():
    model, params = make()
    slots = empty_cache(model, B, S, jnp.float32)
    run = partial(model.apply, {"params": params})
    with pytest.raises(ValueError, match=r"positions 4\.\.12 have no room.* hold 0\.\.8"):
        run(TOKENS_BxS, slots, 4)
    with pytest.raises(ValueError, match=r"positions 0\.\.17 have no room.* hold 0\.\.11"):
        run(np.tile(TOKENS_BxS, 2))
    with pytest.raises(ValueError, match=r"positions 1\.\.9 have no room"):
        run(TOKENS_BxS, None, 1)
