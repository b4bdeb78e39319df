"""One optimizer step, and a compiled loop of many steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxflat.training.flatness_penalty import FlatnessPenalty, Vectors, penalized_loss
from jaxflat.training.objectives import LossFn
from jaxflat.training.optimizers import Schedule


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of training; `step` counts the run's optimizer steps."""

    params: Any
    optimizer_state: Any
    step: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VectorTrainState(TrainState):
    """The same, and the vectors that a flatness penalty carries from step to step."""

    vectors: Vectors


def train_step(
    state: TrainState,
    batch: Any,
    learning_rate: jax.Array,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_shards: int = 1,
) -> tuple[TrainState, jax.Array]:
    """Return the state after one step on `batch`, and the mean loss before it in nats.

    `optimizer` has learning rate 1 (see `optimizers`). `num_shards` is as in `loss_and_gradient`.
    """
    loss, gradient = loss_and_gradient(loss_fn, state.params, batch, num_shards)
    optimizer = optax.with_extra_args_support(optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
        updates, optimizer_state = optimizer.update(
            gradient,
            state.optimizer_state,
            state.params,
            grad_fn=lambda params, _: loss_and_gradient(loss_fn, params, batch, num_shards)[1],
        )
    params = jax.tree.map(
        lambda param, update: param + learning_rate.astype(param.dtype) * update,
        state.params,
        updates,
    )
    state = replace(state, params=params, optimizer_state=optimizer_state, step=state.step + 1)
    return state, loss


def loss_and_gradient(
    loss_fn: LossFn, params: Any, batch: Any, num_shards: int
) -> tuple[jax.Array, Any]:
    """Return the mean loss of a batch in nats, and its gradient.

    num_shards > 1 cuts the batch into equal parts and flattens the gradient of each into one vector
    before the sum. With one part on each device, devices then need one reduction instead of one for
    every parameter, which XLA's CPU backend would run in sequence.
    """

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if num_shards == 1:
        (loss_sum, weight), gradient = value_and_grad(params, batch)
        return loss_sum / weight, jax.tree.map(lambda g: g / weight, gradient)
    shards = jax.tree.map(lambda x: x.reshape(num_shards, -1, *x.shape[1:]), batch)
    (sums_S, weights_S), gradients = jax.vmap(value_and_grad, in_axes=(None, 0))(params, shards)
    _, unravel = ravel_pytree(params)
    flat_SxP = jax.vmap(lambda g: ravel_pytree(g)[0])(gradients)
    return sums_S.sum() / weights_S.sum(), unravel(flat_SxP.sum(0) / weights_S.sum())


def make_train_steps(
    loss_fn: LossFn,
    sample_batch: Callable[[Any, jax.Array, jax.Array], Any],
    optimizer: optax.GradientTransformation,
    num_shards: int = 1,
    skips: bool = False,
    constrain_sharding: Callable[[TrainState], TrainState] = lambda state: state,
    penalty: FlatnessPenalty | None = None,
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Return steps(state, source, key, schedule, schedule_start, stop) -> (state, mean loss).

    One compiled call runs the steps from state.step to stop, returns the mean over their losses,
    and donates the state. Its length, the schedule and the source of batches are arguments, so new
    values do not recompile. Step s, the n-th of the call counted from 0, has the batch
    sample_batch(source, fold_in(key, s), n) and the learning rate schedule(s - schedule_start).

    The call stops after a step with a loss that is not finite; state.step counts this step. The
    returned mean is then not finite. It is nan if parameters or optimizer state are not finite at
    the end. `skips`: the optimizer itself skips such steps. The mean then covers the finite losses
    only, and is nan if there are none. `constrain_sharding` is applied to the state after each
    step and sets its devices. The strength of a `penalty` is a further argument, see
    `_loss_of_step`.
    """

    def steps(
        state: TrainState,
        source: Any,
        key: jax.Array,
        schedule: Schedule,
        schedule_start: int,
        stop: int,
        strength: float | jax.Array | None = None,
    ) -> tuple[TrainState, jax.Array]:
        start_step = state.step

        def may_continue(carry: tuple[TrainState, jax.Array, jax.Array]) -> jax.Array:
            state, loss_sum, _ = carry
            return (state.step < stop) & jnp.isfinite(loss_sum)

        def step_once(carry: tuple[TrainState, jax.Array, jax.Array]):
            state, loss_sum, num_losses = carry
            step, step_key = state.step, jax.random.fold_in(key, state.step)
            batch = sample_batch(source, step_key, step - start_step)
            learning_rate = schedule(step - schedule_start)
            state, minimized = _loss_of_step(loss_fn, penalty, state, batch, step_key, strength)
            state, loss = train_step(state, batch, learning_rate, minimized, optimizer, num_shards)
            counts = jnp.isfinite(loss) | (not skips)
            return (
                constrain_sharding(state),
                loss_sum + jnp.where(counts, loss, 0),
                num_losses + counts.astype(loss.dtype),
            )

        zero = jnp.zeros((), jax.tree.leaves(state.params)[0].dtype)
        state, loss_sum, num_losses = jax.lax.while_loop(
            may_continue, step_once, (state, zero, zero)
        )
        return state, jnp.where(_is_finite(state), loss_sum / num_losses, jnp.nan)

    return jax.jit(steps, donate_argnums=0)


def _loss_of_step(
    loss_fn: LossFn,
    penalty: FlatnessPenalty | None,
    state: TrainState,
    batch: Any,
    step_key: jax.Array,
    strength: float | jax.Array | None,
) -> tuple[TrainState, LossFn]:
    """Return the state with the vectors of this step, and the function to minimise in it.

    Its gradient includes strength times the curvature's. Its value is the loss alone.
    The key of the step's random vectors is fold_in(step_key, 2); batches use others.
    """
    if penalty is None:
        return state, loss_fn
    carries = isinstance(state, VectorTrainState)
    previous, key = state.vectors if carries else None, jax.random.fold_in(step_key, 2)
    vectors = penalty.next_vectors(previous, state.params, batch, key)
    if carries:
        state = replace(state, vectors=vectors)
    acting = penalty.acting_strength(jnp.asarray(strength), state.params, batch)
    return state, penalized_loss(penalty, vectors, acting)


def _is_finite(state: TrainState) -> jax.Array:
    leaves = jax.tree.leaves((state.params, state.optimizer_state))
    numbers = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.isfinite(sum(leaf.sum() for leaf in numbers))
