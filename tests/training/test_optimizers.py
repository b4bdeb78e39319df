"""Optimizers with learning rate 1 against optax and linear algebra; schedule; weight decay."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config.optimizers import OF_OPTAX
from jaxflat.runs import builders
from jaxflat.training.gradient import Division, loss_and_gradient
from jaxflat.training.optimizers import Schedule, decay_mask, make_optimizer, muon_axes
from jaxflat.training.step import TrainState, train_step


def initial_params():
    config = base_config.base()
    config.init_seed, config.model.width = 0, 8
    return builders.init_params(FrozenConfigDict(config))


def test_schedule_warms_up_stays_constant_and_decays_to_0():
    schedule = Schedule(learning_rate=2.0, warmup_steps=4, decay_steps=5, total_steps=20)
    rates = [float(schedule(jnp.asarray(step))) for step in range(20)]
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(rates[4:15], 2.0)
    np.testing.assert_allclose(rates[15:], [2.0, 1.6, 1.2, 0.8, 0.4], rtol=1e-6)
    anneal = Schedule(learning_rate=2.0, warmup_steps=0, decay_steps=5, total_steps=5)
    np.testing.assert_allclose([float(anneal(jnp.asarray(s))) for s in range(5)], rates[15:])


MASKED = ("adamw", "lion", "adamaxw", "adan", "nadamw")
REFERENCES = {
    **{name: getattr(optax, name) for name in ("sgd", "lion", "adamw", *OF_OPTAX)},
    **{name: partial(getattr(optax, name), mask=decay_mask) for name in MASKED},
    "adadelta": partial(optax.adadelta, weight_decay_mask=decay_mask),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_unit_rate_optimizer_times_the_rate_is_the_optimizer_at_that_rate(name):
    """For single leaves too: no optimizer may combine several parameters."""
    settings = dict(base_config.phase().optimizer[name])
    settings |= {"momentum": 0.9} if name == "sgd" else {}
    settings |= {"weight_decay": 0.1} if "weight_decay" in settings else {}
    params = {"kernel": jnp.array([1.0, -2.0]), "scale": jnp.array([3.0])}
    gradient = {"kernel": jnp.array([0.3, 0.1]), "scale": jnp.array([-0.2])}
    reference = REFERENCES[name](0.05, **settings)
    ours = make_optimizer(name, settings)
    halves = [{"kernel": slice(0, 1)}, {"kernel": slice(1, 2)}, {"scale": slice(0, 1)}]
    apart = [{k: params[k][place] for k, place in half.items()} for half in halves]
    states = ours.init(params), reference.init(params), [ours.init(part) for part in apart]
    for step in range(1, 4):
        gradient = {name: g * step for name, g in gradient.items()}
        with jax.numpy_dtype_promotion("standard"):
            unit, first = ours.update(gradient, states[0], params)
            expected, second = reference.update(gradient, states[1], params)
            alone = [
                ours.update({k: gradient[k][place] for k, place in half.items()}, state, part)
                for half, state, part in zip(halves, states[2], apart, strict=True)
            ]
        states = first, second, [state for _, state in alone]
        for leaf, value in unit.items():
            np.testing.assert_allclose(0.05 * value, expected[leaf], rtol=1e-5)
            parts = [update[leaf] for update, _ in alone if leaf in update]
            np.testing.assert_allclose(np.concatenate(parts), value, rtol=1e-6)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.slow
def test_sam_takes_the_gradient_at_the_ascent_point(num_shards):
    """Logistic regression: the gradient at theta + radius g / |g|, in NumPy."""
    rng = np.random.default_rng(0)
    params = {"scale": rng.normal(size=3), "kernel": rng.normal(size=5)}
    features_BxF, labels_B = rng.normal(size=(16, 8)), rng.integers(0, 2, 16)

    def slope(params):
        logits_B = features_BxF @ np.concatenate([params["scale"], params["kernel"]])
        errors_B = 1 / (1 + np.exp(-logits_B)) - labels_B
        scale, kernel = np.split(features_BxF.T @ errors_B / 16, [3])
        return {"scale": scale, "kernel": kernel}

    def loss_fn(params, batch):
        features_BxF, labels_B = batch
        logits_B = features_BxF @ jnp.concatenate([params["scale"], params["kernel"]])
        losses_B = optax.sigmoid_binary_cross_entropy(logits_B, labels_B)
        return losses_B.sum(), jnp.asarray(len(labels_B), losses_B.dtype)

    settings = dict(base_config.phase().optimizer.adamw) | {"weight_decay": 0.1}
    sam = make_optimizer("sam", {"radius": 0.5, **settings})
    adamw = make_optimizer("adamw", settings)
    with jax.enable_x64(True):
        batch = jnp.asarray(features_BxF), jnp.asarray(labels_B, jnp.float64)
        state = TrainState(jax.tree.map(jnp.asarray, params), sam.init(params), jnp.asarray(0))
        expected_state = adamw.init(params)
        for _ in range(3):
            gradient_fn = partial(loss_and_gradient, loss_fn, batch, division=Division(num_shards))
            state, _ = train_step(state, jnp.asarray(0.1), gradient_fn, sam)
            here = slope(params)
            norm = np.sqrt(sum((g**2).sum() for g in here.values()))
            there = slope({name: params[name] + 0.5 * here[name] / norm for name in params})
            with jax.numpy_dtype_promotion("standard"):
                updates, expected_state = adamw.update(there, expected_state, params)
            params = {name: params[name] + 0.1 * np.asarray(updates[name]) for name in params}
        for name, expected in params.items():
            np.testing.assert_allclose(state.params[name], expected, rtol=1e-6)


@pytest.mark.slow
def test_muon_turns_each_matrix_of_a_stack_into_an_orthogonal_one():
    """For a gradient G = P S Q' the first step is near P Q', at RMS 0.2; NAdam takes the rest."""
    params = initial_params()
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    gradient = jax.tree.map(lambda p, key: jax.random.normal(key, p.shape), params, keys)
    settings = dict(base_config.phase().optimizer.muon)
    optimizer = make_optimizer("muon", settings)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
        nadam = optax.nadam(1.0)
        others, _ = nadam.update(gradient, nadam.init(params))

    def matrices(tree):
        for name in ("stack", "last"):
            block = tree[name]
            for kernel in (block["mlp_in"], block["mlp_out"], block["attention"]["out"]):
                yield from np.asarray(kernel["kernel"]).reshape(-1, *kernel["kernel"].shape[-2:])
            qkv_3xDxD = np.moveaxis(block["attention"]["qkv"]["kernel"], -2, 0)
            yield from qkv_3xDxD.reshape(-1, *qkv_3xDxD.shape[-2:])

    found = list(zip(matrices(gradient), matrices(updates), strict=True))
    assert len(found) == 2 * (3 + 3)
    for slope, update in found:
        left, _, right = np.linalg.svd(slope, full_matrices=False)
        inner = -left.T @ update @ right.T / (0.2 * max(update.shape) ** 0.5)
        singular = np.diag(inner)
        np.testing.assert_allclose(inner, np.diag(singular), atol=1e-4)
        assert np.all((singular > 0.3) & (singular < 1.3)), singular
    for name in ("token_embedding", "position_embedding", "decoder_bias"):
        np.testing.assert_allclose(updates[name], others[name], rtol=1e-5)


def test_muons_matrices_of_an_lstm_are_its_gates_and_joins():
    config = base_config.base()
    config.init_seed = 0
    config.model.update({"name": "lstm", "width": 8})
    params = builders.init_params(FrozenConfigDict(config))
    axes = muon_axes(params)
    assert axes["stack"] == axes["last"]
    assert axes["last"]["forward"] == axes["last"]["backward"]
    # Each kernel is D x 4 x E or E x 4 x E: a matrix a gate; 2 x E x D: a matrix a direction.
    gates, direction = params["last"]["forward"], axes["last"]["forward"]
    for name in ("input_kernel", "recurrent_kernel"):
        assert gates[name].shape == (8, 4, 8)
        assert tuple(direction[name]) == (-3, -1)
    assert tuple(axes["last"]["join"]["kernel"]) == (-2, -1)
    assert direction["bias"] is axes["token_embedding"] is axes["last"]["norm"]["scale"] is None
    assert not decay_mask(params)["last"]["forward"]["bias"]


def test_weight_decay_spares_norms_and_biases_of_stacked_layers_too():
    params = initial_params()
    mask = decay_mask(params)
    stack, last = mask["stack"], mask["last"]
    assert stack == last
    assert stack["mlp_in"] == {"kernel": True, "bias": False}
    assert stack["mlp_norm"] == {"scale": False, "bias": False}
    assert mask["token_embedding"]
    assert not mask["decoder_bias"]
