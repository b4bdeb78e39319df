"""The arrays that a function makes, without running it."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def traced_arrays(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Yield the shape and dtype of each array that a function of these arguments makes."""
    yield from _made_by(jax.make_jaxpr(function)(*arguments).jaxpr)


def _made_by(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _made_by(inner)
