"""How often a 95% interval contains the truth: many seeds on problems with known answers.

Each seed is one estimate from NUM_SAMPLES samples. Sentences are fixed, or each seed draws its own
with replacement from a pool, which is then the population.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from jaxflat import flatness
from jaxflat.benchmark.calibration_problems import (
    HEAD_SIZE,
    CalibrationProblem,
    PyTree,
    make_causal_problems,
    make_problems,
)
from jaxflat.benchmark.calibration_seeds import NUM_SAMPLES, on_each_seed, seed_keys, spread
from jaxflat.benchmark.calibration_table import CoverageRow, make_row
from jaxflat.benchmark.calibration_truth import (
    Truth,
    dense_matrices,
    excess_truth,
    invariant_truth,
    known_truths,
    trace_truths,
)
from jaxflat.flatness.estimate import Estimate, Over, ratio_estimate
from jaxflat.flatness.terms import TraceTerms
from jaxflat.runs.measure_flatness import flattest_rescalings, rescale_by_half

OVERS: tuple[Over, ...] = ("probes", "probes+sentences")
STOPPED = ("hessian_trace", "gauss_newton_trace", "fisher_trace")
MAX_ROUNDS = 8
HALF_STOP_AFTER = (2, 4)  # rounds
SIGMA = 0.1  # for average-case sharpness
NUM_GRADIENTS = 4  # of a microbatch, for the scales of invariant traces; the default of runs
Draw = Callable[[PyTree, jax.Array], TraceTerms]  # (microbatches, key) -> samples
Estimator = Callable[[PyTree, jax.Array], dict[str, Estimate]]


def measure_calibration(num_seeds: int) -> Iterator[CoverageRow]:
    """Yield every row as it finishes, with rows for matfree if it is installed."""
    for problem in make_problems():
        for over in OVERS:
            matrices = dense_matrices(problem, problem.batches(over))
            truths = known_truths(problem, over, matrices, SIGMA)
            for estimator in estimators(problem, over).values():
                yield from rows_of(problem, over, estimator, truths, num_seeds)
            if over == "probes+sentences":
                for name in STOPPED:
                    yield from stopped_rows(problem, over, name, truths, num_seeds)
            elif has_matfree():
                yield from matfree_rows(problem, matrices, num_seeds)
        yield from excess_rows(problem, num_seeds)
    for problem in make_causal_problems():
        yield from causal_rows(problem, num_seeds)


def causal_rows(problem: CalibrationProblem, num_seeds: int) -> Iterator[CoverageRow]:
    """Yield the rows of a causal model: what a run measures, with errors over sentences."""
    over: Over = "probes+sentences"
    matrices = dense_matrices(problem, problem.batches(over))
    truths = trace_truths(problem, matrices)
    for name in ("hessian_trace", "fisher_trace"):
        yield from rows_of(problem, over, estimators(problem, over)[name], truths, num_seeds)
    yield from invariant_rows(problem, matrices, num_seeds)
    yield from excess_rows(problem, num_seeds)


def traces(problem: CalibrationProblem, over: Over) -> dict[str, Draw]:
    """Return, for each trace, a function that draws NUM_SAMPLES samples."""
    draws, per_pass = (NUM_SAMPLES, 16) if over == "probes" else (1, 1)
    probes: dict[str, Any] = {"num_probes": draws, "probes_per_pass": per_pass, "over": over}
    labels: dict[str, Any] = {"num_samples": draws, "samples_per_pass": per_pass, "over": over}
    of_loss = problem.loss_fn, problem.params
    of_log_probs = problem.log_probs_fn, problem.params
    return {
        "hessian_trace": partial(flatness.hessian_trace_samples, *of_loss, **probes),
        "hessian_trace_terms": partial(flatness.hessian_trace_terms, *of_loss, **probes),
        "gauss_newton_trace": partial(flatness.gauss_newton_trace_samples, *of_log_probs, **probes),
        "fisher_trace": partial(flatness.fisher_trace_terms, *of_log_probs, **labels),
    }


def estimators(problem: CalibrationProblem, over: Over) -> dict[str, Estimator]:
    """Return estimators with NUM_SAMPLES samples: traces, their blocks, average-case sharpness."""

    def of_trace(name: str, draw: Draw, batches: PyTree, key: jax.Array) -> dict[str, Estimate]:
        terms, blocks = draw(batches, key), {}
        if name in ("hessian_trace_terms", "fisher_trace"):
            blocks = terms.by_block(problem.block_of)
        parts = {f"{name}/{block}": part for block, part in blocks.items()}
        return {name: terms.total()} | (parts if len(parts) > 1 else {})

    def sharpness(batches: PyTree, key: jax.Array) -> dict[str, Estimate]:
        draws = NUM_SAMPLES if over == "probes" else 1
        how: dict[str, Any] = {"sigma": SIGMA, "num_probes": draws, "over": over}
        args = problem.loss_fn, problem.params, batches, key
        return {"average_sharpness": flatness.average_sharpness(*args, **how)}

    of_traces = {name: partial(of_trace, name, d) for name, d in traces(problem, over).items()}
    return of_traces | {"average_sharpness": sharpness}


def rows_of(
    problem: CalibrationProblem,
    over: Over,
    estimator: Estimator,
    truths: dict[str, Truth],
    num_seeds: int,
) -> Iterator[CoverageRow]:
    """Yield a row for each number that the estimator returns."""
    estimates = on_each_seed(problem, over, estimator)(seed_keys(num_seeds))
    for name, estimate in estimates.items():
        yield make_row(problem.name, name, over, truths[name], *spread(estimate))


def stopped_rows(
    problem: CalibrationProblem, over: Over, name: str, truths: dict[str, Truth], num_seeds: int
) -> Iterator[CoverageRow]:
    """Yield the rows of a trace with `sample_until`, for each of HALF_STOP_AFTER."""
    run = on_each_seed(problem, over, partial(_total_terms, traces(problem, over)[name]))
    round_of_all = cache(lambda i: run(seed_keys(num_seeds, 1 + i)))
    for num_rounds in HALF_STOP_AFTER:
        columns = stopped(round_of_all, num_seeds, num_rounds)
        title = f"{name}, half stop by {num_rounds * NUM_SAMPLES}"
        yield make_row(problem.name, title, over, truths[name], *columns)


def stopped(
    round_of_all: Callable[[int], TraceTerms], num_seeds: int, num_rounds: int
) -> Iterator[np.ndarray]:
    """Return the mean, both ends of the interval and the number of samples at each seed's stop.

    `round_of_all(i)` returns round i of all seeds. relative_error is the median half-width after
    one round, over sqrt(num_rounds), so about half of the seeds stop after num_rounds. The more
    seeds one look separates, the more it can bias, so this is near the worst setting.
    """
    _, low_S, high_S, _ = spread(jax.vmap(TraceTerms.total)(round_of_all(0)))
    median = float(np.median((high_S - low_S) / np.abs(high_S + low_S)))

    def of_seed(seed: int) -> tuple[Any, ...]:
        def draw(i: int) -> TraceTerms:
            return jax.tree.map(lambda x: x[seed], round_of_all(i))

        terms = flatness.sample_until(draw, median / num_rounds**0.5, MAX_ROUNDS)
        return spread(terms.total())

    return map(np.asarray, zip(*map(of_seed, range(num_seeds)), strict=True))


def excess_rows(problem: CalibrationProblem, num_seeds: int) -> Iterator[CoverageRow]:
    """Yield the row of the excess loss over NUM_SAMPLES sentences, as a run measures it."""

    def excess_loss(sentences: PyTree, key: jax.Array) -> dict[str, Estimate]:
        del key
        sums_n, weights_n = jax.vmap(partial(problem.excess_loss_fn, problem.params))(sentences)
        return {"excess_loss": ratio_estimate(sums_n, weights_n, over="sentences")}

    truths = {"excess_loss": excess_truth(problem)}
    yield from rows_of(problem, "sentences", excess_loss, truths, num_seeds)


def invariant_rows(
    problem: CalibrationProblem, matrices: dict[str, np.ndarray], num_seeds: int
) -> Iterator[CoverageRow]:
    """Yield the row of a model's Hessian trace that no rescaling changes."""
    name = "hessian_trace@invariant"

    def trace(batches: PyTree, key: jax.Array) -> dict[str, Estimate]:
        moment_key, key = jax.random.split(key)
        functions = problem.loss_fn, problem.log_probs_fn
        whole = flatness.Problem(*functions, problem.params, lambda _: batches, key, None)
        flattest_2 = flattest_rescalings(whole, moment_key, HEAD_SIZE, NUM_GRADIENTS)
        rescale = jax.tree_util.Partial(rescale_by_half, flattest_2)
        of_loss = problem.loss_fn, problem.params, batches, key
        return {name: flatness.hessian_trace(*of_loss, num_probes=1, rescale=rescale)}

    truths = {name: invariant_truth(problem, matrices)}
    yield from rows_of(problem, "probes+sentences", trace, truths, num_seeds)


def _total_terms(draw: Draw, batches: PyTree, key: jax.Array) -> TraceTerms:
    """Return the samples of the whole trace, as one leaf."""
    terms = draw(batches, key)
    return TraceTerms(sum(jax.tree.leaves(terms.terms)), terms.weights_n, terms.over)


def matfree_rows(
    problem: CalibrationProblem, matrices: dict[str, np.ndarray], num_seeds: int
) -> Iterator[CoverageRow]:
    """Yield the rows of matfree: mean +- 1.96 standard errors, as it reports them."""
    from jaxflat.benchmark.matfree_peer import ESTIMATORS

    for trace, matrix in matrices.items():
        for name, make in ESTIMATORS.items():
            with jax.enable_x64(True):
                estimator, num_vectors = make(matrix, NUM_SAMPLES)
                # On one device: concurrent factorizations on several devices may block each other.
                one_by_one = jax.jit(partial(jax.lax.map, estimator))
                mean_S, sem_S = jax.device_get(one_by_one(seed_keys(num_seeds)))
            low_S, high_S = mean_S - 1.96 * sem_S, mean_S + 1.96 * sem_S
            truth = Truth.of_matrix(matrix)
            title = f"matfree {name}, {trace}"
            yield make_row(problem.name, title, "probes", truth, mean_S, low_S, high_S, num_vectors)


def has_matfree() -> bool:
    """Say whether matfree can be imported."""
    try:
        import matfree
    except ImportError:
        return False
    return bool(matfree)
