"""One optimizer step, and many of them in one compiled call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxflat.training.objectives import LossFn
from jaxflat.training.optimizers import Schedule


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training carries from step to step; `step` counts the run's optimizer steps."""

    params: Any
    optimizer_state: Any
    step: jax.Array


def train_step(
    state: TrainState,
    batch: Any,
    learning_rate: jax.Array,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_shards: int = 1,
) -> tuple[TrainState, jax.Array]:
    """Return the state after one step on `batch`, and the mean loss before it in nats.

    `optimizer` is built at learning rate 1 (see `optimizers`); `num_shards` as in `mean_gradient`.
    """
    loss, gradient = mean_gradient(loss_fn, state.params, batch, num_shards)
    optimizer = optax.with_extra_args_support(optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
        updates, optimizer_state = optimizer.update(
            gradient,
            state.optimizer_state,
            state.params,
            grad_fn=lambda params, _: mean_gradient(loss_fn, params, batch, num_shards)[1],
        )
    params = jax.tree.map(
        lambda param, update: param + learning_rate.astype(param.dtype) * update,
        state.params,
        updates,
    )
    return TrainState(params, optimizer_state, state.step + 1), loss


def mean_gradient(
    loss_fn: LossFn, params: Any, batch: Any, num_shards: int
) -> tuple[jax.Array, Any]:
    """Return the mean loss of a batch in nats, and its gradient.

    With num_shards > 1 the gradients of as many equal parts of the batch are flattened to one
    vector each before they are added. Where each part lives on a device of its own, that makes
    one reduction between devices of what would be one for every parameter; XLA's CPU backend
    runs those one after the other.
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
    place: Callable[[TrainState], TrainState] = lambda state: state,
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Return steps(state, source, key, schedule, first, stop) -> (state, mean loss of the call).

    Steps run from state.step to stop in one compiled call. Its length, the schedule and the source
    of batches are arguments, so that none of them compiles anew. The batch of step s, the n-th of
    the call from 0, is sample_batch(source, fold_in(key, s), n), its learning rate
    schedule(s - first). The state is donated. A step whose loss is not finite is the last, and
    counted in state.step; the mean loss is then not finite, nor is it where the call ends with
    parameters or an optimizer's state that are not. `skips`: the optimizer leaves out steps
    itself; losses that are not finite do not count then, and without any other the mean is nan.
    `place` says on which devices the state of each step lives.
    """

    def steps(
        state: TrainState,
        source: Any,
        key: jax.Array,
        schedule: Schedule,
        first: int,
        stop: int,
    ) -> tuple[TrainState, jax.Array]:
        start_step = state.step

        def goes_on(carry: tuple[TrainState, jax.Array, jax.Array]) -> jax.Array:
            state, loss_sum, _ = carry
            return (state.step < stop) & jnp.isfinite(loss_sum)

        def body(carry: tuple[TrainState, jax.Array, jax.Array]):
            state, loss_sum, num_losses = carry
            step = state.step
            batch = sample_batch(source, jax.random.fold_in(key, step), step - start_step)
            learning_rate = schedule(step - first)
            state, loss = train_step(state, batch, learning_rate, loss_fn, optimizer, num_shards)
            counts = jnp.isfinite(loss) | (not skips)
            return (
                place(state),
                loss_sum + jnp.where(counts, loss, 0),
                num_losses + counts.astype(loss.dtype),
            )

        zero = jnp.zeros((), jax.tree.leaves(state.params)[0].dtype)
        state, loss_sum, num_losses = jax.lax.while_loop(goes_on, body, (state, zero, zero))
        return state, jnp.where(_is_finite(state), loss_sum / num_losses, jnp.nan)

    return jax.jit(steps, donate_argnums=0)


def _is_finite(state: TrainState) -> jax.Array:
    leaves = jax.tree.leaves((state.params, state.optimizer_state))
    numbers = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.isfinite(sum(leaf.sum() for leaf in numbers))
