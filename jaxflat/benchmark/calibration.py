"""How often an error bar holds the truth: 95% intervals of many seeds, on problems of known answer.

Each seed is a whole estimate from NUM_SAMPLES samples. Sentences are fixed, or drawn anew for each
seed with replacement from a pool, which so is the population.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxflat import flatness, sharding
from jaxflat.benchmark.calibration_problems import Problem, PyTree, make_problems
from jaxflat.benchmark.calibration_table import Row, make_row
from jaxflat.benchmark.calibration_truth import Truth, dense_matrices, known_truths
from jaxflat.flatness.estimate import Estimate, Over
from jaxflat.flatness.terms import TraceTerms

OVERS: tuple[Over, ...] = ("probes", "probes+sentences")
STOPPED = ("hessian_trace", "gauss_newton_trace", "fisher_trace")
NUM_SAMPLES, MAX_ROUNDS = 64, 8
SIGMA = 0.1  # of average-case sharpness
SIDE_BY_SIDE = 50  # seeds in one step of a loop
Draw = Callable[[PyTree, jax.Array], TraceTerms]  # microbatches, key


def measure_calibration(num_seeds: int) -> Iterator[Row]:
    """Yield every row, as they get done; those of matfree where it is installed."""
    for problem in make_problems():
        for over in OVERS:
            matrices = dense_matrices(problem, problem.batches(over))
            truths = known_truths(problem, over, matrices, SIGMA)
            yield from fixed_size_rows(problem, over, truths, num_seeds)
            if over == "probes+sentences":
                yield from stopped_rows(problem, over, truths, num_seeds)
            elif has_matfree():
                yield from matfree_rows(problem, matrices, num_seeds)


def traces(problem: Problem, over: Over) -> dict[str, Draw]:
    """The functions that draw NUM_SAMPLES samples of each trace."""
    draws, per_pass = (NUM_SAMPLES, 16) if over == "probes" else (1, 1)
    probes: dict[str, Any] = {"num_probes": draws, "probes_per_pass": per_pass, "over": over}
    labels: dict[str, Any] = {"num_samples": draws, "samples_per_pass": per_pass, "over": over}
    of_loss, of_log_probs = (
        (problem.loss_fn, problem.params),
        (problem.log_probs_fn, problem.params),
    )
    return {
        "hessian_trace": partial(flatness.hessian_trace_samples, *of_loss, **probes),
        "hessian_trace_terms": partial(flatness.hessian_trace_terms, *of_loss, **probes),
        "gauss_newton_trace": partial(flatness.gauss_newton_trace_samples, *of_log_probs, **probes),
        "fisher_trace": partial(flatness.fisher_trace_terms, *of_log_probs, **labels),
    }


def fixed_size_rows(
    problem: Problem, over: Over, truths: dict[str, Truth], num_seeds: int
) -> Iterator[Row]:
    """Yield the rows of NUM_SAMPLES samples: each trace, its blocks, average-case sharpness."""

    def by_block(name: str, terms: TraceTerms) -> dict[str, Estimate]:
        blocks = terms.by_block(problem.block_of)
        parts = {f"{name}/{block}": part for block, part in blocks.items()}
        return {name: terms.total()} | (parts if len(parts) > 1 else {})

    def sharpness(batches: PyTree, key: jax.Array) -> dict[str, Estimate]:
        estimate = flatness.average_sharpness(
            problem.loss_fn,
            problem.params,
            batches,
            key,
            sigma=SIGMA,
            num_probes=NUM_SAMPLES if over == "probes" else 1,
            over=over,
        )
        return {"average_sharpness": estimate}

    def of_trace(name: str, draw: Draw, batches: PyTree, key: jax.Array) -> dict[str, Estimate]:
        terms = draw(batches, key)
        whole = name in ("hessian_trace", "gauss_newton_trace")
        return {name: terms.total()} if whole else by_block(name, terms)

    estimators = [partial(of_trace, name, draw) for name, draw in traces(problem, over).items()]
    for estimator in [*estimators, sharpness]:
        estimates = on_each_seed(problem, over, estimator)(seed_keys(num_seeds))
        for name, estimate in estimates.items():
            yield make_row(problem.name, name, over, truths[name], *spread(estimate))


def stopped_rows(
    problem: Problem, over: Over, truths: dict[str, Truth], num_seeds: int
) -> Iterator[Row]:
    """Yield the rows of `sample_until`, of 1 to MAX_ROUNDS rounds of NUM_SAMPLES samples.

    relative_error is the median half-width after one round, so that about half of the seeds stop
    there: the more of them the first look decides, the more it can bias.
    """
    draws = traces(problem, over)
    for name in STOPPED:
        run = on_each_seed(problem, over, partial(_total_terms, draws[name]))

        @cache
        def draw_round(i: int, run: Callable[..., TraceTerms] = run) -> TraceTerms:
            return run(seed_keys(num_seeds, 1 + i))

        first = draw_round(0)
        _, low_S, high_S, _ = spread(jax.vmap(TraceTerms.total)(first))
        relative_error = float(np.median((high_S - low_S) / np.abs(high_S + low_S)))
        found = []
        for seed in range(num_seeds):
            terms = flatness.sample_until(
                lambda i, seed=seed: jax.tree.map(lambda x: x[seed], draw_round(i)),
                relative_error,
                MAX_ROUNDS,
            )
            found.append(spread(terms.total()))
        columns = (np.asarray(column) for column in zip(*found, strict=True))
        yield make_row(problem.name, f"{name}, stopped", over, truths[name], *columns)


def _total_terms(draw: Draw, batches: PyTree, key: jax.Array) -> TraceTerms:
    """The samples of the whole trace, as one leaf."""
    terms = draw(batches, key)
    return TraceTerms(sum(jax.tree.leaves(terms.terms)), terms.weights_n, terms.over)


def matfree_rows(
    problem: Problem, matrices: dict[str, np.ndarray], num_seeds: int
) -> Iterator[Row]:
    """Yield the rows of matfree: mean +- 1.96 of the standard errors that it gives."""
    from jaxflat.benchmark.matfree_peer import ESTIMATORS

    for trace, matrix in matrices.items():
        for name, make in ESTIMATORS.items():
            with jax.enable_x64(True):
                estimator, num_vectors = make(matrix, NUM_SAMPLES)
                # On one device: factorizations on several at once may wait for each other.
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


def on_each_seed(
    problem: Problem, over: Over, estimator: Callable[[PyTree, jax.Array], Any]
) -> Callable[[jax.Array], Any]:
    """Return a call of estimator(microbatches, key) for each key."""

    def one_seed(key: jax.Array) -> Any:
        data_key, key = jax.random.split(key)
        batches = problem.batches(over)
        if over == "probes+sentences":
            size = jax.tree.leaves(batches)[0].shape[0]
            chosen = jax.random.randint(data_key, (NUM_SAMPLES,), 0, size)
            batches = jax.tree.map(lambda x: x[chosen], batches)
        return estimator(batches, key)

    return over_seeds(one_seed)


def over_seeds(one_seed: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Return a call of one_seed(key) for each key, every device its part; NumPy arrays."""

    def part(keys: jax.Array) -> Any:
        return jax.lax.map(one_seed, keys, batch_size=min(SIDE_BY_SIDE, len(keys)))

    def run(keys_S: jax.Array) -> Any:
        fair = (n for n in range(1, jax.device_count() + 1) if len(keys_S) % n == 0)
        mesh = sharding.make_mesh(max(fair))
        return jax.device_get(compiled(mesh)(keys_S))

    @cache
    def compiled(mesh: jax.sharding.Mesh) -> Any:
        specs = {"in_specs": P("data"), "out_specs": P("data")}
        return jax.jit(jax.shard_map(part, mesh=mesh, check_vma=False, **specs))

    return run


def seed_keys(num_seeds: int, stream: int = 0) -> jax.Array:
    """A key for each seed."""
    return jax.random.split(jax.random.key(stream), num_seeds)


def spread(estimate: Estimate) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Mean, both ends of the interval, and the number of samples."""
    low, high = estimate.interval()
    return np.asarray(estimate.mean), np.asarray(low), np.asarray(high), estimate.num_samples
