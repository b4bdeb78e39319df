"""Optimizers and learning-rate schedules; optimizers have rate 1, the schedule scales them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon, normalize, sam

UNDECAYED = ("scale", "bias", "decoder_bias")


def decay_mask(params: Any) -> Any:
    """Return a tree of booleans: weight decay acts on matrices, never on biases and norm gains.

    Names decide, not shapes: leaves stacked for a layer scan have an additional axis.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def muon_axes(params: Any) -> Any:
    """Return the matrix axes of each leaf that Muon orthogonalizes, None for all other leaves.

    Muon's matrices map activations to activations, so they are the kernels. Some kernels stack
    several matrices. A layer scan stacks on the first axis. Queries, keys and values, and an
    LSTM's gates, are stacked on the second to last. The kernels that join an LSTM's directions are
    stacked on the third to last.
    """

    def axes(path: Any, _: Any) -> MuonDimensionNumbers | None:
        names = [part.key for part in path]
        gates = names[-1] in ("input_kernel", "recurrent_kernel")
        reduction_axis = -3 if gates or "qkv" in names else -2
        is_kernel = gates or names[-1] == "kernel"
        return MuonDimensionNumbers(reduction_axis, -1) if is_kernel else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _muon(momentum: float, b1: float, b2: float, weight_decay: float) -> Any:
    """Muon (Jordan 2024) with updates of Adam's RMS, 0.2 (Liu et al., arXiv:2502.16982).

    Leaves that are not kernels get Nesterov's Adam without weight decay.
    """
    return muon(
        1.0,
        beta=momentum,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=muon_axes,
        consistent_rms=0.2,
    )


def _adamw(**settings: Any) -> optax.GradientTransformation:
    return optax.adamw(1.0, mask=decay_mask, **settings)


def _sam(radius: float, **settings: float) -> optax.GradientTransformation:
    """Sharpness-aware minimisation (Foret et al. 2021): the gradient at theta + radius g / |g|.

    AdamW takes the step. Both gradients use the same batch; `grad_fn` computes the second.
    """
    ascent = optax.chain(normalize(), optax.sgd(radius))
    return sam(_adamw(**settings), ascent, opaque_mode=True)


BUILT_IN: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "sgd": partial(optax.sgd, 1.0),
    "lion": lambda **settings: optax.lion(1.0, mask=decay_mask, **settings),
    "muon": _muon,
    "sam": _sam,
}


def make_optimizer(name: str, settings: Mapping[str, float]) -> optax.GradientTransformation:
    """Return an optimizer with learning rate 1: one of `BUILT_IN`, or the optax function `name`.

    settings: its keywords, such as {"b1": 0.9, "weight_decay": 0.01}. "adamw" has b1, b2, eps and
    weight_decay, and "sam" also radius. "lion" has b1, b2 and weight_decay, and "muon" also
    momentum. "sgd" and all others have optax's keywords.

    The training step multiplies its update by the schedule's value. A branch can therefore anneal
    from its trunk's optimizer state, unchanged.

    Raises AttributeError for a name that optax does not have, TypeError for another keyword.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](**settings)
    function = getattr(optax, name)
    masks = {"mask", "weight_decay_mask"} & set(inspect.signature(function).parameters)
    return function(1.0, **dict.fromkeys(masks, decay_mask), **settings)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup_steps`, a constant, and a linear decay to 0 at `total_steps`.

    It is a pytree of numbers, so all schedules share the same compiled steps.
    """

    learning_rate: float | jax.Array
    warmup_steps: int | jax.Array
    decay_steps: int | jax.Array
    total_steps: int | jax.Array

    def __call__(self, step: jax.Array) -> jax.Array:
        """Return the learning rate of step 0, 1, ... of the phase."""

        def fraction(part: jax.Array, whole: int | jax.Array) -> jax.Array:
            whole = jnp.maximum(jnp.asarray(whole, jnp.float32), 1)
            return jnp.minimum(part.astype(jnp.float32) / whole, 1)

        warmup = fraction(step + 1, self.warmup_steps)
        decay = fraction(self.total_steps - step, self.decay_steps)
        return jnp.asarray(self.learning_rate, jnp.float32) * warmup * decay
