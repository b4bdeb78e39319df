"""The equations of a function's program (a jaxpr): what each does with what depends on parameters.

Levels say what depends on the parameters: a FIXED value does not; a STEPPED one does, but no
derivative of it is needed (an index, a comparison, what `stop_gradient` returns, what the loss does
not come from); a MOVING one has a derivative.
Equations with MOVING inputs are linear in them, or calls or scans of other programs, or nodes:
whatever is left, blocks as `jax.checkpoint`, `custom_jvp` and `cond` among them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params, subjaxprs

FIXED, STEPPED, MOVING = range(3)

CALLS = {"jit"}
BLOCKS = {*CALLS, "custom_jvp_call", "checkpoint", "remat2"}
# Linear in all inputs together; in the first alone; in all but the first; in either of two.
LINEAR = {
    *("add", "add_any", "sub", "neg", "reduce_sum", "cumsum", "convert_element_type", "copy"),
    *("reshape", "broadcast_in_dim", "squeeze", "transpose", "rev", "slice", "pad"),
    *("concatenate", "split", "sharding_constraint", "reduce_precision"),
}
LINEAR_IN_FIRST = {"gather", "dynamic_slice", "div"}
LINEAR_BUT_FIRST = {"select_n"}
BILINEAR = {"mul", "dot_general", "conv_general_dilated"}
ELEMENTWISE = {
    *("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sin", "cos"),
    *("sqrt", "rsqrt", "square", "integer_pow", "pow", "abs", "sign", "max", "min", "neg"),
    *("add", "sub", "mul", "div", "select_n", "gt", "ge", "lt", "le", "eq", "ne", "copy"),
}
# No derivative backward, or none that may be taken equation by equation.
OPAQUE = {"while", "custom_vjp_call", "shard_map", "new_ref"}


def evaluate(equation: JaxprEqn, inputs: Sequence[Any]) -> list[jax.Array]:
    """The outputs of one equation."""
    how = equation.primitive.get_bind_params(equation.params)
    outputs = equation.primitive.bind(*inputs, **how)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def has_tangent(variable: Any) -> bool:
    """Whether a variable is of real numbers."""
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def can_be_taken_apart(jaxpr: Jaxpr) -> bool:
    """Whether no equation, those inside others too, is OPAQUE or of complex numbers."""
    names = {name_of(equation) for equation in jaxpr.eqns}
    outputs = (variable.aval for equation in jaxpr.eqns for variable in equation.outvars)
    dtypes = {getattr(aval, "dtype", jnp.dtype(bool)) for aval in outputs}
    if names & OPAQUE or any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return False
    return all(map(can_be_taken_apart, subjaxprs(jaxpr)))


def is_elementwise(equation: JaxprEqn) -> bool:
    """Whether it has one input and one output, and each number is a function of one number."""
    inputs = [v for v in equation.invars if not isinstance(v, Literal)]
    variables: list[Any] = [*inputs, *equation.outvars]
    if len(variables) != 2 or len({(v.aval.shape, v.aval.dtype) for v in variables}) != 1:
        return False
    return _is_of_elements(equation)


def _is_of_elements(equation: JaxprEqn) -> bool:
    if name_of(equation) not in BLOCKS:
        return name_of(equation) in ELEMENTWISE
    inside = jaxprs_in_params(equation.params)
    return all(_is_of_elements(inner) for jaxpr in inside for inner in jaxpr.eqns)


def parts_of_scan(equation: JaxprEqn) -> tuple[int, int]:
    """How many of a scan's inputs are the same in each step, and how many it carries after them.

    Told by the avals alone: what is given or left step by step has one axis more outside.
    """
    inside = equation.params["jaxpr"]

    def num_stacked(variables: Sequence[Any], avals: Sequence[Any]) -> int:
        pairs = zip(variables, avals, strict=True)
        return sum(variable.aval.ndim > aval.ndim for variable, aval in pairs)

    num_carried = len(equation.outvars) - num_stacked(equation.outvars, inside.out_avals)
    num_sliced = num_stacked(equation.invars, inside.in_avals)
    return len(equation.invars) - num_sliced - num_carried, num_carried


def name_of(equation: JaxprEqn) -> str:
    """The name of what an equation applies."""
    return equation.primitive.name


def kind_of(equation: JaxprEqn, inputs: list[int], outputs: list[int]) -> str:
    """One of call, scan, still, linear and node, by the levels of inputs and outputs."""
    name = name_of(equation)
    # What is inside a call or a scan may be FIXED where not all of its inputs are.
    if max(inputs, default=FIXED) > FIXED and (name in CALLS or name == "scan"):
        return "scan" if name == "scan" else "call"
    if max(outputs, default=FIXED) < MOVING:
        return "still"
    linear = (
        name in LINEAR
        or (name in LINEAR_IN_FIRST and max(inputs[1:]) == FIXED)
        or (name in LINEAR_BUT_FIRST and inputs[0] == FIXED)
        or (name in BILINEAR and sorted(inputs) == [FIXED, MOVING])
    )
    return "linear" if linear else "node"
