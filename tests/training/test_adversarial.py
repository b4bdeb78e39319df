"""Pre-training against a downstream task: the objective and its effect."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.languages.batches import Source
from jaxflat.runs import builders, phase_loss, trajectory
from jaxflat.runs.languages import make_language

KEY = jax.random.key(3)


def resolved(strength: float, **overrides) -> FrozenConfigDict:
    config = base_config.base()
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.model.update({"width": 8, "num_layers": 1})
    config.phases.pretrain.adversary.update({"strength": strength, "num_sentences": 128})
    config.phases.pretrain.update(overrides)
    return FrozenConfigDict(config)


def objective(config, num_devices=1):
    model, mesh = builders.make_model(config), builders.sharding.make_mesh(num_devices)
    loss_fn, _ = builders.loss_functions(model)
    (phase,) = trajectory.phases(config)
    return phase_loss.make_loss_and_sampler(model, loss_fn, phase.settings, "one", mesh)


def train(config, num_steps: int, num_devices=1):
    """Return the parameters after some steps, and the mean loss of the steps."""
    mesh = builders.sharding.make_mesh(num_devices)
    (phase,) = trajectory.phases(config)
    steps = builders.train_steps(builders.make_model(config), phase.settings, "one", mesh)
    state = builders.init_state(builders.init_params(config), phase)
    state = builders.sharding.replicate(mesh, state)
    schedule = builders.schedule(phase.settings, anneal=False)
    source = Source(make_language(config.language))
    state, loss = steps(state, source, KEY, schedule, 0, num_steps)
    return state.params, float(loss)


def parts(config, params):
    """Return (mean pre-training loss, downstream loss) of one batch, and the objective's own."""
    source = Source(make_language(config.language))
    loss_fn, sample_batch = objective(config)
    batch = jax.jit(sample_batch)(source, KEY, jnp.asarray(0))
    model = builders.make_model(config)
    plain, weight = builders.loss_functions(model)[0](params, batch.masked)
    settings = config.phases.pretrain.adversary
    downstream = phase_loss._downstream_loss(
        model.apply, settings.l2, params, batch.fit, batch.held_out
    )
    return float(plain / weight), float(downstream), float(loss_fn(params, batch)[0] / weight)


@pytest.mark.slow
def test_objective_is_the_difference_and_strength_zero_is_plain_training():
    config = resolved(0.3)
    plain, downstream, both = parts(config, builders.init_params(config))
    np.testing.assert_allclose(both, plain - 0.3 * downstream, rtol=1e-5)
    loss_fn, sample_batch = objective(resolved(0.0))
    assert loss_fn is builders.loss_functions(builders.make_model(config))[0]
    source = Source(make_language(config.language))
    masked = jax.jit(objective(config)[1])(source, KEY, jnp.asarray(0)).masked
    same = jax.jit(sample_batch)(source, KEY, jnp.asarray(0))
    jax.tree.map(np.testing.assert_array_equal, masked, same)


def test_the_head_is_judged_on_other_sentences_than_it_was_fitted_to():
    batch = jax.jit(objective(resolved(0.3))[1])(
        Source(make_language(resolved(0.3).language)), KEY, jnp.asarray(0)
    )
    assert not np.array_equal(batch.fit[0].tokens_BxT, batch.held_out[0].tokens_BxT)


@pytest.mark.slow
def test_the_gradient_includes_the_response_of_the_head():
    """Against finite differences of the objective, which refit the head."""
    config = resolved(1.0)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), builders.init_params(config))
        loss_fn, sample_batch = objective(config)
        source = Source(make_language(config.language))
        batch = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x,
            jax.jit(sample_batch)(source, KEY, jnp.asarray(0)),
        )
        total = jax.jit(lambda p: loss_fn(p, batch)[0])
        leaves = jax.tree.leaves(params)
        direction = jax.tree.unflatten(
            jax.tree.structure(params),
            [jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(leaves)],
        )

        def at(step):
            return total(jax.tree.map(lambda p, d: p + step * d, params, direction))

        gradient = jax.grad(total)(params)
        slope = sum(
            (g * d).sum()
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_train_like_one():
    config = resolved(0.1)
    one, eight = (train(config, 5, n)[1] for n in (1, 8))
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.slow
def test_the_sign_of_strength_decides_the_direction_of_the_downstream_loss():
    """To first order, a step on L - s D changes D by +s times the squared norm of D's gradient.

    Compared with plain steps, an adversary raises D and a helper lowers it.
    """
    steps = {"optimizer": {"name": "sgd"}, "schedule": {"learning_rate": 0.005, "warmup_steps": 0}}
    settings = {s: resolved(s, **steps) for s in (-1.0, 0.0, 1.0)}
    after = {s: parts(settings[1.0], train(c, 20)[0])[1] for s, c in settings.items()}
    helper, adversary = after[-1.0] - after[0.0], after[1.0] - after[0.0]
    assert helper < 0 < adversary
    np.testing.assert_allclose(-helper, adversary, rtol=0.3)


TWO_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
from tests.training.test_adversarial import resolved, train
print(train(resolved(0.1), 20, num_devices=2)[1])
"""


@pytest.mark.slow
def test_two_devices_on_two_threads_do_not_deadlock():
    """Fitting the heads of several tasks as one LAPACK batch deadlocked on two cores."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = ["taskset", "--cpu-list", "0,1"] if shutil.which("taskset") else []
    command += [sys.executable, "-c", TWO_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert np.isfinite(float(done.stdout))
