"""Optimizers at unit learning rate, and the learning rate as a function of the step."""

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


def decayed(params: Any) -> Any:
    """Return a tree of booleans: weight decay acts on matrices, never on biases and norm gains.

    Decided by name: leaves stacked for a layer scan have one axis more than they seem to.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def orthogonalized(params: Any) -> Any:
    """Return what Muon needs of each leaf: the axes of its matrices, None where it has none.

    Its matrices map activations to activations: kernels, of which those of a layer scan are
    stacked on their first axis, those of queries, keys and values and of an LSTM's gates on the
    second but last, and those that join an LSTM's directions on the third but last.
    """

    def axes(path: Any, _: Any) -> MuonDimensionNumbers | None:
        names = [part.key for part in path]
        gates = names[-1] in ("input_kernel", "recurrent_kernel")
        reduction_axis = -3 if gates or "qkv" in names else -2
        is_kernel = gates or names[-1] == "kernel"
        return MuonDimensionNumbers(reduction_axis, -1) if is_kernel else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _muon(momentum: float, b1: float, b2: float, weight_decay: float) -> Any:
    """Muon (Jordan 2024), its updates as long as Adam's: RMS 0.2 (Liu et al., arXiv:2502.16982).

    All that is no kernel gets Nesterov's Adam, undecayed.
    """
    return muon(
        1.0,
        beta=momentum,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=orthogonalized,
        consistent_rms=0.2,
    )


def _adamw(**settings: Any) -> optax.GradientTransformation:
    return optax.adamw(1.0, mask=decayed, **settings)


def _sam(radius: float, **settings: float) -> optax.GradientTransformation:
    """Sharpness-aware minimisation (Foret et al. 2021), the gradient at theta + radius g / |g|.

    AdamW takes the step. Both gradients are of one batch; the second comes from `grad_fn`.
    """
    ascent = optax.chain(normalize(), optax.sgd(radius))
    return sam(_adamw(**settings), ascent, opaque_mode=True)


OWN: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "sgd": partial(optax.sgd, 1.0),
    "lion": lambda **settings: optax.lion(1.0, mask=decayed, **settings),
    "muon": _muon,
    "sam": _sam,
}


def make_optimizer(name: str, **settings: float) -> optax.GradientTransformation:
    """Return an optimizer at learning rate 1: one of `OWN`, or optax's of that name.

    The training step multiplies its update by the schedule's value, so that a branch may anneal
    from its trunk's optimizer state as it is.
    """
    if name in OWN:
        return OWN[name](**settings)
    function = getattr(optax, name)
    masks = {"mask", "weight_decay_mask"} & set(inspect.signature(function).parameters)
    return function(1.0, **dict.fromkeys(masks, decayed), **settings)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup_steps`, a constant, and a linear decay to 0 at `total_steps`.

    A pytree of numbers: the compiled steps of one schedule serve all others.
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
