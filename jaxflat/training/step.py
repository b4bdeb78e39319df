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
from jaxflat.training.gradient import WHOLE, Division, GradientFn, loss_and_gradient
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


@dataclass(frozen=True)
class Objective:
    """What a step minimises, and how it divides its batch.

    The loss, plus a penalty's strength times its curvature, minus an adversary's strength times its
    loss. With an adversary a step's batch is an AdversarialBatch.
    """

    loss_fn: LossFn
    penalty: FlatnessPenalty | None = None
    adversary: Adversary | None = None
    division: Division = WHOLE


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
    objective: Objective,
    sample_batch: Callable[[Any, jax.Array, jax.Array], Any],
    optimizer: optax.GradientTransformation,
    *,
    skips: bool = False,
    constrain_gradient: Callable[[Any], Any] = lambda gradient: gradient,
    constrain_state: Callable[[TrainState], TrainState] = lambda state: state,
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Return steps(state, source, key, schedule, schedule_start, stop) -> (state, mean loss).

    One compiled call runs the steps from state.step to stop, returns the mean over their losses,
    and donates the state. Its length, the schedule and the source of batches are arguments, so new
    values do not recompile. Step s, the n-th of the call counted from 0, has the batch
    sample_batch(source, fold_in(key, s), n) and the learning rate schedule(s - schedule_start).

    The call stops after a step with a loss that is not finite; state.step counts this step. The
    returned mean is then not finite. It is nan if parameters or optimizer state are not finite at
    the end. `skips`: the optimizer itself skips such steps. The mean then covers the finite losses
    only, and is nan if there are none. `constrain_gradient` and `constrain_state` set the devices
    of each step's gradient and state. The strength of a penalty is a further argument of `steps`.
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
            state, gradient_fn = _gradient_of_step(objective, state, batch, step_key, strength)
            gradient_fn = _constrained(gradient_fn, constrain_gradient)
            learning_rate = schedule(step - schedule_start)
            state, loss = train_step(state, learning_rate, gradient_fn, optimizer)
            counts = jnp.isfinite(loss) | (not skips)
            return (
                constrain_state(state),
                loss_sum + jnp.where(counts, loss, 0),
                num_losses + counts.astype(loss.dtype),
            )

        zero = jnp.zeros((), jax.tree.leaves(state.params)[0].dtype)
        state, loss_sum, num_losses = jax.lax.while_loop(
            may_continue, step_once, (state, zero, zero)
        )
        return state, jnp.where(_is_finite(state), loss_sum / num_losses, jnp.nan)

    return jax.jit(steps, donate_argnums=0)


def _gradient_of_step(
    objective: Objective,
    state: TrainState,
    batch: Any,
    step_key: jax.Array,
    strength: float | jax.Array | None,
) -> tuple[TrainState, GradientFn]:
    """Return the state with the vectors of this step's penalty, and params -> (loss, gradient).

    The gradient includes strength times the curvature's, and the loss does not. The key of the
    step's random vectors is fold_in(step_key, 2); batches use others.
    """
    penalty, adversary = objective.penalty, objective.adversary
    examples, minimized = batch.pretraining if adversary else batch, objective.loss_fn
    if penalty is not None:
        carries = isinstance(state, VectorTrainState)
        previous, key = state.vectors if carries else None, jax.random.fold_in(step_key, 2)
        vectors = penalty.next_vectors(previous, state.params, examples, key)
        if carries:
            state = replace(state, vectors=vectors)
        acting = penalty.acting_strength(
            jnp.asarray(strength), state.params, examples, objective.division
        )
        minimized = penalized_loss(penalty, vectors, acting)
    gradient_fn: GradientFn = partial(
        loss_and_gradient, minimized, examples, division=objective.division
    )
    if adversary:
        gradient_fn = partial(adversarial_gradient, gradient_fn, adversary, batch)
    return state, gradient_fn


def _constrained(gradient_fn: GradientFn, constrain: Callable[[Any], Any]) -> GradientFn:
    def constrained(params: Any) -> tuple[jax.Array, Any]:
        loss, gradient = gradient_fn(params)
        return loss, constrain(gradient)

    return constrained


def _is_finite(state: TrainState) -> jax.Array:
    leaves = jax.tree.leaves((state.params, state.optimizer_state))
    numbers = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.isfinite(sum(leaf.sum() for leaf in numbers))
