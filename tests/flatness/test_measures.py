"""Measures by name: their functions, groups that add up, and sampling until precise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxflat import flatness
from jaxflat.config import MEASURES, base
from jaxflat.flatness import Estimate, Problem, TraceTerms, measures
from tests.support import softmax_table as table

KEY = jax.random.key(3)
CHANGES = {
    "num_probes": 3,
    "probes_per_pass": 8,  # more than there are
    "eigenvalues.num_largest": 2,
    "eigenvalues.num_steps": 12,
    "density.num_probes": 2,
    "density.num_steps": 5,
    "sharpness.ascent_steps": 2,
    "learning_coefficient.num_draws": 200,
    "slices.num_directions": 2,
    "slices.num_points": 5,
    "slices.extent": 0.5,
}


@pytest.fixture(scope="module")
def problem():
    """Rounds of six microbatches of a lookup table with 40 parameters."""
    return Problem(
        table.loss_fn,
        table.log_probs_fn,
        table.make_params(),
        lambda i: table.make_batches(6, 4, seed=i),
        KEY,
        num_examples=1000,
    )


def settings_with(**changes) -> ConfigDict:
    settings = base().flatness
    settings.update_from_flattened_dict({**CHANGES, **changes})
    return settings


def direct(problem, settings) -> dict[str, dict[str, Estimate]]:
    """Return for each measure a function that computes its estimates by direct calls."""
    data = problem.params, problem.sample(0)
    loss, log_probs = (table.loss_fn, *data), (table.log_probs_fn, *data)
    round_key = jax.random.fold_in(KEY, 0)  # traces have a key for each round
    sigma, radius = settings.sharpness.sigma, settings.sharpness.radius
    adaptive_sigma, adaptive_radius = (
        settings.sharpness[f"adaptive_{k}"] for k in ("sigma", "radius")
    )
    gradient = jax.grad(lambda p: flatness.mean_loss(table.loss_fn, p, problem.sample(0)).mean)

    def average(**how):
        how |= {"num_probes": 3, "probes_per_pass": 3}
        return flatness.average_sharpness(*loss, KEY, **how)

    def worst(**how):
        return flatness.worst_sharpness(*loss, num_steps=2, **how)

    def eigenvalues():
        largest, smallest = flatness.hessian_extremes(
            *loss, KEY, num_largest=2, num_smallest=1, num_steps=12
        )
        named = {}
        for side, pairs in (("largest", largest), ("smallest", smallest)):
            along = flatness.curvature_along(*loss, pairs.vectors)
            for k, value in enumerate(pairs.values_k):
                name = f"hessian_eigenvalue/{side}_{k + 1}"
                named[name] = Estimate(value, along.sem[k], 6, "sentences")
                nothing = jnp.full_like(value, jnp.nan)
                named[f"{name}_residual"] = Estimate(pairs.residuals_k[k], nothing, 6, "sentences")
        return named

    def learning_coefficient():
        how = {"num_largest": 1, "num_smallest": 0, "num_steps": 8}
        largest = float(flatness.hessian_extremes(*loss, KEY, **how).largest.values_k[0])
        scale = 1000 / math.log(1000)
        found = flatness.local_learning_coefficient(
            *loss, KEY,
            num_examples=1000, num_chains=4, num_draws=200, localization=0.1 * scale * largest,
        )  # fmt: skip
        nothing = jnp.full_like(found.r_hat, jnp.nan)
        return {
            "local_learning_coefficient": found.estimate,
            "local_learning_coefficient/r_hat": Estimate(found.r_hat, nothing, 4, "chains"),
            "local_learning_coefficient/effective_samples": Estimate(
                found.effective_samples, nothing, 4, "chains"
            ),
        }

    traces = {"num_probes": 3, "probes_per_pass": 3}
    labels = {"num_samples": 3, "samples_per_pass": 3}
    density = {"num_probes": 2, "num_steps": 5}
    return {
        "hessian_trace": lambda: flatness.hessian_trace(*loss, round_key, **traces),
        "gauss_newton_trace": lambda: flatness.gauss_newton_trace(*log_probs, round_key, **traces),
        "fisher_trace": lambda: flatness.fisher_trace(*log_probs, round_key, **labels),
        "hessian_eigenvalues": eigenvalues,
        "hessian_density": lambda: {
            "hessian_effective_rank": flatness.hessian_density(
                *loss, KEY, **density
            ).effective_rank()
        },
        "average_sharpness": lambda: average(sigma=sigma),
        "adaptive_average_sharpness": lambda: average(sigma=adaptive_sigma, adaptive=True),
        "worst_sharpness": lambda: worst(radius=radius),
        "adaptive_worst_sharpness": lambda: worst(radius=adaptive_radius, adaptive=True),
        "critical_sharpness": lambda: flatness.critical_sharpness(
            *loss, jax.tree.map(jnp.negative, gradient(problem.params))
        ),
        "gradient_noise": lambda: {
            f"gradient_noise/{name}": value
            for name, value in vars(flatness.gradient_noise(*loss)).items()
        },
        "local_learning_coefficient": learning_coefficient,
    }


def test_configs_can_ask_for_every_measure_with_an_estimate():
    of_the_command = {"loss_slices", "loss_plane", "loss_path"}
    assert set(MEASURES) == flatness.MEASURES.keys() - of_the_command
    assert len(set(MEASURES)) == len(MEASURES)


SLOW = [name for name in MEASURES if name.startswith("adaptive")]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MEASURES]
)
@pytest.mark.slow
def test_a_measure_is_its_function_with_the_settings(problem, name):
    settings = settings_with()
    measured = flatness.MEASURES[name](problem, settings).estimates
    expected = direct(problem, settings)[name]()
    expected = expected if isinstance(expected, dict) else {name: expected}
    assert measured.keys() == expected.keys()
    for key, estimate in measured.items():
        right = expected[key]
        assert (estimate.num_samples, estimate.over) == (right.num_samples, right.over), key
        numbers = (estimate.mean, estimate.sem), (right.mean, right.sem)
        # The gradient of critical_sharpness is summed up in another order here.
        np.testing.assert_allclose(*numbers, rtol=1e-12, err_msg=key)
        assert estimate.mean.dtype == np.float64


@pytest.mark.slow
def test_slices_are_rises_along_the_drawn_directions(problem):
    measured = flatness.MEASURES["loss_slices"](problem, settings_with())
    assert measured.estimates == {}
    curves = measured.curves
    np.testing.assert_allclose(curves["steps_G"], [-0.5, -0.25, 0, 0.25, 0.5])
    center = flatness.mean_loss(table.loss_fn, problem.params, problem.sample(0)).mean
    for d, key in enumerate(jax.random.split(KEY, 2)):
        direction = flatness.filter_normalized(key, problem.params)
        for g in (0, 2, 3):
            step = curves["steps_G"][g]
            moved = jax.tree.map(lambda p, u, s=step: p + s * u, problem.params, direction)
            loss = flatness.mean_loss(table.loss_fn, moved, problem.sample(0)).mean
            np.testing.assert_allclose(curves["rises_DxG"][d, g], loss - center, atol=1e-12)


def test_a_loss_without_curvature_gives_the_learning_coefficient_no_unit(problem):
    flat = problem._replace(loss_fn=lambda params, batch: (0.0 * params["bias"].sum(), 1.0))
    measured = flatness.MEASURES["local_learning_coefficient"](flat, settings_with())
    names = {f"local_learning_coefficient{n}" for n in ("", "/r_hat", "/effective_samples")}
    assert measured.estimates.keys() == names
    assert all(np.isnan(estimate.mean) for estimate in measured.estimates.values())
    assert measured.curves == {}


@pytest.mark.parametrize("name", ["hessian_trace", "fisher_trace"])
@pytest.mark.slow
def test_groups_of_a_grouping_add_up_to_the_trace(problem, name):
    groupings = (lambda path: f"of {path}", lambda path: "all")
    grouped = problem._replace(groupings=groupings)
    estimates = flatness.MEASURES[name](grouped, settings_with()).estimates
    assert set(estimates) == {name, *(f"{name}/{g}" for g in ("of bias", "of table", "all"))}
    total = estimates[name]
    parts = [estimates[f"{name}/of {leaf}"].mean for leaf in ("bias", "table")]
    np.testing.assert_allclose(sum(parts), total.mean, rtol=1e-12)
    whole = estimates[f"{name}/all"]
    np.testing.assert_allclose((whole.mean, whole.sem), (total.mean, total.sem), rtol=1e-12)
    alone = flatness.MEASURES[name](problem, settings_with()).estimates[name]
    np.testing.assert_allclose((alone.mean, alone.sem), (total.mean, total.sem), rtol=1e-9)


def test_a_trace_takes_rounds_of_new_sentences_until_it_is_precise(problem):
    seen = []

    def sample(i):
        seen.append(i)
        return problem.sample(i)

    counted = problem._replace(sample=sample)
    measure = flatness.MEASURES["gauss_newton_trace"]
    settings = settings_with(relative_error=0.06, max_rounds=128)
    estimate = measure(counted, settings).estimates["gauss_newton_trace"]
    num_rounds = len(seen)
    assert seen == list(range(num_rounds))
    assert num_rounds in (32, 64)
    assert estimate.num_samples == 6 * num_rounds
    assert estimate.interval()[1] - estimate.mean <= 0.06 * estimate.mean
    seen.clear()
    measure(counted, settings_with(relative_error=0.2, max_rounds=1))
    measure(counted, settings_with(relative_error=0.0, max_rounds=16))
    assert seen == [0, 0]


def test_sampling_stops_at_nan():
    drawn = []

    def draw_round(i):
        drawn.append(i)
        return TraceTerms(jnp.full(4, jnp.nan), jnp.ones(4), "probes+sentences")

    flatness.sample_until(draw_round, 0.1, 16)
    assert drawn == [0]


def test_critical_sharpness_without_a_bracket_is_nan(problem):
    """A loss that is flat never rises along its gradient, which is 0."""

    def flat_loss(params, batch):
        loss_sum, weight = table.loss_fn(params, batch)
        return 0 * loss_sum, weight

    measured = flatness.MEASURES["critical_sharpness"](
        problem._replace(loss_fn=flat_loss), settings_with()
    )
    (estimate,) = measured.estimates.values()
    assert math.isnan(estimate.mean)
    assert math.isnan(estimate.sem)
    assert estimate.num_samples == 6


def test_an_error_of_the_loss_is_not_taken_for_a_missing_bracket(problem, monkeypatch):
    """The loss fails after its gradient is taken, so within critical_sharpness."""
    gradient_is_taken = False

    def failing_loss(params, batch):
        if gradient_is_taken:
            raise ValueError("a mistake in the loss")
        return table.loss_fn(params, batch)

    def mean_gradient(*args):
        nonlocal gradient_is_taken
        gradient = flatness.mean_gradient(*args)
        gradient_is_taken = True
        return gradient

    monkeypatch.setattr(measures, "mean_gradient", mean_gradient)
    with pytest.raises(ValueError, match="a mistake in the loss"):
        measures.MEASURES["critical_sharpness"](
            problem._replace(loss_fn=failing_loss), settings_with()
        )
    assert gradient_is_taken


def test_a_density_takes_no_more_steps_than_there_are_parameters(problem):
    args = table.loss_fn, problem.params, problem.sample(0), KEY
    many, enough = (flatness.hessian_density(*args, num_probes=2, num_steps=m) for m in (10**9, 40))
    assert many.nodes_nxm.shape == many.weights_nxm.shape == (2, 40)
    np.testing.assert_array_equal(many.nodes_nxm, enough.nodes_nxm)


def test_a_plane_holds_the_slices_along_its_axes(problem):
    """Its middle row and column are the rises along one direction; its centre is 0."""
    chosen = settings_with()
    curves = flatness.MEASURES["loss_plane"](problem, chosen).curves
    rises_GxG, steps_G = curves["rises_GxG"], curves["steps_G"]
    middle = len(steps_G) // 2
    assert rises_GxG[middle, middle] == 0
    first, second = (
        flatness.filter_normalized(key, problem.params, problem.stacked)
        for key in jax.random.split(problem.key)
    )
    args = problem.loss_fn, problem.params, problem.sample(0)
    for along_G, direction in ((rises_GxG[:, middle], first), (rises_GxG[middle], second)):
        found = flatness.loss_rises(*args, [direction], steps_G[:, None])
        np.testing.assert_allclose(along_G, found.mean, rtol=1e-9, atol=1e-12)


def test_a_path_has_its_losses_and_its_barrier(problem):
    """Against single losses at mixed parameters, and paired differences of microbatches."""
    batches = problem.sample(0)
    end = problem.params | {"table": 6 * problem.params["table"]}  # tanh: most changes early
    measured = flatness.MEASURES["loss_path"](problem._replace(toward=end), settings_with())
    weights_M = np.asarray(batches["weights"]).sum(axis=1)

    def sums_M(t):
        mixed = jax.tree.map(lambda a, b: (1 - t) * a + t * b, problem.params, end)
        return np.asarray(jax.vmap(lambda batch: table.loss_fn(mixed, batch)[0])(batches))

    def expected(differences_M):
        return flatness.ratio_estimate(jnp.asarray(differences_M), weights_M, "sentences")

    curves, ways = measured.curves, (0.25, 0.5, 0.75)
    np.testing.assert_allclose(curves["steps_G"], [0, *ways, 1])
    for g, t in enumerate(ways, start=1):
        rise = expected(sums_M(t) - sums_M(0))
        found = [curves[name][g] for name in ("rises_G", "low_G", "high_G")]
        np.testing.assert_allclose(found, [rise.mean, *rise.interval()], rtol=1e-9)
    above = [expected(sums_M(t) - (1 - t) * sums_M(0) - t * sums_M(1)) for t in ways]
    barrier, change = max(above, key=lambda e: e.mean), expected(sums_M(1) - sums_M(0))
    assert barrier.mean > 0
    for name, right in (("loss_barrier", barrier), ("loss_change", change)):
        found = measured.estimates[name]
        np.testing.assert_allclose((found.mean, found.sem), (right.mean, right.sem), rtol=1e-9)


def test_a_path_without_an_end_raises(problem):
    with pytest.raises(ValueError, match="loss_path needs the parameters at its end"):
        flatness.MEASURES["loss_path"](problem, settings_with())


def test_batches_are_given_as_a_list_stacked_or_by_round():
    """All three are the same microbatches; only a function has a second round."""
    stacked = table.make_batches(3, 4, seed=0)
    listed = [jax.tree.map(lambda x, m=m: np.asarray(x[m]), stacked) for m in range(3)]
    of_round = lambda i: table.make_batches(3, 4, seed=i)  # noqa: E731
    for batches in (stacked, listed, of_round):
        made = Problem.from_batches(table.loss_fn, table.make_params(), batches)
        jax.tree.map(np.testing.assert_array_equal, made.sample(0), stacked)
        if batches is of_round:
            jax.tree.map(
                np.testing.assert_array_equal, made.sample(1), table.make_batches(3, 4, seed=1)
            )
        else:
            with pytest.raises(ValueError, match="give a function of the round as batches"):
                made.sample(1)
    short = [*listed, jax.tree.map(lambda x: x[:3], listed[0])]
    with pytest.raises(ValueError, match=r"batches\[3\] has the shapes .* a smaller last batch"):
        Problem.from_batches(table.loss_fn, table.make_params(), short)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("fisher_trace", "log_probs_fn"),
        ("gauss_newton_trace", "log_probs_fn"),
        ("local_learning_coefficient", "num_examples"),
    ],
)
def test_a_measure_names_what_the_problem_has_not(problem, name, missing):
    lacking = problem._replace(**{missing: None})
    with pytest.raises(ValueError, match=f"{name} needs {missing}"):
        flatness.MEASURES[name](lacking, settings_with())
