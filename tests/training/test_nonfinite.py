"""Training stops at the first non-finite step, or skips it if configured."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.runs import builders
from jaxflat.training.optimizers import Schedule
from jaxflat.training.step import Objective, TrainState, make_train_steps

CONSTANT = Schedule(learning_rate=0.1, warmup_steps=0, decay_steps=0, total_steps=100)


def norm(params, scale):
    """The gradient is nan where the scale is 0, though the loss is not."""
    return jnp.sqrt(scale * params["w"] ** 2).sum(), jnp.ones(())


def train(optimizer, bad_steps, stop, skips=True):
    scales = jnp.ones(100).at[jnp.array(bad_steps, int)].set(0.0)
    sampled = (lambda scales, _, place: scales[place], optimizer)
    steps = make_train_steps(Objective(norm), *sampled, skips=skips)
    params = {"w": jnp.array([4.0, -3.0])}
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    return steps(state, scales, jax.random.key(0), CONSTANT, 0, stop)


def skipping(number):
    section = base_config.phase().optimizer
    section.update({"name": "sgd", "skip_nonfinite": number})
    return builders.phase_optimizer(FrozenConfigDict(section))


@pytest.mark.parametrize(("bad", "reached"), [([5], 7), ([9], 10), ([0], 2), ([], 10)])
def test_a_gradient_that_is_not_finite_ends_the_call(bad, reached):
    """The next step's loss shows it; after the last step, the parameters do."""
    state, loss = train(skipping(0), bad, stop=10, skips=False)
    assert state.step == reached
    assert np.isfinite(loss) == np.isfinite(state.params["w"]).all() == (not bad)


@pytest.mark.parametrize("name", ["lion", "signum", "adamw"])
def test_non_finite_optimizer_state_is_detected_at_the_end_of_the_call(name):
    """The sign of infinity is 1, and Adam divides by it, so the parameters stay finite."""
    section = base_config.phase().optimizer
    section.name = name
    optimizer = builders.phase_optimizer(FrozenConfigDict(section))
    steps = make_train_steps(
        Objective(lambda params, slope: ((params["w"] * slope).sum(), jnp.ones(()))),
        lambda slopes, _, place: slopes[place],
        optimizer,
    )
    params = {"w": jnp.zeros(2)}
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    slopes = jnp.ones(10).at[4].set(1e30 if name == "adamw" else jnp.inf)
    state, loss = steps(state, slopes, jax.random.key(0), CONSTANT, 0, 10)
    assert np.isfinite(state.params["w"]).all()
    assert np.isnan(loss)


def test_a_non_finite_loss_ends_the_call_unless_steps_are_skipped():
    def infinite(params, number):
        return params["w"].sum() + jax.lax.stop_gradient(1 / number), jnp.ones(())

    for skips in (False, True):
        optimizer = optax.sgd(1.0)
        sampled = (lambda numbers, _, place: numbers[place], optimizer)
        steps = make_train_steps(Objective(infinite), *sampled, skips=skips)
        params = {"w": jnp.zeros(2)}
        state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
        numbers = jnp.ones(10).at[4].set(0.0)
        state, loss = steps(state, numbers, jax.random.key(0), CONSTANT, 0, 10)
        assert state.step == (10 if skips else 5)
        assert np.isfinite(loss) == skips


def test_only_the_allowed_number_of_consecutive_steps_is_skipped():
    state, loss = train(skipping(2), [3, 4, 7], stop=10)
    assert state.step == 10
    np.testing.assert_allclose(state.params["w"], [4 - 0.7, -3 + 0.7], rtol=1e-6)
    # Means of 7 losses 7, 6.8, ... and of 3 of nought.
    np.testing.assert_allclose(loss, sum(7 - 0.2 * n for n in range(7)) / 10, rtol=1e-6)
    state, loss = train(skipping(2), [3, 4, 5], stop=10)
    assert np.isnan(loss)


def test_a_call_with_all_steps_skipped_has_no_loss():
    optimizer = optax.apply_if_finite(optax.sgd(1.0), 5)
    steps = make_train_steps(
        Objective(lambda params, _: (params["w"].sum() * jnp.nan, jnp.ones(()))),
        lambda *_: None,
        optimizer,
        skips=True,
    )
    params = {"w": jnp.ones(2)}
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    state, loss = steps(state, None, jax.random.key(0), CONSTANT, 0, 3)
    assert np.isfinite(state.params["w"]).all()
    assert np.isnan(loss)
