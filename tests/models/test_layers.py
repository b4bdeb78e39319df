"""Norms, rotary positions and the block, each argument against its equation in float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.models.layers import Block, normalise, padding_mask, rotate

B, T, D = 2, 5, 8
LENGTHS_B = np.array([5, 3], np.int32)
PLAIN = {
    **{"num_heads": 2, "mlp_width": 12, "activation": "gelu"},
    **{"norm": "layer_norm", "epsilon": 1e-5, "norm_first": True},
    **{"rotary_base": None, "use_bias": True, "causal": False},
}
BLOCKS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_first": False, "norm": "fast_layer_norm"},
        {"rotary_base": 100.0, "norm": "rms_norm", "activation": "swiglu", "use_bias": False},
        {"rotary_base": 100.0, "norm_first": False, "activation": "relu"},
    ],
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def hidden_state(num_positions=T):
    return jnp.asarray(np.random.default_rng(0).standard_normal((B, num_positions, D)))


def noisy_params(module, hidden_BxTxD, *inputs):
    """Return float64 parameters away from the initial zeros and ones, so that each matters."""
    hidden_BxTxD = hidden_BxTxD.astype(jnp.float32)  # as the initial parameters are
    params = jax.jit(module.init)(jax.random.key(0), hidden_BxTxD, *inputs)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.standard_normal(x.shape)), params
    )


class Norm(nn.Module):
    norm: str
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        return normalise("norm", x, self.norm, 1e-2, self.use_bias)


@pytest.mark.parametrize("norm", ["layer_norm", "fast_layer_norm", "rms_norm"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_norms_are_their_equations(norm, use_bias):
    x_BxTxD = hidden_state() + 1
    module = Norm(norm, use_bias)
    params = noisy_params(module, x_BxTxD)
    scale_D = np.asarray(params["norm"]["scale"])
    bias_D = np.asarray(params["norm"].get("bias", 0.0))
    assert ("bias" in params["norm"]) == (use_bias and norm != "rms_norm")
    x = np.asarray(x_BxTxD)
    if norm != "rms_norm":
        x = x - x.mean(-1, keepdims=True)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale_D + bias_D
    found = module.apply({"params": params}, x_BxTxD)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_layer_norm_takes_the_variance_around_the_mean_and_the_fast_one_does_not():
    x_1xD = np.float32(1e4) + np.arange(D, dtype=np.float32)[None] / 8
    expected = (x_1xD - x_1xD.mean()) / np.sqrt(x_1xD.astype(np.float64).var() + 1e-2)
    variables = {"params": {"norm": {"scale": jnp.ones(D, jnp.float32)}}}
    exact = Norm("layer_norm", use_bias=False).apply(variables, x_1xD)
    fast = Norm("fast_layer_norm", use_bias=False).apply(variables, x_1xD)
    np.testing.assert_allclose(exact, expected, atol=1e-5)
    assert np.abs(np.asarray(fast) - expected).max() > 1e-2


def test_rotary_positions_turn_pairs_and_products_depend_on_differences():
    x_NxLxE = np.asarray(hidden_state(3))
    positions_NxL = np.array([[0, 1, 7], [2, 3, 90]], np.int32)
    z_NxLxF = x_NxLxE[..., :4] + 1j * x_NxLxE[..., 4:]
    z_NxLxF = z_NxLxF * np.exp(1j * positions_NxL[..., None] * 50.0 ** (-np.arange(4) / 4))
    found = np.asarray(rotate(x_NxLxE, positions_NxL, 50.0))
    np.testing.assert_allclose(found[..., :4] + 1j * found[..., 4:], z_NxLxF, atol=1e-13)
    moved = rotate(x_NxLxE, positions_NxL + 11, 50.0)
    products = [np.einsum("nle,nme->nlm", x, x) for x in (found, moved)]
    np.testing.assert_allclose(*products, atol=1e-12)
    with pytest.raises(ValueError, match="even head size, got 7"):
        rotate(x_NxLxE[..., :7], positions_NxL, 50.0)


@BLOCKS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_a_position_depends_on_those_that_it_sees_and_on_no_other(changes, causal):
    block = Block(**PLAIN | changes | {"causal": causal})
    inputs = hidden_state(), padding_mask(LENGTHS_B, T)
    params = noisy_params(block, *inputs)
    # A norm's output sums to about 0: weigh the width's entries unequally.
    weights_D = jnp.arange(1.0, D + 1) ** 2

    @jax.jit
    @jax.jacobian
    def jacobian(hidden_BxTxD):
        return block.apply({"params": params}, hidden_BxTxD, inputs[1])[0] @ weights_D

    depends_BxTxBxT = np.abs(jacobian(inputs[0])).max(-1) > 0
    seen_TxT = np.tri(T, dtype=bool) if causal else np.ones((T, T), bool)
    for b, length in enumerate(LENGTHS_B):
        expected_TxT = seen_TxT & (np.arange(T) < length)[None] | np.eye(T, dtype=bool)
        np.testing.assert_array_equal(depends_BxTxBxT[b, :, b], expected_TxT)
        assert not depends_BxTxBxT[b, :, 1 - b].any()


@BLOCKS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_asked_positions_have_the_rows_of_all(changes, causal):
    block = Block(**PLAIN | changes | {"causal": causal})
    inputs = hidden_state(), padding_mask(LENGTHS_B, T)
    params = noisy_params(block, *inputs)
    apply = jax.jit(partial(block.apply, {"params": params}))
    positions_BxM = np.array([[4, 1], [0, 2]])
    everywhere_BxTxD, keys_and_values = apply(*inputs)
    asked_BxMxD, same = apply(*inputs, positions_BxM)
    expected = np.take_along_axis(np.asarray(everywhere_BxTxD), positions_BxM[..., None], axis=1)
    np.testing.assert_allclose(asked_BxMxD, expected, atol=1e-12)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), keys_and_values, same)


class TwoBlocks(nn.Module):
    """A pre-norm model with an untied decoder, whose text starts at any position."""

    rotary_base: float | None
    causal: bool

    @nn.compact
    def __call__(self, hidden_BxTxD, start):
        changes = {"rotary_base": self.rotary_base, "causal": self.causal}
        padding_BxT = jnp.zeros(hidden_BxTxD.shape[:2], bool)
        for name in ("first", "second"):
            block = Block(**PLAIN | changes, name=name)
            hidden_BxTxD, _ = block(hidden_BxTxD, padding_BxT, None, None, start)
        return nn.Dense(3)(normalise("final_norm", hidden_BxTxD, "layer_norm", 1e-5))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_logits_with_rotary_positions_depend_on_relative_positions_only(causal):
    hidden_BxTxD = hidden_state()
    model = TwoBlocks(100.0, causal)
    params = noisy_params(model, hidden_BxTxD, 0)
    apply = jax.jit(lambda hidden, start=0: model.apply({"params": params}, hidden, start))
    logits_BxTx3 = apply(hidden_BxTxD)
    np.testing.assert_allclose(apply(hidden_BxTxD, 1000), logits_BxTx3, atol=1e-10)
    # The order of the other positions matters, which only rotary positions tell here.
    order_T = np.array([0, 2, 1, 3, 4])
    swapped_BxTx3 = apply(hidden_BxTxD[:, order_T])
    assert np.abs(swapped_BxTx3 - logits_BxTx3)[:, -1].min() > 1e-4
    plain = TwoBlocks(None, causal=False)
    without, swapped = (plain.apply({"params": params}, hidden_BxTxD[:, order], 0)
                        for order in (np.arange(T), order_T))  # fmt: skip
    np.testing.assert_allclose(swapped, without[:, order_T], atol=1e-12)


@BLOCKS
@pytest.mark.slow
def test_cached_positions_are_seen_as_if_they_were_new(changes):
    block = Block(**PLAIN | changes | {"causal": True})
    hidden_BxTxD, no_padding_BxT = hidden_state(), np.zeros((B, T), bool)
    params = noisy_params(block, hidden_BxTxD, no_padding_BxT)
    apply = jax.jit(partial(block.apply, {"params": params}))
    whole_BxTxD, (keys, values) = apply(hidden_BxTxD, no_padding_BxT)
    # Three slots are written, one is not and holds anything.
    cached = tuple(
        jnp.concatenate([x[:, :, :3], x[:, :, :1] + 1e6], axis=2) for x in (keys, values)
    )
    padding_BxU = np.broadcast_to(np.arange(6) == 3, (B, 6))
    rest_Bx2xD, new = apply(hidden_BxTxD[:, 3:], padding_BxU, None, cached, 3)
    np.testing.assert_allclose(rest_Bx2xD, whole_BxTxD[:, 3:], atol=1e-12)
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-12), new, (keys[:, :, 3:], values[:, :, 3:])
    )
