"""Walk through the jaxpr of a function, equation by equation."""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxflat.flatness.second_order.equations import (
    CALLS,
    CONSTANT,
    INACTIVE,
    classify,
    has_tangent,
    name_of,
    scan_counts,
)
from jaxflat.flatness.trees import PyTree


class Visitor(NamedTuple):
    """The rules of a walk.

    node, linear and inactive compute the outputs of an equation of that kind; node also returns a
    result. promote(value, activity, target, aval) converts a value from one activity to another.
    """

    node: Callable[[JaxprEqn, list, list[int], PyTree], tuple[list, PyTree]]
    linear: Callable[[JaxprEqn, list, list[int]], list]
    inactive: Callable[[JaxprEqn, list, list[int]], list]
    promote: Callable[[Any, int, int, Any], Any]


def walk(
    visitor: Visitor,
    program: ClosedJaxpr,
    inputs: Sequence,
    activities: Sequence[int],
    node_data: Any,
) -> tuple[list, list]:
    """Return the outputs, and the result of `visitor.node` for each node.

    `node_data` holds the last argument of each node's call, in the order of the walk; None gives
    None to all. In a scan, both it and the results are stacked over steps.
    """
    jaxpr, activity_of = program.jaxpr, _activities(program.jaxpr, activities)
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    node_data = repeat(None) if node_data is None else iter(node_data)
    results = []
    for equation in jaxpr.eqns:
        args = list(map(read, equation.invars)), list(map(activity_of, equation.invars))
        kind = classify(equation, args[1], list(map(activity_of, equation.outvars)))
        if kind in ("linear", "inactive"):
            outputs = getattr(visitor, kind)(equation, *args)
        else:
            if kind == "call":
                pair = walk(visitor, equation.params["jaxpr"], *args, next(node_data))
            elif kind == "scan":
                pair = _walk_scan(visitor, equation, *args, next(node_data))
            else:
                pair = visitor.node(equation, *args, next(node_data))
            outputs, result = pair
            results.append(result)
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars)), results


def _walk_scan(
    visitor: Visitor, equation: JaxprEqn, values: list, activities: list[int], node_data: PyTree
) -> tuple[list, PyTree]:
    params, (inside, outside) = equation.params, _scan_activities(equation, activities)
    start, count = scan_counts(equation)
    stop = start + count
    carry_activities, avals = inside[start:stop], params["jaxpr"].in_avals[start:stop]
    after = outside[:count]

    def step(carry: PyTree, sliced_and_data: PyTree) -> tuple[PyTree, PyTree]:
        sliced, data = sliced_and_data
        inputs = [*values[:start], *carry, *sliced]
        outputs, results = walk(visitor, params["jaxpr"], inputs, inside, data)
        carried = list(map(visitor.promote, outputs[:count], after, carry_activities, avals))
        return carried, (outputs[count:], results)

    before = activities[start:stop]
    first = list(map(visitor.promote, values[start:stop], before, carry_activities, avals))
    carried, (stacked, results) = jax.lax.scan(
        step,
        first,
        (values[stop:], node_data),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carried, *stacked], results


def _activities(jaxpr: Jaxpr, activities: Sequence[int]) -> Callable[[Any], int]:
    """Return the activity of every variable as a function, given the activities of the inputs."""
    known, useful = dict(zip(jaxpr.invars, activities, strict=True)), _useful(jaxpr)

    def activity_of(variable: Any) -> int:
        return CONSTANT if isinstance(variable, Literal) else known.get(variable, CONSTANT)

    for equation in jaxpr.eqns:
        inputs = list(map(activity_of, equation.invars))
        outputs = [max(inputs, default=CONSTANT)] * len(equation.outvars)
        if name_of(equation) == "scan":
            first, count = scan_counts(equation)
            inputs, outputs = _scan_activities(equation, inputs)
            outputs[:count] = inputs[first : first + count]
        elif name_of(equation) in CALLS:
            inner = equation.params["jaxpr"].jaxpr
            outputs = list(map(_activities(inner, inputs), inner.outvars))
        for variable, activity in zip(equation.outvars, outputs, strict=True):
            may_be_active = variable in useful and has_tangent(variable)
            known[variable] = activity if may_be_active else min(activity, INACTIVE)
    return activity_of


def _useful(jaxpr: Jaxpr) -> set:
    """Return the variables that the outputs depend on, except through `stop_gradient`."""
    useful = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for equation in reversed(jaxpr.eqns):
        if name_of(equation) == "stop_gradient":
            useful -= set(equation.outvars)
        elif not useful.isdisjoint(equation.outvars):
            useful |= {v for v in equation.invars if not isinstance(v, Literal)}
    return useful


def _scan_activities(equation: JaxprEqn, activities: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the activities of a step's inputs and outputs.

    A carried value has the highest activity that it reaches in any step.
    """
    start, count = scan_counts(equation)
    body, activities = equation.params["jaxpr"].jaxpr, list(activities)
    while True:
        outputs = list(map(_activities(body, activities), body.outvars))
        highest = list(map(max, activities[start : start + count], outputs[:count]))
        if highest == activities[start : start + count]:
            return activities, outputs
        activities[start : start + count] = highest
