"""A walk through the program of a function (a jaxpr), from equation to equation."""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxflat.flatness.equations import (
    CALLS,
    FIXED,
    STEPPED,
    has_tangent,
    kind_of,
    name_of,
    parts_of_scan,
)

PyTree = Any


class Visitor(NamedTuple):
    """What a walk does: with nodes, with equations that are linear or whose outputs do not move,
    and with values whose level is raised."""

    node: Callable[[JaxprEqn, list, list[int], PyTree], tuple[list, PyTree]]
    linear: Callable[[JaxprEqn, list, list[int]], list]
    still: Callable[[JaxprEqn, list, list[int]], list]
    raised: Callable[[Any, int, int, Any], Any]


def walk(
    visitor: Visitor, program: ClosedJaxpr, inputs: Sequence, levels: Sequence[int], slots: Any
) -> tuple[list, list]:
    """Outputs, and what `visitor.node` returned for each node.

    `slots` holds what each node gets, in the order of the walk; in a scan all steps' together.
    """
    jaxpr, level_of = program.jaxpr, _levels(program.jaxpr, levels)
    known = dict(zip(jaxpr.constvars, program.consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else known[variable]

    slots = repeat(None) if slots is None else iter(slots)
    results = []
    for equation in jaxpr.eqns:
        args = list(map(read, equation.invars)), list(map(level_of, equation.invars))
        kind = kind_of(equation, args[1], list(map(level_of, equation.outvars)))
        if kind in ("linear", "still"):
            outputs = getattr(visitor, kind)(equation, *args)
        else:
            if kind == "call":
                done = walk(visitor, equation.params["jaxpr"], *args, next(slots))
            elif kind == "scan":
                done = _walk_scan(visitor, equation, *args, next(slots))
            else:
                done = visitor.node(equation, *args, next(slots))
            outputs, result = done
            results.append(result)
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars)), results


def _walk_scan(
    visitor: Visitor, equation: JaxprEqn, values: list, levels: list[int], slots: PyTree
) -> tuple[list, PyTree]:
    how, (inside, outside) = equation.params, _levels_in_scan(equation, levels)
    start, count = parts_of_scan(equation)
    stop = start + count
    carry_levels, avals = inside[start:stop], how["jaxpr"].in_avals[start:stop]
    after = outside[:count]

    def step(carry: PyTree, given: PyTree) -> tuple[PyTree, PyTree]:
        sliced, slot = given
        inputs = [*values[:start], *carry, *sliced]
        outputs, results = walk(visitor, how["jaxpr"], inputs, inside, slot)
        carried = list(map(visitor.raised, outputs[:count], after, carry_levels, avals))
        return carried, (outputs[count:], results)

    first = list(map(visitor.raised, values[start:stop], levels[start:stop], carry_levels, avals))
    carried, (stacked, results) = jax.lax.scan(
        step,
        first,
        (values[stop:], slots),
        length=how["length"],
        reverse=how["reverse"],
        unroll=how["unroll"],
    )
    return [*carried, *stacked], results


def _levels(jaxpr: Jaxpr, levels: Sequence[int]) -> Callable[[Any], int]:
    """The level of every variable, given those of the inputs."""
    found, wanted = dict(zip(jaxpr.invars, levels, strict=True)), _wanted(jaxpr)

    def level_of(variable: Any) -> int:
        return FIXED if isinstance(variable, Literal) else found.get(variable, FIXED)

    for equation in jaxpr.eqns:
        inputs = list(map(level_of, equation.invars))
        outputs = [max(inputs, default=FIXED)] * len(equation.outvars)
        if name_of(equation) == "scan":
            first, count = parts_of_scan(equation)
            inputs, outputs = _levels_in_scan(equation, inputs)
            outputs[:count] = inputs[first : first + count]
        elif name_of(equation) in CALLS:
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
        if name_of(equation) == "stop_gradient":
            wanted -= set(equation.outvars)
        elif not wanted.isdisjoint(equation.outvars):
            wanted |= {v for v in equation.invars if not isinstance(v, Literal)}
    return wanted


def _levels_in_scan(equation: JaxprEqn, levels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those of a step's inputs and outputs, what it carries being of the highest it ever has."""
    start, count = parts_of_scan(equation)
    body, levels = equation.params["jaxpr"].jaxpr, list(levels)
    while True:
        outputs = list(map(_levels(body, levels), body.outvars))
        raised = list(map(max, levels[start : start + count], outputs[:count]))
        if raised == levels[start : start + count]:
            return levels, outputs
        levels[start : start + count] = raised
