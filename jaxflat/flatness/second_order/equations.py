"""Classify the equations of a function's jaxpr by how their outputs depend on the parameters.

Each variable has an activity:
  CONSTANT: it does not depend on the parameters.
  INACTIVE: it depends on them, but no derivative of it is needed. Examples are indices,
    comparisons, outputs of `stop_gradient`, and values that the loss does not depend on.
  ACTIVE: its derivative is needed.

An equation with ACTIVE inputs has one of four kinds: it is linear in them, calls another jaxpr,
scans over one, or is a node. Nodes are all other equations, including the blocks of
`jax.checkpoint`, `custom_jvp` and `cond`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params, subjaxprs

CONSTANT, INACTIVE, ACTIVE = range(3)

CALLS = {"jit"}
BLOCKS = {*CALLS, "custom_jvp_call", "checkpoint", "remat2"}
# Linear in all inputs together.
LINEAR = {
    *("add", "add_any", "sub", "neg", "reduce_sum", "cumsum", "convert_element_type", "copy"),
    *("reshape", "broadcast_in_dim", "squeeze", "transpose", "rev", "slice", "pad"),
    *("concatenate", "split", "sharding_constraint", "reduce_precision"),
}
# Linear in the first input, if the others are constant.
LINEAR_IN_FIRST = {"gather", "dynamic_slice", "div"}
# Linear in all inputs but the first, if the first is constant.
LINEAR_BUT_FIRST = {"select_n"}
# Linear in either of two inputs, if the other is constant.
BILINEAR = {"mul", "dot_general", "conv_general_dilated"}
ELEMENTWISE = {
    *("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sin", "cos"),
    *("sqrt", "rsqrt", "square", "integer_pow", "pow", "abs", "sign", "max", "min", "neg"),
    *("add", "sub", "mul", "div", "select_n", "gt", "ge", "lt", "le", "eq", "ne", "copy"),
}
# Primitives that the walk cannot open: they have no reverse derivative, or the derivative of their
# body must not be taken equation by equation. The loss then uses `hessian_form`.
OPAQUE = {"while", "custom_vjp_call", "shard_map", "new_ref"}


def evaluate(equation: JaxprEqn, inputs: Sequence[Any]) -> list[jax.Array]:
    """Return the outputs of one equation."""
    params = equation.primitive.get_bind_params(equation.params)
    outputs = equation.primitive.bind(*inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def has_tangent(variable: Any) -> bool:
    """Return whether a variable holds real numbers."""
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def is_transparent(jaxpr: Jaxpr) -> bool:
    """Return whether no equation, nested ones included, is OPAQUE or has complex outputs."""
    names = {name_of(equation) for equation in jaxpr.eqns}
    outputs = (variable.aval for equation in jaxpr.eqns for variable in equation.outvars)
    dtypes = {getattr(aval, "dtype", jnp.dtype(bool)) for aval in outputs}
    if names & OPAQUE or any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return False
    return all(map(is_transparent, subjaxprs(jaxpr)))


def is_elementwise(equation: JaxprEqn) -> bool:
    """Return whether it maps one array to one array, each number to one number."""
    inputs = [v for v in equation.invars if not isinstance(v, Literal)]
    variables: list[Any] = [*inputs, *equation.outvars]
    if len(variables) != 2 or len({(v.aval.shape, v.aval.dtype) for v in variables}) != 1:
        return False
    return _applies_elementwise(equation)


def _applies_elementwise(equation: JaxprEqn) -> bool:
    if name_of(equation) not in BLOCKS:
        return name_of(equation) in ELEMENTWISE
    bodies = jaxprs_in_params(equation.params)
    return all(_applies_elementwise(inner) for jaxpr in bodies for inner in jaxpr.eqns)


def scan_counts(equation: JaxprEqn) -> tuple[int, int]:
    """Return (number of a scan's inputs that all steps share, number of values it carries).

    Inputs come in the order shared, carried, sliced; outputs in the order carried, stacked. The
    shapes alone tell them apart: sliced and stacked arrays have one more axis outside the scan.
    """
    body = equation.params["jaxpr"]

    def num_stacked(variables: Sequence[Any], avals: Sequence[Any]) -> int:
        pairs = zip(variables, avals, strict=True)
        return sum(variable.aval.ndim > aval.ndim for variable, aval in pairs)

    num_carried = len(equation.outvars) - num_stacked(equation.outvars, body.out_avals)
    num_sliced = num_stacked(equation.invars, body.in_avals)
    return len(equation.invars) - num_sliced - num_carried, num_carried


def name_of(equation: JaxprEqn) -> str:
    """Return the name of the primitive that an equation applies."""
    return equation.primitive.name


def classify(equation: JaxprEqn, inputs: list[int], outputs: list[int]) -> str:
    """Return "call", "scan", "inactive", "linear" or "node", by the activities of both sides."""
    name = name_of(equation)
    # If some inputs are not CONSTANT, a call or a scan may still contain CONSTANT values.
    if max(inputs, default=CONSTANT) > CONSTANT and (name in CALLS or name == "scan"):
        return "scan" if name == "scan" else "call"
    if max(outputs, default=CONSTANT) < ACTIVE:
        return "inactive"
    linear = (
        name in LINEAR
        or (name in LINEAR_IN_FIRST and max(inputs[1:]) == CONSTANT)
        or (name in LINEAR_BUT_FIRST and inputs[0] == CONSTANT)
        or (name in BILINEAR and sorted(inputs) == [CONSTANT, ACTIVE])
    )
    return "linear" if linear else "node"
