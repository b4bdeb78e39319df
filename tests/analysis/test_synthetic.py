"""Made-up results have the planted effects and noise, and are read like results.csv."""

from dataclasses import replace

import numpy as np
import pytest

from jaxflat.analysis import results_csv
from jaxflat.analysis.plan import UNDECLARED
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY
from jaxflat.analysis.synthetic import Noise, PlantedTruth, SyntheticArm, draw_sweep

NUM_SEEDS = 2000
QUIET = PlantedTruth(accuracy=Noise(), log_trace=Noise(), log_excess=Noise())
SEEDS = [str(s) for s in range(NUM_SEEDS)]
TRACE = "hessian_trace@embedded_invariant"


def arms_of(*params, seeds=("0",), **effects):
    arm = SyntheticArm({}, seeds, (10, 20), (0.006, 0.003), **effects)
    return [replace(arm, swept={"model.width": str(n)}, num_params=n) for n in params]


def values_of(arms, truth, column, seed=0):
    """Return the values of a column, arms x seeds x checkpoints."""
    rows = draw_sweep(arms, truth, np.random.default_rng(seed)).rows
    results_csv.add_task_means(rows, UNDECLARED)
    found = np.array([row.values[column] for row in rows])
    return found.reshape(len(arms), len(arms[0].seeds), len(arms[0].steps))


def test_effects_without_noise_are_those_of_the_equations():
    truth = replace(QUIET, slope=1.0, size_accuracy=0.5, size_log_trace=0.1, excess_log_trace=0.2)
    truth = replace(truth, excess_accuracy=-2.0, dose_log_trace=-0.3)
    arms = [replace(arm, dose=2.0, accuracy=0.7, log_trace=0.4) for arm in arms_of(100.0, 400.0)]
    log_trace_AxK = np.log(values_of(arms, truth, TRACE)[:, 0] / 100)
    planted_A = 0.4 - 0.3 * 2 + 0.1 * np.array([0, 2])
    expected_AxK = planted_A[:, None] + 0.2 * np.array([[np.log(2), 0.0]])
    np.testing.assert_allclose(log_trace_AxK, expected_AxK, atol=1e-12)
    accuracy_AxK = 100 * values_of(arms, truth, PRIMARY_ACCURACY)[:, 0]
    expected_AxK = 90.7 + 0.5 * np.array([[0], [2]]) - 2.0 * np.array([[np.log(2), 0.0]])
    np.testing.assert_allclose(accuracy_AxK, expected_AxK - log_trace_AxK / np.log(2), atol=1e-9)
    sweep = draw_sweep(arms, truth, np.random.default_rng(0))
    np.testing.assert_allclose(90 + sweep.accuracy_A, accuracy_AxK[:, 1], atol=1e-9)
    np.testing.assert_allclose(sweep.log_trace_A, log_trace_AxK[:, 1], atol=1e-12)


@pytest.mark.parametrize(
    ("noise", "column"), [("accuracy", PRIMARY_ACCURACY), ("log_trace", TRACE)]
)
def test_noise_has_its_parts(noise, column):
    """Variances of measurement, run and seed, each within about 5 standard errors."""
    truth = replace(QUIET, **{noise: Noise(seed=0.5, run=0.3, measurement=0.2)})
    values_AxSxK = values_of(arms_of(1.0, 2.0, seeds=SEEDS), truth, column)
    values_AxSxK = 100 * values_AxSxK if noise == "accuracy" else np.log(values_AxSxK)
    measurement = np.var(values_AxSxK[..., 0] - values_AxSxK[..., 1]) / 2
    means_AxS = values_AxSxK.mean(-1)
    run = np.var(means_AxS[0] - means_AxS[1]) / 2 - measurement / 2
    covariance = np.cov(means_AxS)[0, 1]
    np.testing.assert_allclose(measurement, 0.2**2, rtol=0.16)
    np.testing.assert_allclose(run, 0.3**2, rtol=0.2)
    np.testing.assert_allclose(covariance, 0.5**2, rtol=0.2)


def test_settings_differ_by_one_draw_each():
    truth = replace(QUIET, accuracy=Noise(setting=2.0))
    arms = arms_of(*np.arange(1.0, 3001.0))
    values_AxK = 100 * values_of(arms, truth, PRIMARY_ACCURACY)[:, 0]
    assert np.array_equal(values_AxK[:, 0], values_AxK[:, 1])
    np.testing.assert_allclose(values_AxK.std(), 2.0, rtol=5 / (2 * 3000) ** 0.5)


def test_crossed_seeds_share_the_draws_of_their_parts():
    """accuracy = a_data + b_init exactly: no combination has its own error."""
    crossed = [f"0/{data}/{init}" for data in range(60) for init in range(60)]
    truth = replace(QUIET, accuracy=Noise(run=1.0))
    values_DxI = 100 * values_of(arms_of(1.0, seeds=crossed), truth, PRIMARY_ACCURACY)[0, :, 0]
    values_DxI = values_DxI.reshape(60, 60)
    rows_Dx1, columns_1xI = values_DxI.mean(1, keepdims=True), values_DxI.mean(0, keepdims=True)
    np.testing.assert_allclose(values_DxI, rows_Dx1 + columns_1xI - values_DxI.mean(), atol=1e-9)
    np.testing.assert_allclose(values_DxI.std(), 1.0, rtol=0.35)


def test_a_fifth_of_the_runs_are_outliers():
    truth = replace(QUIET, outlier_probability=0.2, outlier=-2.0)
    values_SxK = 100 * values_of(arms_of(1.0, seeds=SEEDS), truth, PRIMARY_ACCURACY)[0]
    assert np.array_equal(values_SxK[:, 0], values_SxK[:, 1])
    assert set(np.round(values_SxK[:, 0] - values_SxK.max(), 6)) == {0.0, -2.0}
    share = np.mean(values_SxK[:, 0] < values_SxK.max() - 1)
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / NUM_SEEDS) ** 0.5


def test_rescaling_changes_all_traces_but_the_invariant_ones():
    plain, rescaled = (
        draw_sweep(arms_of(1.0, rescaling=factor), PlantedTruth(), np.random.default_rng(0))
        .rows[0]
        .values
        for factor in (0.0, 0.4)
    )
    changed = {name for name in plain if plain[name] != rescaled[name]}
    assert {"hessian_trace", "hessian_trace@embedded"} < changed
    assert not any("invariant" in name for name in changed)
    np.testing.assert_allclose(rescaled["hessian_trace"] / plain["hessian_trace"], np.exp(0.4))


def test_the_same_generator_gives_the_same_rows():
    arms = arms_of(100.0, 400.0, seeds=["0", "1"])
    first, second, other = (
        draw_sweep(arms, PlantedTruth(), np.random.default_rng(seed)).rows for seed in (0, 0, 1)
    )
    assert first == second != other


def test_the_last_checkpoint_of_each_kind_is_last():
    arm = SyntheticArm({}, ["0"], (5, 9, 9), (0.003,) * 3, projected=(False, False, True))
    rows = draw_sweep([arm], PlantedTruth(), np.random.default_rng(0)).rows
    kinds = [(row.step, row.projected, row.last) for row in rows]
    assert kinds == [(5, False, False), (9, False, True), (9, True, True)]
