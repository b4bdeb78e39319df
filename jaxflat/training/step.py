"""One optimizer step, and a compiled loop of many steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxflat.training.adversarial import Adversary, adversarial_gradient
from jaxflat.training.flatness_penalty import FlatnessPenalty, Vectors, penalized_loss
from jaxflat.training.gradient import GradientFn, loss_and_gradient
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
    learning_rate: jax.Array,
    gradient_fn: GradientFn,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, jax.Array]:
    """Return the state after one step, and the loss before it in nats.

    `optimizer` has learning rate 1 (see `optimizers`).
    """
    loss, gradient = gradient_fn(state.params)
    optimizer = optax.with_extra_args_support(optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
        updates, optimizer_state = optimizer.update(
            gradient,
            state.optimizer_state,
            state.params,
            grad_fn=lambda params, _: gradient_fn(params)[1],
        )
    params = jax.tree.map(
        lambda param, update: param + learning_rate.astype(param.dtype) * update,
        state.params,
        updates,
    )
    state = replace(state, params=params, optimizer_state=optimizer_state, step=state.step + 1)
    return state, loss


def make_train_steps(
    loss_fn: LossFn,
    sample_batch: Callable[[Any, jax.Array, jax.Array], Any],
    optimizer: optax.GradientTransformation,
    *,
    num_shards: int = 1,
    num_microbatches: int = 1,
    skips: bool = False,
    constrain_sharding: Callable[[TrainState], TrainState] = lambda state: state,
    penalty: FlatnessPenalty | None = None,
    adversary: Adversary | None = None,
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Return steps(state, source, key, schedule, schedule_start, stop) -> (state, mean loss).

    One compiled call runs the steps from state.step to stop, returns the mean over their losses,
    and donates the state. Its length, the schedule and the source of batches are arguments, so new
    values do not recompile. Step s, the n-th of the call counted from 0, has the batch
    sample_batch(source, fold_in(key, s), n) and the learning rate schedule(s - schedule_start).
    num_shards and num_microbatches are as in `loss_and_gradient`.

    The call stops after a step with a loss that is not finite; state.step counts this step. The
    returned mean is then not finite. It is nan if parameters or optimizer state are not finite at
    the end. `skips`: the optimizer itself skips such steps. The mean then covers the finite losses
    only, and is nan if there are none. `constrain_sharding` is applied to the state after each
    step and sets its devices. The strength of a `penalty` is a further argument, see
    `_loss_of_step`. With an `adversary`, sample_batch returns an AdversarialBatch.
    """

    loss_of_step = partial(_loss_of_step, loss_fn, penalty, num_microbatches)

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
            sampled = sample_batch(source, step_key, step - start_step)
            batch = sampled.masked if adversary else sampled
            learning_rate = schedule(step - schedule_start)
            state, minimized = loss_of_step(state, batch, step_key, strength)
            gradient_fn: GradientFn = partial(
                loss_and_gradient,
                minimized,
                batch,
                num_shards=num_shards,
                num_microbatches=num_microbatches,
            )
            if adversary:
                gradient_fn = partial(adversarial_gradient, gradient_fn, adversary, sampled)
            state, loss = train_step(state, learning_rate, gradient_fn, optimizer)
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
    num_microbatches: int,
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
    acting = penalty.acting_strength(jnp.asarray(strength), state.params, batch, num_microbatches)
    return state, penalized_loss(penalty, vectors, acting)


def _is_finite(state: TrainState) -> jax.Array:
    leaves = jax.tree.leaves((state.params, state.optimizer_state))
    numbers = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.isfinite(sum(leaf.sum() for leaf in numbers))
