"""A flatness penalty in training steps: its gradient, its gate and the vectors that it carries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxflat.training.flatness_penalty import FlatnessPenalty, penalized_loss
from jaxflat.training.gradient import WHOLE, Division
from jaxflat.training.optimizers import Schedule
from jaxflat.training.step import Objective, TrainState, VectorTrainState, make_train_steps

RATE = 0.1
PARAMS = jnp.array([1.0, -2.0, 0.5])


def loss_fn(params, batch):
    """One prediction per row of the batch, with the loss sum(params * row)."""
    return (params[None] * batch).sum(), jnp.asarray(float(len(batch)))


def loss_and_curvature(params, batch, vectors):
    (vector,) = vectors
    return *loss_fn(params, batch), (vector**2 * params**3).sum()


def sample(source, key, index):
    return jnp.ones((2, 3))


def signs(previous, params, batch, key):
    return (jax.random.normal(key, params.shape),)


def count(previous, params, batch, key):
    return (previous[0] + 1,)


def make_penalty(next_vectors=signs, excess=0.0, max_excess=0.0):
    return FlatnessPenalty(
        next_vectors, loss_and_curvature, lambda *_: (2 * excess, jnp.asarray(2.0)), max_excess
    )


def train(penalty, strength, state=None, stop=3, num_shards=1):
    steps = make_train_steps(
        Objective(loss_fn, penalty, division=Division(num_shards)), sample, optax.sgd(1.0)
    )
    start = state or TrainState(PARAMS, optax.sgd(1.0).init(PARAMS), jnp.asarray(0))
    state = jax.tree.map(jnp.copy, start)  # a call donates its state
    return steps(state, None, jax.random.key(3), Schedule(RATE, 0, 0, 9), 0, stop, strength)


def test_the_gradient_is_penalised_and_the_value_is_not():
    batch, vectors = jnp.ones((2, 3)), (jnp.array([1.0, 2.0, 3.0]),)
    penalised = penalized_loss(make_penalty(), vectors, jnp.asarray(0.5))
    (value, weight), gradient = jax.value_and_grad(penalised, has_aux=True)(PARAMS, batch)
    assert (value, weight) == loss_fn(PARAMS, batch)
    np.testing.assert_allclose(gradient, 2 * (1 + 0.5 * 3 * vectors[0] ** 2 * PARAMS**2))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_each_step_has_vectors_of_its_key_in_every_shard(num_shards):
    params = PARAMS
    for step in range(3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), step), 2)
        (vector,) = signs(None, params, None, key)
        params = params - RATE * (1 + 0.01 * 3 * vector**2 * params**2)
    state, _ = train(make_penalty(), 0.01, num_shards=num_shards)
    np.testing.assert_allclose(state.params, params, rtol=1e-6)


def test_vectors_are_carried_from_step_to_step_and_call_to_call():
    fields = PARAMS, optax.sgd(1.0).init(PARAMS), jnp.asarray(0)
    start = VectorTrainState(*fields, (jnp.zeros(3),))
    whole, _ = train(make_penalty(count), 0.01, start)
    half, _ = train(make_penalty(count), 0.01, start, stop=1)
    resumed, _ = train(make_penalty(count), 0.01, half)
    np.testing.assert_array_equal(whole.vectors[0], 3)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.parametrize(
    ("strength", "excess", "acts"),
    [(-0.1, 0.2, False), (-0.1, 0.05, True), (0.1, 0.2, True), (-0.1, np.nan, False)],
)
def test_negative_strengths_act_up_to_the_largest_excess(strength, excess, acts):
    limited = partial(make_penalty, excess=excess, max_excess=0.1)
    found = limited().acting_strength(jnp.asarray(strength), PARAMS, None, WHOLE)
    assert found == (jnp.asarray(strength) if acts else 0)
    state, _ = train(limited(), strength)
    without, _ = train(None, None)
    assert np.allclose(state.params, without.params) != acts
    unlimited = make_penalty(excess=excess).acting_strength(
        jnp.asarray(strength), PARAMS, None, WHOLE
    )
    assert unlimited == jnp.asarray(strength)
