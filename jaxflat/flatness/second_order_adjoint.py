"""v' H v for many v at about the price of a gradient each: the second-order adjoint method.

The loss is a program of nodes x_n = f_n(inputs). Its Lagrangian is stationary in every x_n once
lambda_n = d loss / d x_n (one backward pass, no v in it), so second derivatives of x_n drop out:

    v' H v = sum_n lambda_n . D^2 f_n [dx, dx]        (Griewank & Walther, 2008)

with dx the tangents of a node's inputs along v. Only nonlinear nodes count. A matrix product
costs two products for its tangent and one for D^2 f, where d^2/dt^2 of the loss takes five.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxflat.flatness import program
from jaxflat.flatness.equations import (
    FIXED,
    LINEAR,
    LINEAR_BUT_FIRST,
    MOVING,
    STEPPED,
    can_be_taken_apart,
    evaluate,
    has_tangent,
    is_elementwise,
    name_of,
)
from jaxflat.flatness.products import LossFn, PyTree, at_least_float32, loss_and_weight
from jaxflat.flatness.quadratic_forms import hessian_form


class Node(NamedTuple):
    """A node's inputs that depend on the parameters, and something for each of its outputs.

    Of an elementwise one f' in place of inputs and f'' as curvatures, so that both are shared too.
    """

    inputs: list[jax.Array]
    of_outputs: list[jax.Array]
    curvatures: list[jax.Array]


def shared_hessian_form(
    loss_fn: LossFn, params: PyTree, batch: PyTree
) -> tuple[Callable[[PyTree], jax.Array], jax.Array]:
    """`v -> v' H v` of one microbatch's loss sum, and its weight.

    What v has no part in, the nodes' inputs and adjoints, is computed once and kept; a block of
    `jax.checkpoint` is one node, whose inside is computed anew for each v. Losses of programs that
    cannot be taken apart get `hessian_form`. Not a number where the loss's gradient is not one.
    """
    leaves, structure = jax.tree.flatten(params)
    inputs, batch_structure = jax.tree.flatten(batch)

    def of_leaves(leaves: list, inputs: list) -> tuple[jax.Array, jax.Array]:
        trees = structure.unflatten(leaves), batch_structure.unflatten(inputs)
        return loss_and_weight(loss_fn, *trees)

    traced = jax.make_jaxpr(of_leaves)(leaves, inputs)
    levels = [MOVING] * len(leaves) + [FIXED] * len(inputs)
    if not can_be_taken_apart(traced.jaxpr):
        weight = loss_and_weight(loss_fn, params, batch)[1]
        return lambda vector: hessian_form(loss_fn, params, batch, vector)[0], weight

    (loss, weight), nodes = program.walk(RECORD, traced, [*leaves, *inputs], levels, None)
    still = [*map(jnp.zeros_like, leaves), *inputs]

    def loss_tangent(shifts: list) -> jax.Array:
        slots = jax.tree.map(lambda n, s: n._replace(of_outputs=s), nodes, shifts, is_leaf=_is_node)
        (tangent, _), _ = program.walk(SHIFTED, traced, still, levels, slots)
        return jnp.zeros(()) if tangent is None else tangent  # None: no derivative

    outputs = jax.tree.map(lambda n: n.of_outputs, nodes, is_leaf=_is_node)
    adjoints = jax.grad(loss_tangent)(jax.tree.map(jnp.zeros_like, outputs))

    def weighted(node: Node, adjoints: list) -> Node:
        if node.curvatures:
            adjoints = list(map(jnp.multiply, adjoints, node.curvatures))
        return node._replace(of_outputs=adjoints)

    slots = jax.tree.map(weighted, nodes, adjoints, is_leaf=_is_node)

    dtype = at_least_float32(loss).dtype
    curved = program.Visitor(partial(_curved, dtype=dtype), _tangents, _still, _raised)

    def form(vector: PyTree) -> jax.Array:
        moving = [*jax.tree.leaves(vector), *inputs]
        _, terms = program.walk(curved, traced, moving, levels, slots)
        return sum(map(jnp.sum, jax.tree.leaves(terms)), start=jnp.zeros((), dtype))

    return form, weight


def _is_node(tree: Any) -> bool:
    return isinstance(tree, Node)


def _recorded(equation: JaxprEqn, values: list, levels: list[int], _: None) -> tuple[list, Node]:
    outputs = evaluate(equation, values)
    inputs = [x for x, level in zip(values, levels, strict=True) if level > FIXED]
    if not is_elementwise(equation):
        wanted = [x for x, v in zip(outputs, equation.outvars, strict=True) if has_tangent(v)]
        return outputs, Node(inputs, wanted, [])
    pairs = zip(values, levels, strict=True)
    ones = [jnp.ones_like(x) if level == MOVING else x for x, level in pairs]
    slope_of, at, along = _tangent_of(equation, ones, levels, inputs)
    slopes, curvatures = jax.jvp(slope_of, at, along)
    return outputs, Node(slopes, outputs, curvatures)


def _tangent_of(
    equation: JaxprEqn, values: list, levels: list[int], inputs: list
) -> tuple[Callable[..., list], tuple, tuple]:
    """A node's `x -> D f(x)[dx]`, and the x that was kept; `values` holds dx and what is FIXED."""
    kept = iter(inputs)
    primals = [x if level == FIXED else next(kept) for x, level in zip(values, levels, strict=True)]
    places = [i for i, level in enumerate(levels) if level == MOVING]
    along = tuple(values[i] for i in places)

    def node(*moving: jax.Array) -> list[jax.Array]:
        everything = list(primals)
        for place, x in zip(places, moving, strict=True):
            everything[place] = x
        outputs = zip(evaluate(equation, everything), equation.outvars, strict=True)
        return [x for x, variable in outputs if has_tangent(variable)]

    return lambda *x: jax.jvp(node, x, along)[1], tuple(primals[i] for i in places), along


def _shifted(equation: JaxprEqn, values: list, levels: list[int], slot: Node) -> tuple[list, None]:
    tangents, _ = _derivatives(equation, values, levels, slot, 1)
    shifted = list(map(jnp.add, tangents, slot.of_outputs))
    return _with_gaps(equation, shifted), None


def _curved(
    equation: JaxprEqn, values: list, levels: list[int], slot: Node, *, dtype: Any
) -> tuple[list, list]:
    tangents, seconds = _derivatives(equation, values, levels, slot, 2)
    wide = partial(jax.lax.convert_element_type, new_dtype=dtype)
    terms = [jnp.sum(wide(a) * wide(s)) for a, s in zip(slot.of_outputs, seconds, strict=True)]
    return _with_gaps(equation, tangents), terms


def _derivatives(
    equation: JaxprEqn, values: list, levels: list[int], slot: Node, order: int
) -> tuple[list, list]:
    """A node's tangents, and if asked for D^2 f [dx, dx] (times f'' where adjoints hold it)."""
    if slot.curvatures:
        (tangent,) = [x for x, level in zip(values, levels, strict=True) if level == MOVING]
        return [slot.inputs[0] * tangent], [at_least_float32(tangent) ** 2]
    tangent_of, at, along = _tangent_of(equation, values, levels, slot.inputs)
    return jax.jvp(tangent_of, at, along) if order == 2 else (tangent_of(*at), [])


def _with_gaps(equation: JaxprEqn, tangents: list) -> list:
    tangent = iter(tangents)
    return [next(tangent) if has_tangent(v) else None for v in equation.outvars]


def _tangents(equation: JaxprEqn, values: list, levels: list[int]) -> list:
    name = name_of(equation)
    if name in LINEAR | LINEAR_BUT_FIRST:
        first = 0 if name in LINEAR else 1
        for i in range(first, len(values)):
            values[i] = _raised(values[i], levels[i], MOVING, equation.invars[i].aval)
    if name == "gather":  # what it fills in does not move
        equation = equation.replace(params=equation.params | {"fill_value": 0})
    if name == "gather":
        equation = equation.replace(params=equation.params | {"fill_value": 0})
    return evaluate(equation, values)


def _raised(value: Any, level: int, to: int, aval: Any) -> Any:
    """What stands for a value, of `level`, from where it counts as one of another."""
    if to == STEPPED:
        return None
    return value if level == to else jnp.zeros(aval.shape, aval.dtype)


def _still(equation: JaxprEqn, values: list, levels: list[int]) -> list:
    fixed = max(levels, default=FIXED) == FIXED
    return evaluate(equation, values) if fixed else [None] * len(equation.outvars)


def _value(equation: JaxprEqn, values: list, _: list[int]) -> list:
    return evaluate(equation, values)


RECORD = program.Visitor(_recorded, _value, _value, lambda value, *_: value)
SHIFTED = program.Visitor(_shifted, _tangents, _still, _raised)
