"""Traces of a problem, in as many rounds of microbatches as the settings' precision takes.

Settings: num_probes in each microbatch, probes_per_pass, relative_error (0: one round), max_rounds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxflat.flatness.problem import Measured, Problem
from jaxflat.flatness.stopping import sample_until
from jaxflat.flatness.terms import TraceTerms
from jaxflat.flatness.trace import (
    fisher_trace_terms,
    gauss_newton_trace_samples,
    hessian_trace_samples,
    hessian_trace_terms,
)


def hessian_trace_measure(problem: Problem, settings: Any) -> Measured:
    """tr H and its groups."""
    return trace_estimates("hessian_trace", hessian_terms(problem, settings), problem)


def gauss_newton_trace_measure(problem: Problem, settings: Any) -> Measured:
    """tr G; its groups are those of tr F."""
    return Measured({"gauss_newton_trace": gauss_newton_terms(problem, settings).total()})


def fisher_trace_measure(problem: Problem, settings: Any) -> Measured:
    """tr F and its groups."""
    return trace_estimates("fisher_trace", fisher_terms(problem, settings), problem)


def hessian_terms(problem: Problem, settings: Any) -> TraceTerms:
    """Samples of tr H; by leaf, which costs more, only where there are groupings."""
    how = {"num_probes": settings.num_probes, "probes_per_pass": side_by_side(settings)}
    if problem.groupings:
        draw = partial(hessian_trace_terms, problem.loss_fn, stacked=problem.stacked, **how)
    else:
        draw = partial(hessian_trace_samples, problem.loss_fn, **how)
    return _rounds(draw, problem, settings)


def gauss_newton_terms(problem: Problem, settings: Any) -> TraceTerms:
    """Samples of tr G."""
    how = {"num_probes": settings.num_probes, "probes_per_pass": side_by_side(settings)}
    draw = partial(gauss_newton_trace_samples, problem.log_probs_fn, **how)
    return _rounds(draw, problem, settings)


def fisher_terms(problem: Problem, settings: Any) -> TraceTerms:
    """Samples of tr F, by leaf."""
    how = {"num_samples": settings.num_probes, "samples_per_pass": side_by_side(settings)}
    draw = partial(fisher_trace_terms, problem.log_probs_fn, stacked=problem.stacked, **how)
    return _rounds(draw, problem, settings)


def side_by_side(settings: Any) -> int:
    """How many probes run at once: no more than there are."""
    return min(settings.probes_per_pass, settings.num_probes)


def _rounds(draw: Callable[..., TraceTerms], problem: Problem, settings: Any) -> TraceTerms:
    def draw_round(i: int) -> TraceTerms:
        key = jax.random.fold_in(problem.key, i)
        return problem.keep_round(i, lambda: draw(problem.params, problem.sample(i), key))

    rounds = settings.max_rounds if settings.relative_error > 0 else 1
    return sample_until(draw_round, settings.relative_error, rounds)


def trace_estimates(name: str, terms: TraceTerms, problem: Problem) -> Measured:
    """The trace, and "name/group" for each group where the terms are by leaf."""
    estimates = {name: terms.total()}
    for grouping in problem.groupings:
        groups = terms.by_block(grouping)
        estimates |= {f"{name}/{group}": estimate for group, estimate in groups.items()}
    return Measured(estimates)
