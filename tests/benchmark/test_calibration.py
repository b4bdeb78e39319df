"""The calibration study: its truths against closed forms, and its coverage."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxflat.benchmark import calibration
from jaxflat.benchmark.calibration_problems import (
    HEAD_SIZE,
    causal_model,
    logistic_regression,
    lookup_tables,
    transformer,
)
from jaxflat.benchmark.calibration_table import make_row
from jaxflat.benchmark.calibration_truth import (
    Truth,
    dense_matrices,
    excess_truth,
    invariant_truth,
    known_truths,
    sharpness_reference,
)
from jaxflat.models import rescaling
from jaxflat.models.causal import BLOCKS
from tests.support.counts import FULL, in_full
from tests.support.optimized import optimized

NUM_SEEDS = 2000


def test_a_row_counts_intervals_that_contain_the_truth():
    mean_S = np.asarray([1.0, 2.0, 3.0, 8.0])
    row = make_row("p", "e", "probes", Truth(2.0, 7.0), mean_S, mean_S - 1, mean_S + 1, 64)
    assert row.coverage.median == 75
    ends = stats.beta.ppf(0.025, 3, 2), stats.beta.ppf(0.975, 4, 1)  # Clopper and Pearson
    np.testing.assert_allclose((row.coverage.min, row.coverage.max), 100 * np.asarray(ends))
    np.testing.assert_allclose(row.bias.median, 1.5 / np.std(mean_S, ddof=1))
    assert (row.half_width.median, row.half_width.min, row.half_width.max) == (50, 50, 50)
    empty = make_row("p", "e", "probes", Truth(2.0, 7.0), mean_S, mean_S * np.nan, mean_S, 64)
    assert empty.coverage.median == 0


@pytest.mark.slow
def test_truths_of_logistic_regression_match_the_formula():
    """G = E x x' / cosh(l)^2 for logits l and -l; H has the sums of targets, in float32 near 1."""
    problem = logistic_regression(num_features=6, size=3)
    matrices = dense_matrices(problem, problem.pool)
    features_NxF = np.asarray(problem.pool["features"], np.float64).reshape(-1, 6)
    logits_N = features_NxF @ np.asarray(problem.params["weights"], np.float64)
    sums_N = np.asarray(problem.pool["targets"], np.float64).sum(axis=-1).reshape(-1)
    for name, factors_N in {"G": np.ones_like(sums_N), "H": sums_N}.items():
        shares_N = factors_N / np.cosh(logits_N) ** 2 / len(logits_N)
        expected = (shares_N[:, None] * features_NxF).T @ features_NxF
        np.testing.assert_allclose(matrices[name], expected, rtol=1e-10, atol=1e-14)
    truths = known_truths(problem, "probes+sentences", matrices, 0.01)
    eigenvalues = np.linalg.eigvalsh(expected)
    rank = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    np.testing.assert_allclose(truths["hessian_trace"].rank, rank, rtol=1e-8)
    half_trace = 0.01**2 / 2 * eigenvalues.sum()
    np.testing.assert_allclose(truths["average_sharpness"].value, half_trace, rtol=1e-3)


def test_the_true_excess_loss_is_the_mean_divergence_of_the_targets():
    problem = logistic_regression(num_features=6, size=3)
    features_NxF = np.asarray(problem.pool["features"], np.float64).reshape(-1, 6)
    logits_N = features_NxF @ np.asarray(problem.params["weights"], np.float64)
    targets_Nx2 = np.asarray(problem.pool["targets"], np.float64).reshape(-1, 2)
    model_Nx2 = np.stack([logits_N, -logits_N], axis=1)
    model_Nx2 -= np.log(2 * np.cosh(logits_N))[:, None]
    expected = (targets_Nx2 * (np.log(targets_Nx2) - model_Nx2)).sum(axis=1).mean()
    np.testing.assert_allclose(excess_truth(problem).value, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_the_true_invariant_trace_is_the_least_of_all_rescalings(block):
    """Of any matrix G, here a random one of rank 3, in place of both G and H."""
    problem = causal_model(block)
    size = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    factors_3xP = np.random.default_rng(0).normal(size=(3, size))
    matrix = factors_3xP.T @ factors_3xP
    least = invariant_truth(problem, {"G": matrix, "H": matrix}).value
    _, unravel = jax.flatten_util.ravel_pytree(problem.params)
    gradients = jax.vmap(unravel)(jnp.asarray(factors_3xP, jnp.float32))
    scale = jnp.sqrt(jnp.mean(problem.params["token_embedding"] ** 2))  # of an untied decoder
    for seed in range(6):
        key, largest = jax.random.key(seed), 1 + 0.2 * seed  # 1: the identity
        other = rescaling.random_rescaling(problem.params, key, HEAD_SIZE, largest)
        rescale = partial(rescaling.rescale, {**other, "stream": scale})
        transposed = jax.linear_transpose(rescale, problem.params)
        (pulled,) = jax.vmap(transposed)(gradients)
        assert sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(pulled)) > 1.01 * least


def test_a_seed_stops_once_it_is_precise():
    """The median of two half-widths is their mean: eight rounds are enough for the wider one."""
    noise_SxN = np.random.default_rng(0).normal(size=(2, 64)) * np.asarray([[0.1], [10.0]])

    def draw_round(i):
        return calibration.TraceTerms(1 + jnp.asarray(noise_SxN), jnp.ones((2, 64)), "probes")

    mean_S, low_S, high_S, num_samples_S = calibration.stopped(draw_round, 2, 2)
    assert num_samples_S.tolist() == [128, 512]
    np.testing.assert_allclose(mean_S, 1 + noise_SxN.mean(axis=1), rtol=1e-5)
    assert ((low_S < mean_S) & (mean_S < high_S)).all()


@cache
def problem_and_truths(make, over):
    problem = make()
    matrices = dense_matrices(problem, problem.batches(over))
    return problem, matrices, known_truths(problem, over, matrices, calibration.SIGMA)


NAMES = (
    *("hessian_trace", "hessian_trace_terms"),
    *("gauss_newton_trace", "fisher_trace", "average_sharpness"),
)
# Every estimator, and both populations. The transformer takes minutes to compile; the command
# measures all of it.
CASES = [
    (lookup_tables, "hessian_trace", "probes"),
    (lookup_tables, "hessian_trace_terms", "probes+sentences"),
    (lookup_tables, "gauss_newton_trace", "probes+sentences"),
    (lookup_tables, "fisher_trace", "probes+sentences"),
    (lookup_tables, "average_sharpness", "probes"),
]
REST = [case for case in product([lookup_tables], NAMES, calibration.OVERS) if case not in CASES]
REST += [
    (transformer, "hessian_trace", "probes+sentences"),
    (transformer, "fisher_trace", "probes"),
]


@pytest.mark.slow
@optimized()
@pytest.mark.parametrize(("make", "name", "over"), [*CASES, *in_full(*REST)])
def test_intervals_have_their_nominal_coverage(make, name, over):
    problem, matrices, truths = problem_and_truths(make, over)
    assert truths["hessian_trace"].rank > 10
    assert truths["gauss_newton_trace"].rank > 10
    estimator = calibration.estimators(problem, over)[name]
    for row in calibration.rows_of(problem, over, estimator, truths, NUM_SEEDS):
        if row.rank >= 10:
            assert 93 <= row.coverage.median <= 97, row.line()
    if name == "average_sharpness":
        reference, sem = sharpness_reference(
            problem, problem.batches(over), matrices["H"], calibration.SIGMA
        )
        half_width = row.half_width.median / 100 * reference
        assert sem < 0.02 * half_width


@pytest.mark.slow
@optimized()
@pytest.mark.parametrize("block", BLOCKS)
def test_errors_of_causal_models_are_over_sentences(block):
    """Predictions of a sentence depend on each other. The traces take minutes to compile.

    Divergences are skewed: of 64 sentences, intervals of the excess loss cover 92 to 95%.
    """
    problem = causal_model(block)
    measure = calibration.causal_rows if FULL else calibration.excess_rows
    for row in measure(problem, NUM_SEEDS):
        least = 92 if row.estimator == "excess_loss" else 93
        assert least <= row.coverage.median <= 97, row.line()


@pytest.mark.slow
@optimized()
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lookup_tables, "hessian_trace"),
        *in_full(
            (lookup_tables, "gauss_newton_trace"),
            (lookup_tables, "fisher_trace"),
            (transformer, "gauss_newton_trace"),
        ),
    ],
)
def test_stopping_costs_little_coverage(make, name):
    over = "probes+sentences"
    problem, _, truths = problem_and_truths(make, over)
    rows = calibration.stopped_rows(problem, over, name, truths, NUM_SEEDS)
    for row, num_samples in zip(rows, (128, 256), strict=True):
        assert 1.2 * num_samples < row.num_samples < 2 * num_samples
        assert row.coverage.median >= 93, row.line()
