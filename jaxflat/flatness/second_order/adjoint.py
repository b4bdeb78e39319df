"""Compute v' H v for many v, each at about the cost of a gradient: the second-order adjoint method.

The loss is a program of nodes x_n = f_n(inputs). With lambda_n = d loss / d x_n (one backward pass,
independent of v) its Lagrangian is stationary in every x_n, so second derivatives of x_n drop out:

    v' H v = sum_n lambda_n . D^2 f_n [dx, dx]        (Griewank & Walther, 2008)

with dx the tangents of a node's inputs along v. Only nonlinear nodes contribute. A matrix product
costs two products for its tangent and one for D^2 f; d^2/dt^2 of the loss takes five.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxflat.flatness.inputs import LossFn
from jaxflat.flatness.products import QuadraticForm, hessian_form
from jaxflat.flatness.second_order.equations import (
    ACTIVE,
    CONSTANT,
    INACTIVE,
    LINEAR,
    LINEAR_BUT_FIRST,
    evaluate,
    has_tangent,
    is_elementwise,
    is_transparent,
    name_of,
)
from jaxflat.flatness.second_order.program import Visitor, walk
from jaxflat.flatness.trees import PyTree, at_least_float32


class Node(NamedTuple):
    """The inputs of a node that depend on the parameters, and one array for each real output.

    An elementwise node stores f' as its inputs and f'' as curvatures, so all v share both. Other
    nodes have no curvatures.
    """

    inputs: list[jax.Array]
    of_outputs: list[jax.Array]
    curvatures: list[jax.Array]


def shared_hessian_form(
    loss_fn: LossFn, params: PyTree, batch: PyTree
) -> tuple[QuadraticForm, jax.Array]:
    """Return `v -> v' H v` of one microbatch's loss sum, and its weight.

    The inputs and adjoints of the nodes do not depend on v: they are computed once and stored. A
    block of `jax.checkpoint` is one node, recomputed for each v. A loss whose jaxpr is not
    transparent gets `hessian_form`. The result is nan if the gradient of the loss is nan.
    """
    leaves, structure = jax.tree.flatten(params)
    inputs, batch_structure = jax.tree.flatten(batch)

    def loss_of_leaves(leaves: list, inputs: list) -> tuple[jax.Array, jax.Array]:
        trees = structure.unflatten(leaves), batch_structure.unflatten(inputs)
        return loss_fn(*trees)

    program = jax.make_jaxpr(loss_of_leaves)(leaves, inputs)
    activities = [ACTIVE] * len(leaves) + [CONSTANT] * len(inputs)
    if not is_transparent(program.jaxpr):
        weight = loss_fn(params, batch)[1]
        return lambda vector: hessian_form(loss_fn, params, batch, vector)[0], weight

    (loss, weight), nodes = walk(RECORD, program, [*leaves, *inputs], activities, None)
    no_tangents = [*map(jnp.zeros_like, leaves), *inputs]

    def loss_tangent(shifts: list) -> jax.Array:
        data = jax.tree.map(lambda n, s: n._replace(of_outputs=s), nodes, shifts, is_leaf=_is_node)
        (tangent, _), _ = walk(SHIFT, program, no_tangents, activities, data)
        return jnp.zeros(()) if tangent is None else tangent  # None: no derivative

    outputs = jax.tree.map(lambda n: n.of_outputs, nodes, is_leaf=_is_node)
    adjoints = jax.grad(loss_tangent)(jax.tree.map(jnp.zeros_like, outputs))

    def with_adjoints(node: Node, adjoints: list) -> Node:
        if node.curvatures:
            adjoints = list(map(jnp.multiply, adjoints, node.curvatures))
        return node._replace(of_outputs=adjoints)

    data = jax.tree.map(with_adjoints, nodes, adjoints, is_leaf=_is_node)

    dtype = at_least_float32(loss).dtype
    second_order = Visitor(
        partial(_second_order_node, dtype=dtype), _linear_tangents, _inactive_tangents, _promote
    )

    def form(vector: PyTree) -> jax.Array:
        tangents = [*jax.tree.leaves(vector), *inputs]
        _, terms = walk(second_order, program, tangents, activities, data)
        return sum(map(jnp.sum, jax.tree.leaves(terms)), start=jnp.zeros((), dtype))

    return form, weight


def _is_node(tree: Any) -> bool:
    return isinstance(tree, Node)


# The rules of the three walks. RECORD computes values; the others compute tangents, None where a
# value is INACTIVE, next to the values that are CONSTANT.


def _record_node(
    equation: JaxprEqn, values: list, activities: list[int], _: None
) -> tuple[list, Node]:
    outputs = evaluate(equation, values)
    inputs = [x for x, activity in zip(values, activities, strict=True) if activity > CONSTANT]
    if not is_elementwise(equation):
        real = [x for x, v in zip(outputs, equation.outvars, strict=True) if has_tangent(v)]
        return outputs, Node(inputs, real, [])
    pairs = zip(values, activities, strict=True)
    ones = [jnp.ones_like(x) if activity == ACTIVE else x for x, activity in pairs]
    slope_of, at, along = _tangent_of(equation, ones, activities, inputs)
    slopes, curvatures = jax.jvp(slope_of, at, along)
    return outputs, Node(slopes, outputs, curvatures)


def _shift_node(
    equation: JaxprEqn, values: list, activities: list[int], node: Node
) -> tuple[list, None]:
    """The tangents plus a shift: the derivative by the shift is the node's adjoint."""
    tangents, _ = _derivatives(equation, values, activities, node, 1)
    shifted = list(map(jnp.add, tangents, node.of_outputs))
    return _with_gaps(equation, shifted), None


def _second_order_node(
    equation: JaxprEqn, values: list, activities: list[int], node: Node, *, dtype: Any
) -> tuple[list, list]:
    """The tangents, and lambda_n . D^2 f_n [dx, dx]."""
    tangents, seconds = _derivatives(equation, values, activities, node, 2)
    wide = partial(jax.lax.convert_element_type, new_dtype=dtype)
    terms = [jnp.sum(wide(a) * wide(s)) for a, s in zip(node.of_outputs, seconds, strict=True)]
    return _with_gaps(equation, tangents), terms


def _tangent_of(
    equation: JaxprEqn, values: list, activities: list[int], inputs: list
) -> tuple[Callable[..., list], tuple, tuple]:
    """Return a node's `x -> D f(x)[dx]`, the stored x, and dx.

    `values` holds dx and the CONSTANT inputs.
    """
    stored = iter(inputs)
    pairs = zip(values, activities, strict=True)
    primals = [x if activity == CONSTANT else next(stored) for x, activity in pairs]
    active = [i for i, activity in enumerate(activities) if activity == ACTIVE]
    along = tuple(values[i] for i in active)

    def node(*active_inputs: jax.Array) -> list[jax.Array]:
        arguments = list(primals)
        for i, x in zip(active, active_inputs, strict=True):
            arguments[i] = x
        outputs = zip(evaluate(equation, arguments), equation.outvars, strict=True)
        return [x for x, variable in outputs if has_tangent(variable)]

    return lambda *x: jax.jvp(node, x, along)[1], tuple(primals[i] for i in active), along


def _derivatives(
    equation: JaxprEqn, values: list, activities: list[int], node: Node, order: int
) -> tuple[list, list]:
    """Return a node's tangents and, for order 2, D^2 f [dx, dx].

    For an elementwise node the latter is dx^2 alone, because its adjoint already contains f''.
    """
    if node.curvatures:
        (tangent,) = [x for x, a in zip(values, activities, strict=True) if a == ACTIVE]
        return [node.inputs[0] * tangent], [at_least_float32(tangent) ** 2]
    tangent_of, at, along = _tangent_of(equation, values, activities, node.inputs)
    return jax.jvp(tangent_of, at, along) if order == 2 else (tangent_of(*at), [])


def _with_gaps(equation: JaxprEqn, tangents: list) -> list:
    """Return one entry per output, None for an output without a tangent."""
    tangent = iter(tangents)
    return [next(tangent) if has_tangent(v) else None for v in equation.outvars]


def _linear_tangents(equation: JaxprEqn, values: list, activities: list[int]) -> list:
    name = name_of(equation)
    if name in LINEAR | LINEAR_BUT_FIRST:
        first = 0 if name in LINEAR else 1
        for i in range(first, len(values)):
            values[i] = _promote(values[i], activities[i], ACTIVE, equation.invars[i].aval)
    if name == "gather":  # the tangent of its fill value is 0
        equation = equation.replace(params=equation.params | {"fill_value": 0})
    return evaluate(equation, values)


def _inactive_tangents(equation: JaxprEqn, values: list, activities: list[int]) -> list:
    constant = max(activities, default=CONSTANT) == CONSTANT
    return evaluate(equation, values) if constant else [None] * len(equation.outvars)


def _promote(value: Any, activity: int, target: int, aval: Any) -> Any:
    """Return the tangent of a value that from here on has the activity `target`."""
    if target == INACTIVE:
        return None
    return value if activity == target else jnp.zeros(aval.shape, aval.dtype)


def _evaluate(equation: JaxprEqn, values: list, _: list[int]) -> list:
    return evaluate(equation, values)


RECORD = Visitor(_record_node, _evaluate, _evaluate, lambda value, *_: value)
SHIFT = Visitor(_shift_node, _linear_tangents, _inactive_tangents, _promote)
