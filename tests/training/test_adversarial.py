"""Pre-training against a downstream task: the objective and its effect."""

import os
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.languages.batches import Source
from jaxflat.runs import builders, phase_loss, trajectory
from jaxflat.runs.languages import make_language
from jaxflat.training.adversarial import adversarial_gradient
from jaxflat.training.gradient import WHOLE, loss_and_gradient

KEY = jax.random.key(3)


def resolved(strength: float, block: str = "", **overrides) -> FrozenConfigDict:
    """Return the config of a masked model, or of a causal one of a block."""
    config = base_config.base()
    if block:
        config.language.masking = "causal"
        config.model.update({"name": "causal", "block": block})
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.model.update({"width": 8, "num_layers": 1})
    config.phases.pretrain.adversary.update({"strength": strength, "num_sentences": 128})
    config.phases.pretrain.update(overrides)
    return FrozenConfigDict(config)


def drawn(config):
    """Return the first batch of training."""
    (phase,) = trajectory.phases(config)
    mesh = builders.sharding.make_mesh(1)
    masking = config.language.masking
    sample_batch = phase_loss.make_sampler(phase.settings, masking, mesh, WHOLE)
    return jax.jit(sample_batch)(Source(make_language(config.language)), KEY, jnp.asarray(0))


def objective(config, batch):
    """Return params -> (value, gradient) of what training minimises on a batch."""
    model, (phase,) = builders.make_model(config), trajectory.phases(config)
    plain = partial(loss_and_gradient, builders.loss_functions(model)[0], batch.pretraining)
    adversary = phase_loss.make_adversary(model.apply, phase.settings)
    return partial(adversarial_gradient, plain, adversary, batch)


def train(config, num_steps: int, num_devices=1):
    """Return the parameters after some steps, and the mean loss of the steps."""
    mesh = builders.sharding.make_mesh(num_devices)
    (phase,) = trajectory.phases(config)
    steps = builders.train_steps(config, phase.settings, mesh)
    state = builders.init_state(builders.init_params(config), phase)
    state = builders.sharding.replicate(mesh, state)
    schedule = builders.schedule(phase.settings, anneal=False)
    source = Source(make_language(config.language))
    state, loss = steps(state, source, KEY, schedule, 0, num_steps)
    return state.params, float(loss)


def parts(config, params):
    """Return (mean pre-training loss, downstream loss) of one batch, and the objective's own."""
    batch, model = drawn(config), builders.make_model(config)
    plain, weight = builders.loss_functions(model)[0](params, batch.pretraining)
    settings = config.phases.pretrain.adversary
    downstream = phase_loss._downstream_loss(
        model.apply, settings.l2, params, batch.fit, batch.held_out
    )
    value, _ = objective(config, batch)(params)
    return float(plain / weight), float(downstream), float(value)


@pytest.mark.slow
def test_objective_is_the_difference_and_strength_zero_is_plain_training():
    config = resolved(0.3)
    plain, downstream, both = parts(config, builders.init_params(config))
    np.testing.assert_allclose(both, plain - 0.3 * downstream, rtol=1e-5)
    (phase,) = trajectory.phases(resolved(0.0))
    assert phase_loss.make_adversary(None, phase.settings) is None
    jax.tree.map(np.testing.assert_array_equal, drawn(config).pretraining, drawn(resolved(0.0)))


def test_the_head_is_judged_on_other_sentences_than_it_was_fitted_to():
    batch = drawn(resolved(0.3))
    assert not np.array_equal(batch.fit[0].tokens_BxT, batch.held_out[0].tokens_BxT)


@pytest.mark.slow
@pytest.mark.parametrize("block", ["", "gpt", "modern"])
def test_the_gradient_includes_the_response_of_the_head(block):
    """Against finite differences of the objective, which refit the head."""
    config = resolved(1.0, block)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), builders.init_params(config))
        batch = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, drawn(config)
        )
        value_and_gradient = jax.jit(objective(config, batch))
        leaves = jax.tree.leaves(params)
        direction = jax.tree.unflatten(
            jax.tree.structure(params),
            [jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(leaves)],
        )

        def at(step):
            return value_and_gradient(jax.tree.map(lambda p, d: p + step * d, params, direction))[0]

        _, gradient = value_and_gradient(params)
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
