"""Optimizer steps: their schedule, what decays, how calls split, and how devices share a batch."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from jaxflat import checkpoint, experiment
from jaxflat import config as base_config
from jaxflat.languages.batches import Source, masked_batch
from jaxflat.training.objectives import masked_lm_loss, prediction_losses
from jaxflat.training.optimizers import OPTIMIZERS, Schedule, decayed
from jaxflat.training.step import TrainState, train_step


def resolved(**overrides) -> FrozenConfigDict:
    config = base_config.base()
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.model.width = 8
    config.language.hmm.min_length = 4
    for key, value in overrides.items():
        config.phases.pretrain[key] = value
    return FrozenConfigDict(config)


def losses_of_first_steps(config, num_devices: int, num_steps: int) -> np.ndarray:
    mesh = experiment.sharding.make_mesh(num_devices)
    (phase,) = experiment.phases(config)
    model = experiment.make_model(config)
    steps = experiment.train_steps(model, phase.settings, "one", mesh)
    schedule = experiment.schedule(phase.settings, anneal=False)
    state = experiment.init_state(experiment.init_params(config), phase)
    state = experiment.sharding.replicate(mesh, state)
    language = experiment.make_language(config.language)
    losses = []
    for stop in range(1, num_steps + 1):
        state, loss = steps(state, Source(language), jax.random.key(1), schedule, 0, stop)
        losses.append(float(loss))
    return np.array(losses)


@pytest.mark.parametrize("targets", ["exact", pytest.param("sampled", marks=pytest.mark.slow)])
def test_eight_devices_train_like_one(targets):
    config = resolved(targets=targets)
    one, eight = (losses_of_first_steps(config, n, 30) for n in (1, 8))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[-1] < one[0]


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "muon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sgd", "lion", "sam"))],
)
def test_calls_of_any_length_and_stored_in_between_are_the_same_training(optimizer, tmp_path):
    config = resolved(optimizer={**base_config.phase().optimizer, "name": optimizer})
    (phase,) = experiment.phases(config)
    mesh = experiment.sharding.make_mesh(1)
    steps = experiment.train_steps(experiment.make_model(config), phase.settings, "one", mesh)
    schedule = experiment.schedule(phase.settings, anneal=False)
    language = experiment.make_language(config.language)
    finals = []
    for stops in ((12,), (5, 6, 12)):
        state = experiment.init_state(experiment.init_params(config), phase)
        for stop in stops:
            state, _ = steps(state, Source(language), jax.random.key(1), schedule, 0, stop)
            checkpoint.save(tmp_path / str(len(stops)), stop, state)
            state = checkpoint.restore(tmp_path / str(len(stops)), stop, state)
        finals.append(state)
    jax.tree.map(np.testing.assert_array_equal, *finals)


def test_exact_targets_have_the_mean_gradient_of_sampled_ones():
    config = resolved()
    language, model = (make(config) for make in (lambda c: experiment.make_language(c.language),
                                                 experiment.make_model))  # fmt: skip
    params = experiment.init_params(config)
    batch = masked_batch(language, jax.random.key(0), 1, "exact")
    gradient_of = jax.jit(jax.grad(lambda p, b: masked_lm_loss(model.apply)(p, b)[0]))

    def labelled(word):
        one_hot_1x1xV = jax.nn.one_hot(jnp.full((1, 1), word), language.num_words)
        return gradient_of(params, replace(batch, targets_BxMxV=one_hot_1x1xV))

    expected = jax.tree.map(jnp.zeros_like, params)
    for word, probability in enumerate(batch.targets_BxMxV[0, 0]):
        expected = jax.tree.map(lambda e, g, p=probability: e + p * g, expected, labelled(word))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        gradient_of(params, batch),
        expected,
    )


def test_prediction_losses_are_entropies_and_divergences():
    exact_BxMxV, model_BxMxV = (
        jax.nn.log_softmax(jax.random.normal(jax.random.key(i), (2, 3, 5))) for i in (0, 1)
    )
    words_BxM = jnp.array([[0, 4, 2], [3, 1, 1]])
    losses = prediction_losses(model_BxMxV, exact_BxMxV, words_BxM)
    p, f = np.exp(exact_BxMxV), np.asarray(model_BxMxV)
    np.testing.assert_allclose(
        losses["excess_loss"], (p * (np.log(p) - f)).sum(-1), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(losses["optimal_loss"], -(p * np.log(p)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(losses["loss"][1, 0], -f[1, 0, 3], rtol=1e-6)
    same = prediction_losses(exact_BxMxV, exact_BxMxV, words_BxM)
    assert np.all(same["excess_loss"] == 0)


def test_schedule_warms_up_stays_and_decays_to_nothing():
    schedule = Schedule(learning_rate=2.0, warmup_steps=4, decay_steps=5, total_steps=20)
    rates = [float(schedule(jnp.asarray(step))) for step in range(20)]
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(rates[4:15], 2.0)
    np.testing.assert_allclose(rates[15:], [2.0, 1.6, 1.2, 0.8, 0.4], rtol=1e-6)
    anneal = Schedule(learning_rate=2.0, warmup_steps=0, decay_steps=5, total_steps=5)
    np.testing.assert_allclose([float(anneal(jnp.asarray(s))) for s in range(5)], rates[15:])


REFERENCES = {
    "adamw": partial(optax.adamw, mask=decayed),
    "sgd": optax.sgd,
    "lion": partial(optax.lion, mask=decayed),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_unit_rate_optimizer_times_the_rate_is_the_optimizer_at_that_rate(name):
    settings = dict(base_config.phase().optimizer[name])
    params = {"kernel": jnp.array([1.0, -2.0]), "scale": jnp.array([3.0])}
    gradient = {"kernel": jnp.array([0.3, 0.1]), "scale": jnp.array([-0.2])}
    settings |= {"momentum": 0.9} if name == "sgd" else {"weight_decay": 0.1}
    reference = REFERENCES[name](0.05, **settings)
    ours = OPTIMIZERS[name](**settings)
    states = ours.init(params), reference.init(params)
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            unit, first = ours.update(gradient, states[0], params)
            expected, second = reference.update(gradient, states[1], params)
        states = first, second
        jax.tree.map(
            lambda u, e: np.testing.assert_allclose(0.05 * u, e, rtol=1e-5), unit, expected
        )


@pytest.mark.parametrize("num_shards", [1, 2])
def test_sam_takes_the_gradient_from_up_the_slope(num_shards):
    """Logistic regression: the gradient at theta + radius g / |g|, by hand in NumPy."""
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
    sam, adamw = OPTIMIZERS["sam"](radius=0.5, **settings), OPTIMIZERS["adamw"](**settings)
    with jax.enable_x64(True):
        batch = jnp.asarray(features_BxF), jnp.asarray(labels_B, jnp.float64)
        state = TrainState(jax.tree.map(jnp.asarray, params), sam.init(params), jnp.asarray(0))
        expected_state = adamw.init(params)
        for _ in range(3):
            how = (jnp.asarray(0.1), loss_fn, sam, num_shards)
            state, _ = train_step(state, batch, *how)
            here = slope(params)
            norm = np.sqrt(sum((g**2).sum() for g in here.values()))
            there = slope({name: params[name] + 0.5 * here[name] / norm for name in params})
            with jax.numpy_dtype_promotion("standard"):
                updates, expected_state = adamw.update(there, expected_state, params)
            params = {name: params[name] + 0.1 * np.asarray(updates[name]) for name in params}
        for name, expected in params.items():
            np.testing.assert_allclose(state.params[name], expected, rtol=1e-6)


def test_muon_turns_each_matrix_of_a_stack_into_an_orthogonal_one():
    """Of a gradient G = P S Q' the first step is near P Q', at RMS 0.2; the rest is NAdam's."""
    config = resolved()
    params = experiment.init_params(config)
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    gradient = jax.tree.map(lambda p, key: jax.random.normal(key, p.shape), params, keys)
    settings = dict(base_config.phase().optimizer.muon)
    optimizer = OPTIMIZERS["muon"](**settings)
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


def test_weight_decay_spares_norms_and_biases_also_where_layers_are_stacked():
    config = resolved()
    params = experiment.init_params(config)
    mask = decayed(params)
    stack, last = mask["stack"], mask["last"]
    assert stack == last
    assert stack["mlp_in"] == {"kernel": True, "bias": False}
    assert stack["mlp_norm"] == {"scale": False, "bias": False}
    assert mask["token_embedding"]
    assert not mask["decoder_bias"]
