"""What every estimator takes: a loss or log-probabilities, parameters and microbatches; checked.

Shapes and dtypes are checked before anything is computed. Then the weights are, and once for each
function the log-probabilities of one microbatch. Most losses take weights from the batch: XLA then
drops the rest of their forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from numbers import Integral
from textwrap import fill
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal

from jaxflat.flatness.trees import PyTree, at_least_float32, path_name

P = ParamSpec("P")
R = TypeVar("R")
LossFn = Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]
LogProbsFn = Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]

ARGUMENTS = {
    "loss_fn": "(params, batch) -> (loss_sum, weight), two scalars: the loss of a microbatch in "
    "nats, summed over predictions, and their number or total weight. Wrap a mean loss in "
    "`from_mean_loss`.",
    "log_probs_fn": "(params, batch) -> (log_probs_...xV, weights_...): the log-probabilities of V "
    "labels in nats for each prediction of a microbatch, and how much each prediction counts.",
    "params": "a pytree of floating-point arrays; those of 16 bits are cast to float32.",
    "start": "the parameters at t = 0, a pytree of floating-point arrays.",
    "end": "the parameters at t = 1, shaped like start.",
    "batches": "a pytree of arrays with a common leading axis of M microbatches.",
    "key": "a key of jax.random; the result is a function of it.",
    "vector": "a pytree shaped like params.",
    "num_probes": "how many random vectors; `over` says of what.",
    "num_samples": "how many draws of labels; `over` says of what.",
    "num_largest": "how many of the largest eigenvalues.",
    "num_smallest": "how many of the smallest eigenvalues.",
    "num_steps": "Lanczos steps: each takes a product with one vector, and memory to hold it.",
    "over": "what the error covers. 'probes+sentences': each microbatch has its own draws, and is "
    "one of n = M samples, at least 2. 'probes': all microbatches share the draws, and each is one "
    "sample; the sentences are fixed.",
    "probes_per_pass": "how many run at once: more take more memory and give the same numbers.",
    "samples_per_pass": "how many run at once: more take more memory and give the same numbers.",
    "stacked": "(path of a leaf, such as 'layer/kernel') -> whether its axis 0 stacks layers.",
    "rescale": "(index of a microbatch, v) -> T v, linear, a jax.tree_util.Partial: the matrix M "
    "becomes T' M T, the curvature of the same function in other coordinates.",
}
"""What `help` says of the arguments that several estimators have."""
COUNTS = {"num_probes", "num_samples", "num_steps", "num_points"}
COUNTS |= {"probes_per_pass", "samples_per_pass"}
NORMALIZED: WeakSet[Callable] = WeakSet()  # functions found to return log-probabilities
MOST_EXCESS = 0.1  # of the log of probabilities' sum; rounding to bfloat16 reaches some hundredths
RAISES = (
    "Raises TypeError or ValueError, in one line and before computing, if the function, params or "
    "batches do not fit."
)


def documented(function: Callable[P, R]) -> Callable[P, R]:
    """Add to a function's docstring what `ARGUMENTS` says of its arguments; return the function.

    An argument that the docstring itself describes, as "name: ...", is left out.
    """
    own = inspect.cleandoc(function.__doc__ or "")
    names = [name for name in inspect.signature(function).parameters if f"{name}: " not in own]
    lines = [f"{name}: {ARGUMENTS[name]}" for name in names if name in ARGUMENTS]
    lines = [fill(line, 98, subsequent_indent="    ") for line in lines]
    function.__doc__ = "\n\n".join([own, "\n".join(lines), fill(RAISES, 98)])
    return function


def estimator(*static: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: document a function, compile it, and check its inputs at each call.

    Its first argument, loss_fn or log_probs_fn, is static, as are the arguments named `static`.
    Inside it returns the pair of `loss_and_weight` or `wide_log_probs`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        kind = next(iter(signature.parameters))
        pair_of = loss_and_weight if kind == "loss_fn" else wide_log_probs
        of_pairs: Callable[..., Any] = function

        @wraps(function)
        def with_checked_pairs(own_function: Any, *args: Any, **keywords: Any) -> Any:
            return of_pairs(partial(pair_of, own_function), *args, **keywords)

        compiled = jax.jit(with_checked_pairs, static_argnames=(kind, *static))

        @wraps(function)
        def checked(*args: P.args, **keywords: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **keywords)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}") from None
            check_inputs(bound.arguments)
            return compiled(*bound.args, **bound.kwargs)

        return documented(checked)

    return decorate


# The function.


def loss_and_weight(loss_fn: LossFn, params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
    """Return the loss sum and weight, both floating; raise TypeError for any other result."""
    result = loss_fn(params, batch)
    shapes = jax.tree.map(jnp.shape, result)
    if not isinstance(result, tuple) or shapes != ((), ()):
        instead = f"shapes {shapes}; sum over the predictions of a microbatch"
        if shapes == ():
            instead = (
                "one scalar; if it is the mean over a batch, pass "
                "jaxflat.flatness.from_mean_loss(loss_fn, num_predictions)"
            )
        raise TypeError(
            f"loss_fn must return two scalars (loss_sum, weight); it returned {instead}"
        )
    loss_sum, weight = map(jnp.asarray, result)
    if not jnp.issubdtype(loss_sum.dtype, jnp.floating):
        raise TypeError(f"loss_fn must return a floating loss_sum; it returned {loss_sum.dtype}")
    if jnp.issubdtype(weight.dtype, jnp.complexfloating):
        raise TypeError(f"loss_fn must return a real weight; it returned {weight.dtype}")
    return loss_sum, _floating(weight)


def wide_log_probs(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probabilities in at least float32, and the weights of the predictions.

    Exponentials and sums need more than 16 bits. Raises TypeError if `log_probs_fn` returns no such
    pair.
    """
    result = log_probs_fn(params, batch)
    shapes = jax.tree.map(jnp.shape, result)
    is_pair = isinstance(result, tuple) and len(jax.tree.leaves(result)) == len(result) == 2
    if not is_pair or len(shapes[0]) < 2 or shapes[0][:-1] != shapes[1]:
        raise TypeError(
            "log_probs_fn must return log-probabilities (..., V), with an axis of examples, and "
            f"weights (...); it returned shapes {shapes}"
        )
    log_probs, weights = map(jnp.asarray, result)
    if not jnp.issubdtype(log_probs.dtype, jnp.floating):
        raise TypeError(f"log_probs_fn must return floating arrays; it returned {log_probs.dtype}")
    return at_least_float32(log_probs), _floating(weights)


def _floating(weights: jax.Array) -> jax.Array:
    is_floating = jnp.issubdtype(weights.dtype, jnp.floating)
    return weights if is_floating else weights.astype(jnp.result_type(float))


@dataclass(frozen=True)
class _MeanLoss:
    """A loss_fn; equal ones share compiled programs."""

    loss: Callable[[PyTree, PyTree], jax.Array]
    num_predictions: float | Callable[[PyTree], Any]

    def __call__(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        result = self.loss(params, batch)
        shapes = jax.tree.map(jnp.shape, result)
        if shapes != ():
            raise TypeError(
                "from_mean_loss: loss(params, batch) must return one scalar, the mean over the "
                f"batch; it returned shapes {shapes}"
            )
        mean, number = at_least_float32(jnp.asarray(result)), self.num_predictions
        weight = jnp.asarray(number(batch) if callable(number) else number, mean.dtype)
        return mean * weight, weight


def from_mean_loss(
    loss: Callable[[PyTree, PyTree], jax.Array],
    num_predictions: float | Callable[[PyTree], Any],
) -> LossFn:
    """Return the loss_fn that estimators take, from a loss that is already a mean.

    loss: (params, batch) -> the mean over a microbatch's predictions, a scalar in nats.
    num_predictions: how many predictions that mean is over. A number, if every microbatch has the
    same; else (batch) -> number, such as `lambda batch: batch["mask"].sum()`: what `loss` divides
    by. It weights each microbatch: L = sum(number * mean) / sum(number). For a microbatch without
    predictions `loss` must return a number, such as 0, not 0 / 0.

    Raises ValueError for a number that is not positive.
    """
    if not callable(num_predictions):
        num_predictions = float(num_predictions)
        if not 0 < num_predictions < float("inf"):
            raise ValueError(f"num_predictions must be positive, not {num_predictions:g}")
    return _MeanLoss(loss, num_predictions)


# All inputs of an estimator.

ONLY_ARRAYS = (
    "pass only floating-point arrays and let the function add the rest (Flax: variables['params'] "
    "or nnx.split(model, nnx.Param, ...); Equinox: eqx.partition(model, eqx.is_inexact_array))"
)


def check_inputs(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, of one line, if an estimator's arguments do not fit.

    They are by name. The first is loss_fn or log_probs_fn.
    """
    kind, function = next(iter(arguments.items()))
    for name in COUNTS & arguments.keys():
        if not isinstance(arguments[name], Integral) or arguments[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {arguments[name]}")
    if "key" in arguments and not _is_key(arguments["key"]):
        raise TypeError(f"key must be a key such as jax.random.key(0), not {arguments['key']!r}")
    points = [name for name in ("params", "start", "end") if name in arguments]
    for name in points:
        _check_params(name, arguments[name])
    first = arguments[points[0]]
    for name in ("end", "vector", "update"):
        if name in arguments and _shapes(arguments[name]) != _shapes(first):
            raise ValueError(f"{name} must be shaped like {points[0]}")
    _check_microbatches({n: arguments[n] for n in ("batches", "labels") if n in arguments})
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"{kind} must be a function without arrays of its own, not a "
            f"{type(function).__name__}: pass arrays as params or in batches"
        ) from None
    _check_function(kind, function, first, arguments["batches"])


def _is_key(key: Any) -> bool:
    is_array = isinstance(key, (jax.Array, np.ndarray))
    return is_array and (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32)


def _shapes(tree: PyTree) -> tuple[Any, list]:
    return jax.tree.structure(tree), list(map(jnp.shape, jax.tree.leaves(tree)))


def _leaves(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    """Return the leaves with their names, such as 'params/layer/kernel'."""
    if isinstance(tree, Iterator):  # JAX warns of these
        return [(name, tree)]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(f"{name}/{path_name(path)}" if path else name, leaf) for path, leaf in leaves]


def _check_params(name: str, params: PyTree) -> None:
    """Raise unless the parameters are floating-point arrays, at least one."""
    leaves = _leaves(name, params)
    if not leaves:
        raise ValueError(f"{name} has no arrays; pass the parameters that training changes")
    for where, leaf in leaves:
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(f"{where} is a {type(leaf).__name__}, not an array; {ONLY_ARRAYS}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{where} has dtype {leaf.dtype}; {ONLY_ARRAYS}")
    if isinstance(params, Mapping) and {"params", "batch_stats"} <= set(params):
        raise ValueError(
            f"{name} holds all variables of a Flax module; pass variables['params'] and let the "
            "function add batch_stats, or they count as parameters"
        )


def _check_microbatches(trees: Mapping[str, PyTree]) -> None:
    """Raise unless all leaves are arrays with the same, not empty, leading axis."""
    sizes: dict[str, int] = {}
    for where, leaf in [pair for name, tree in trees.items() for pair in _leaves(name, tree)]:
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise TypeError(
                f"{where} is a {type(leaf).__name__}, not an array; stack the microbatches: "
                "jax.tree.map(lambda *leaves: jnp.stack(leaves), *list_of_microbatches)"
            )
        if not leaf.ndim:
            raise ValueError(f"{where} is a scalar; every leaf needs an axis of microbatches")
        sizes[where] = len(leaf)
    if not any(sizes.values()):
        raise ValueError("batches holds no microbatch")
    fewest, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[fewest] < sizes[most]:
        raise ValueError(
            f"the leading axis of {most} has {sizes[most]} entries, that of {fewest} "
            f"{sizes[fewest]}: every leaf must have one for each microbatch"
        )


def _check_function(kind: str, function: Callable, params: PyTree, batches: PyTree) -> None:
    """Raise unless the function fits the parameters and microbatches.

    The weights must have a positive sum, and probabilities must sum to 1. Values that another
    transformation traces are not known, and not checked.
    """
    inputs = kind, function, params, batches
    try:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, batches))):
            jax.eval_shape(partial(_total_weight, kind, function), params, batches)
            return
        total = _total_weight(*inputs)
        if isinstance(total, Tracer):  # the key is traced
            return
        total = float(total)
    except Exception as error:
        if advice := _advice(*inputs):
            raise ValueError(advice) from error
        raise
    if not 0 < total < float("inf"):
        raise ValueError(
            f"the weights that {kind} returns sum to {total:g} over all microbatches; they must be "
            "the numbers of predictions"
        )
    if kind == "log_probs_fn" and function not in NORMALIZED:
        if (excess := float(_excess(function, params, batches))) > MOST_EXCESS:
            raise ValueError(
                f"{kind} must return log-probabilities, which sum to 1; the log of a sum is "
                f"{excess:.3g} away from 0: apply jax.nn.log_softmax to the logits"
            )
        with suppress(TypeError):  # objects such as tuples have no weak references
            NORMALIZED.add(function)


def _pair_fn(kind: str, function: Callable) -> Callable:
    return partial(loss_and_weight if kind == "loss_fn" else wide_log_probs, function)


@partial(jax.jit, static_argnames=("kind", "function"))
def _total_weight(kind: str, function: Callable, params: PyTree, batches: PyTree) -> jax.Array:
    """Return the sum of all weights; raise if the function's shapes do not fit."""
    pair_fn, params = _pair_fn(kind, function), at_least_float32(params)
    first = jax.tree.map(lambda x: x[0], batches)
    program = jax.make_jaxpr(pair_fn)(params, first).jaxpr
    num_leaves = len(jax.tree.leaves(params))
    is_param = [place < num_leaves for place in range(len(program.invars))]
    if not _depend(program, is_param)[0]:
        raise ValueError(
            f"{kind} does not use params: its curvature is 0 (is its module already bound to "
            "parameters?)"
        )
    return jax.lax.map(lambda batch: pair_fn(params, batch)[1].sum(), batches).sum()


@partial(jax.jit, static_argnames="function")
def _excess(function: Callable, params: PyTree, batches: PyTree) -> jax.Array:
    """Return the largest |log sum(probabilities)| in the first microbatch."""
    first = jax.tree.map(lambda x: x[0], batches)
    log_probs, weights = wide_log_probs(function, at_least_float32(params), first)
    excess = jnp.abs(jax.nn.logsumexp(log_probs, axis=-1))
    return jnp.where(weights > 0, excess, 0).max(initial=0)


def _depend(program: Jaxpr, marked_inputs: list[bool]) -> list[bool]:
    """Return which outputs of a program depend on its marked inputs."""
    marked = {v for v, mark in zip(program.invars, marked_inputs, strict=True) if mark}

    def marks(variables: list) -> list[bool]:
        return [not isinstance(v, Literal) and v in marked for v in variables]

    for equation in program.eqns:
        outputs = [any(marks(equation.invars))] * len(equation.outvars)
        if equation.primitive.name == "jit":
            outputs = _depend(equation.params["jaxpr"].jaxpr, marks(equation.invars))
        marked |= {v for v, mark in zip(equation.outvars, outputs, strict=True) if mark}
    return marks(program.outvars)


def _advice(kind: str, function: Callable, params: PyTree, batches: PyTree) -> str | None:
    """Return what to do, if the function accepts the same inputs in another form only."""
    pair_fn = _pair_fn(kind, function)

    def accepts(params: PyTree, batch: PyTree) -> bool:
        try:
            jax.eval_shape(pair_fn, params, batch)
        except Exception:
            return False
        return True

    first = jax.eval_shape(partial(jax.tree.map, lambda x: x[0]), batches)
    if accepts(params, first):  # so the values were wrong, not the shapes
        return None
    if isinstance(batches, (list, tuple)) and accepts(params, batches[0]):
        return (
            f"batches is a {type(batches).__name__} of microbatches; stack it: "
            "jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)"
        )
    if accepts(params, batches):
        return (
            f"batches has no leading axis of microbatches: {kind} takes it whole; cut it into M: "
            "jax.tree.map(lambda x: x.reshape(M, -1, *x.shape[1:]), batches)"
        )
    if isinstance(params, Mapping) and "params" in params and accepts(params["params"], first):
        return f"params is wrapped: {kind} takes params['params']"
    if accepts({"params": params}, first):
        return f"params is not wrapped: {kind} takes {{'params': params}}"
    return None
