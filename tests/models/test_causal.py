"""The decoder-only transformer against plain numpy, and its cache against the full forward."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.models.causal import CausalTransformer, empty_cache

V, B, S = 11, 3, 9
TOKENS_BxS = np.random.default_rng(0).integers(0, V, (B, S)).astype(np.int32)


# Every argument in its other value than GPT-2's, alone and together.
FAMILIES = {
    "gpt2": {"activation": "gelu"},
    "exact_gelu": {"activation": "exact_gelu"},
    "opt": {"activation": "relu"},
    "swiglu": {"activation": "swiglu"},
    "fast_norm": {"activation": "relu", "norm": "fast_layer_norm", "epsilon": 1e-3},
    "rms_norm": {"activation": "gelu", "norm": "rms_norm", "epsilon": 1e-2},
    "post_norm": {"activation": "gelu", "norm_first": False},
    "rotary": {"activation": "gelu", "rotary_base": 100.0},
    "no_bias": {"activation": "gelu", "use_bias": False},
    "llama": {
        **{"activation": "swiglu", "norm": "rms_norm", "epsilon": 1e-6},
        **{"rotary_base": 1e4, "use_bias": False},
    },
}


@cache
def make(family: str = "gpt2", seed: int = 0):
    model = CausalTransformer(V, S + 3, 8, 3, 2, 12, **FAMILIES[family])
    initialize = jax.jit(partial(model.init, method="next_logits"))
    params = initialize(jax.random.key(seed), TOKENS_BxS)["params"]
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
    return model.apply({"params": params}, tokens_BxS, cache, start, method="next_logits")


def normed(model, x, scale, bias=0.0):
    if model.norm != "rms_norm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.epsilon) * scale + bias


def dense(x, kernel, bias=0.0):
    return x @ kernel + bias


def activated(model, inner):
    if model.activation == "relu":
        return np.maximum(inner, 0)
    if model.activation == "exact_gelu":
        return inner * (1 + np.vectorize(math.erf)(inner / np.sqrt(2))) / 2
    return inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))


def mlp(model, p, x):
    inner = dense(x, **p["mlp_in"])
    if model.activation == "swiglu":
        gate = dense(x, **p["mlp_gate"])
        return dense(gate / (1 + np.exp(-gate)) * inner, **p["mlp_out"])
    return dense(activated(model, inner), **p["mlp_out"])


def turned(x_E, position, base):
    """Return a head's query or key as pairs of one complex number each, turned by its position."""
    half = len(x_E) // 2
    z = x_E[:half] + 1j * x_E[half:]
    return z * np.exp(1j * position * base ** (-np.arange(half) / half))


def attention(model, p, x_SxD):
    head_size = model.width // model.num_heads
    kernel_Dx3xD, biases = p["qkv"]["kernel"], p["qkv"].get("bias", np.zeros(3))
    q, k, v = (x_SxD @ kernel_Dx3xD[:, c] + biases[c] for c in range(3))
    mixed_SxD = np.zeros_like(x_SxD)
    for head in range(model.num_heads):
        part = slice(head * head_size, (head + 1) * head_size)
        for t in range(len(x_SxD)):
            if model.rotary_base is None:
                scores = k[: t + 1, part] @ q[t, part]
            else:
                asked = turned(q[t, part], t, model.rotary_base)
                keys = [turned(k[s, part], s, model.rotary_base) for s in range(t + 1)]
                scores = np.array([(asked.conj() * key).real.sum() for key in keys])
            weights = np.exp(scores / np.sqrt(head_size))
            mixed_SxD[t, part] = weights @ v[: t + 1, part] / weights.sum()
    return dense(mixed_SxD, **p["out"])


def dense_logits(model, params, tokens_S):
    """One sentence at a time, one layer, head and position after the other, in numpy."""
    params = jax.tree.map(np.asarray, params)
    x_SxD = params["token_embedding"][tokens_S]
    if model.rotary_base is None:
        x_SxD = x_SxD + params["position_embedding"][: len(tokens_S)]
    for layer in range(model.num_layers):
        p = jax.tree.map(lambda leaf: leaf[layer], params["stack"])  # noqa: B023
        if model.norm_first:
            x_SxD = x_SxD + attention(
                model, p["attention"], normed(model, x_SxD, **p["attention_norm"])
            )
            x_SxD = x_SxD + mlp(model, p, normed(model, x_SxD, **p["mlp_norm"]))
        else:
            mixed_SxD = attention(model, p["attention"], x_SxD)
            x_SxD = normed(model, x_SxD + mixed_SxD, **p["attention_norm"])
            x_SxD = normed(model, x_SxD + mlp(model, p, x_SxD), **p["mlp_norm"])
    if model.norm_first:
        x_SxD = normed(model, x_SxD, **params["final_norm"])
    return x_SxD @ params["token_embedding"].T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_forward_is_that_of_plain_numpy(family, float64):
    model, params = make(family)
    params = float64(params)
    logits_BxSxV, _ = apply(model, params, TOKENS_BxS)
    assert logits_BxSxV.dtype == np.float64
    expected = [dense_logits(model, params, tokens_S) for tokens_S in TOKENS_BxS]
    np.testing.assert_allclose(logits_BxSxV, expected, atol=1e-10)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert ("bias" in names) == model.use_bias
    assert ("position_embedding" in names) == (model.rotary_base is None)


@pytest.mark.slow
def test_a_logit_depends_on_this_and_all_earlier_positions_and_on_no_later_one():
    model, params = make()

    def logits(positions_PxD):
        changed = params | {"position_embedding": positions_PxD}
        return apply(model, changed, TOKENS_BxS[:1])[0][0].sum(-1)

    jacobian_SxPxD = jax.jit(jax.jacobian(logits))(params["position_embedding"])
    depends_SxS = np.abs(jacobian_SxPxD).max(-1)[:, :S] > 0
    np.testing.assert_array_equal(depends_SxS, np.tri(S, dtype=bool))


@pytest.mark.parametrize(
    ("family", "t"), [*(("gpt2", t) for t in range(S)), ("post_norm", 4), ("llama", 4)]
)
def test_other_tokens_later_change_no_logit_before(family, t):
    model, params = make(family)
    changed_BxS = TOKENS_BxS.copy()
    changed_BxS[:, t] = (changed_BxS[:, t] + 1) % V
    logits, _ = apply(model, params, TOKENS_BxS)
    changed, _ = apply(model, params, changed_BxS)
    np.testing.assert_array_equal(logits[:, :t], changed[:, :t])
    assert np.all(np.any(logits[:, t:] != changed[:, t:], axis=-1))


@pytest.mark.parametrize(
    ("family", "chunks"),
    [
        *[("gpt2", chunks) for chunks in ([1] * S, [4, 3, 2], [S], [2, 1, 6])],
        *[(family, [4, 3, 2]) for family in ("post_norm", "llama")],
    ],
)
@pytest.mark.slow
def test_decoding_by_chunks_is_the_full_forward(family, chunks, float64):
    model, params = make(family)
    params = float64(params)
    full_BxSxV, full_cache = apply(model, params, TOKENS_BxS)
    # No position sees an unwritten slot.
    filled = jax.tree.map(lambda x: x + 1e6, empty_cache(model, B, S + 2, jnp.float64))
    start = 0
    for size in chunks:
        tokens = TOKENS_BxS[:, start : start + size]
        logits, filled = apply(model, params, tokens, filled, np.int32(start))
        np.testing.assert_allclose(logits, full_BxSxV[:, start : start + size], atol=1e-10)
        start += size
    for slots, expected in zip(filled, full_cache, strict=True):
        np.testing.assert_allclose(slots[:, :, :, :S], expected, atol=1e-10)
        np.testing.assert_array_equal(slots[:, :, :, S:], 1e6)


@pytest.mark.slow
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


@pytest.mark.slow
def test_logits_of_some_tokens_are_those_of_all_in_the_order_asked_for():
    model, params = make()
    some = np.array([7, 0, 3], np.int32)
    all_BxSxV, _ = apply(model, params, TOKENS_BxS)
    logits_BxSx3, filled = model.apply(
        {"params": params}, TOKENS_BxS, None, 0, some, method="next_logits"
    )
    np.testing.assert_allclose(logits_BxSx3, np.asarray(all_BxSxV)[..., some], atol=1e-5)
    heads = (model.num_heads, S, model.width // model.num_heads)
    assert filled.keys_LxBxHxTxE.shape == (model.num_layers, B, *heads)


def test_tokens_without_room_are_refused():
    model, params = make()
    slots = empty_cache(model, B, S, jnp.float32)
    run = partial(model.apply, {"params": params}, method="next_logits")
    with pytest.raises(ValueError, match=r"positions 4\.\.12 do not fit.* have positions 0\.\.8"):
        run(TOKENS_BxS, slots, 4)
    with pytest.raises(ValueError, match=r"positions 0\.\.17 do not fit.* have positions 0\.\.11"):
        run(np.tile(TOKENS_BxS, 2))
    with pytest.raises(ValueError, match=r"positions 1\.\.9 do not fit"):
        run(TOKENS_BxS, None, 1)


@pytest.mark.parametrize("family", ["gpt2", "fast_norm", "post_norm", "llama"])
@pytest.mark.slow
def test_hessian_vector_products_are_those_of_central_differences_of_the_gradient(family, float64):
    model, params = make(family)
    flat, unravel = ravel_pytree(float64(params))
    vector = jnp.asarray(np.random.default_rng(1).standard_normal(flat.shape))

    def loss(x):
        return -jax.nn.log_softmax(apply(model, unravel(x), TOKENS_BxS)[0])[..., 0].mean()

    gradient = jax.jit(jax.grad(loss))
    step = 1e-6 * vector
    expected = (gradient(flat + step) - gradient(flat - step)) / 2e-6
    forward = jax.jit(lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1])(flat, vector)
    reverse = jax.jit(jax.grad(lambda x, v: jnp.vdot(jax.grad(loss)(x), v)))(flat, vector)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(forward, expected, atol=1e-7 * scale)
    np.testing.assert_allclose(reverse, forward, atol=1e-12 * scale)
