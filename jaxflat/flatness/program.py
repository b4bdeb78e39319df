"""The program of a function as JAX traces it (a jaxpr), and a walk from equation to equation.

Levels say what depends on the parameters: a FIXED value does not; a STEPPED one does, but has
no derivative (an index, a comparison, what `stop_gradient` returns); a MOVING one has a derivative.
Equations with MOVING inputs are linear in them, or calls or scans of other programs, or nodes:
whatever is left, blocks as `jax.checkpoint`, `custom_jvp` and `cond` among them.
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params, subjaxprs

PyTree = Any
FIXED, STEPPED, MOVING = range(3)

CALLS = {"jit", "pjit", "closed_call", "core_call"}
# Linear in all inputs together; in the first alone; in all but the first; in either of two.
LINEAR = {
    *("add", "add_any", "sub", "neg", "reduce_sum", "cumsum", "convert_element_type", "copy"),
    *("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose", "rev", "slice", "pad"),
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
OPAQUE = {"while", "custom_vjp_call", "custom_vjp_call_jaxpr", "shard_map", "pmap", "xla_pmap"}


class Visitor(NamedTuple):
    """What a walk does: with nodes, with equations that are linear or whose outputs do not move,
    and with values whose level is raised."""

    node: Callable[[JaxprEqn, list, list[int], PyTree], tuple[list, PyTree, jax.Array]]
    linear: Callable[[JaxprEqn, list, list[int]], list]
    still: Callable[[JaxprEqn, list, list[int]], list]
    raised: Callable[[Any, int, int, Any], Any]


def evaluate(equation: JaxprEqn, inputs: Sequence[Any]) -> list[jax.Array]:
    """The outputs of one equation."""
    how = equation.primitive.get_bind_params(equation.params)
    outputs = equation.primitive.bind(*inputs, **how)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def has_tangent(variable: Any) -> bool:
    """Whether a variable is of real or complex numbers."""
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def is_differentiable(jaxpr: Jaxpr) -> bool:
    """Whether all equations, those inside others too, have derivatives forward and backward."""
    names = {_name(equation) for equation in jaxpr.eqns}
    return not names & OPAQUE and all(map(is_differentiable, subjaxprs(jaxpr)))


def is_elementwise(equation: JaxprEqn) -> bool:
    """Whether it has one input and one output, and each number is a function of one number."""
    inputs = [v for v in equation.invars if not isinstance(v, Literal)]
    variables = [*inputs, *equation.outvars]
    if len(variables) != 2 or len({(v.aval.shape, v.aval.dtype) for v in variables}) != 1:
        return False
    return _is_of_elements(equation)


def _is_of_elements(equation: JaxprEqn) -> bool:
    inside = list(jaxprs_in_params(equation.params))
    equations = [inner for jaxpr in inside for inner in jaxpr.eqns]
    return all(map(_is_of_elements, equations)) if inside else _name(equation) in ELEMENTWISE


def _name(equation: JaxprEqn) -> str:
    return equation.primitive.name


def walk(
    visitor: Visitor, program: ClosedJaxpr, inputs: Sequence, levels: Sequence[int], slots: Any
) -> tuple[list, list, jax.Array]:
    """Outputs, what `visitor.node` returned for each node, and the sum of the nodes' terms.

    `slots` holds what each node gets, in the order of the walk; in a scan all steps' together.
    """
    jaxpr, level_of = program.jaxpr, _levels(program.jaxpr, levels)
    known = dict(zip(jaxpr.constvars, program.consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else known[variable]

    slots = repeat(None) if slots is None else iter(slots)
    results, total = [], jnp.zeros((), jnp.result_type(float))
    for equation in jaxpr.eqns:
        args = list(map(read, equation.invars)), list(map(level_of, equation.invars))
        kind = _kind(equation, args[1], list(map(level_of, equation.outvars)))
        if kind in ("linear", "still"):
            outputs = getattr(visitor, kind)(equation, *args)
        else:
            if kind == "call":
                done = walk(visitor, equation.params["jaxpr"], *args, next(slots))
            elif kind == "scan":
                done = _walk_scan(visitor, equation, *args, next(slots))
            else:
                done = visitor.node(equation, *args, next(slots))
            outputs, result, term = done
            results.append(result)
            total += term
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars)), results, total


def _walk_scan(
    visitor: Visitor, equation: JaxprEqn, values: list, levels: list[int], slots: PyTree
) -> tuple[list, PyTree, jax.Array]:
    how, (inside, outside) = equation.params, _levels_in_scan(equation, levels)
    start, stop = how["num_consts"], how["num_consts"] + how["num_carry"]
    carry_levels, avals = inside[start:stop], how["jaxpr"].in_avals[start:stop]
    after = outside[: how["num_carry"]]

    def step(carry: PyTree, given: PyTree) -> tuple[PyTree, PyTree]:
        (carried, total), (sliced, slot) = carry, given
        inputs = [*values[:start], *carried, *sliced]
        outputs, results, term = walk(visitor, how["jaxpr"], inputs, inside, slot)
        carried = list(map(visitor.raised, outputs[: stop - start], after, carry_levels, avals))
        return (carried, total + term), (outputs[stop - start :], results)

    first = list(map(visitor.raised, values[start:stop], levels[start:stop], carry_levels, avals))
    (carried, total), (stacked, results) = jax.lax.scan(
        step,
        (first, jnp.zeros((), jnp.result_type(float))),
        (values[stop:], slots),
        length=how["length"],
        reverse=how["reverse"],
        unroll=how["unroll"],
    )
    return [*carried, *stacked], results, total


def _levels(jaxpr: Jaxpr, levels: Sequence[int]) -> Callable[[Any], int]:
    """The level of every variable, given those of the inputs."""
    found, wanted = dict(zip(jaxpr.invars, levels, strict=True)), _wanted(jaxpr)

    def level_of(variable: Any) -> int:
        return FIXED if isinstance(variable, Literal) else found.get(variable, FIXED)

    for equation in jaxpr.eqns:
        inputs = list(map(level_of, equation.invars))
        outputs = [max(inputs, default=FIXED)] * len(equation.outvars)
        if _name(equation) == "scan":
            first, count = equation.params["num_consts"], equation.params["num_carry"]
            inputs, outputs = _levels_in_scan(equation, inputs)
            outputs[:count] = inputs[first : first + count]
        elif _name(equation) in CALLS:
            inner = equation.params["jaxpr"].jaxpr
            outputs = list(map(_levels(inner, inputs), inner.outvars))
        for variable, level in zip(equation.outvars, outputs, strict=True):
            moves = variable in wanted and has_tangent(variable)
            found[variable] = level if moves else min(level, STEPPED)
    return level_of


def _wanted(jaxpr: Jaxpr) -> set:
    """The variables that the outputs come from, other than by `stop_gradient`."""
    wanted = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for equation in reversed(jaxpr.eqns):
        if _name(equation) == "stop_gradient":
            wanted -= set(equation.outvars)
        elif not wanted.isdisjoint(equation.outvars):
            wanted |= {v for v in equation.invars if not isinstance(v, Literal)}
    return wanted


def _levels_in_scan(equation: JaxprEqn, levels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those of a step's inputs and outputs, what it carries being of the highest it ever has."""
    start, count = equation.params["num_consts"], equation.params["num_carry"]
    body, levels = equation.params["jaxpr"].jaxpr, list(levels)
    while True:
        outputs = list(map(_levels(body, levels), body.outvars))
        raised = list(map(max, levels[start : start + count], outputs[:count]))
        if raised == levels[start : start + count]:
            return levels, outputs
        levels[start : start + count] = raised


def _kind(equation: JaxprEqn, inputs: list[int], outputs: list[int]) -> str:
    name = _name(equation)
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
