"""What a measure is given and what it gives."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from jaxflat.flatness.estimate import Estimate
from jaxflat.flatness.products import LogProbsFn, LossFn, PyTree
from jaxflat.flatness.terms import TraceTerms


class Problem(NamedTuple):
    """What is measured, and on what.

    sample(i) gives round i's microbatches, independent of other rounds' and of one shape; measures
    other than traces use round 0. num_examples: how many predictions the parameters were fitted to.
    Traces also come in groups of parameters: each of `groupings` names the group of a path.
    `stacked` marks leaves whose axis 0 is a stack of layers. `toward` has the parameters that
    loss_path leads to. keep_round(i, draw) gives a trace's terms of round i: drawn, or from before.
    """

    loss_fn: LossFn
    log_probs_fn: LogProbsFn
    params: PyTree
    sample: Callable[[int], PyTree]
    key: jax.Array
    num_examples: int
    groupings: Sequence[Callable[[str], str]] = ()
    stacked: Callable[[str], bool] | None = None
    toward: PyTree | None = None
    keep_round: Callable[[int, Callable[[], TraceTerms]], TraceTerms] = lambda i, draw: draw()


class Measured(NamedTuple):
    """Named estimates, and the arrays behind them that are worth a picture."""

    estimates: dict[str, Estimate]
    curves: dict[str, jax.Array] = {}  # noqa: RUF012
