"""SGD chains and the flow of the trace against closed forms and dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from jaxflat.theory import pair
from jaxflat.theory.flow import flow, project, velocity
from jaxflat.theory.pair import pair_problem
from jaxflat.theory.sgd import drawn_shares, run_chains
from jaxflat.theory.tiny_language import all_questions, saturated_table, tiny_hmm

P1 = 1 / (1 + np.exp(-1))


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def table():
    with jax.enable_x64(True):
        questions = all_questions(tiny_hmm(0, num_words=3, length=2))
        return saturated_table(questions, jax.random.key(3), rank=4, scale=2.0)


def test_a_step_on_two_parameters_multiplies_the_difference():
    """u^2 - v^2 times exactly 1 - eta^2 g^2, g = sigmoid(u v) - mean label, wherever it is."""
    problem = pair_problem()
    start_Nx2 = jax.random.normal(jax.random.key(0), (50, 2))
    how = {"learning_rate": 0.3, "batch_size": 4, "num_steps": 1}
    (end_Nx2,) = np.asarray(run_chains(problem, start_Nx2, jax.random.key(1), **how))
    (u_N, v_N), (end_u_N, end_v_N) = np.asarray(start_Nx2).T, end_Nx2.T
    slopes_N = (u_N - end_u_N) / (0.3 * v_N)
    labels_N = 1 / (1 + np.exp(-u_N * v_N)) - slopes_N
    np.testing.assert_allclose(4 * labels_N, np.round(4 * labels_N), atol=1e-9)
    expected_N = (u_N**2 - v_N**2) * (1 - 0.09 * slopes_N**2)
    np.testing.assert_allclose(end_u_N**2 - end_v_N**2, expected_N, atol=1e-12)


def test_flow_on_two_parameters_is_the_closed_form():
    times = np.asarray([0.5, 2.0, 9.0])
    found = np.asarray(flow(pair_problem(), jnp.asarray([2.0, 0.5]), times, 20))
    np.testing.assert_allclose(found.prod(axis=1), 1, rtol=1e-12)
    differences = found[:, 0] ** 2 - found[:, 1] ** 2
    np.testing.assert_allclose(differences, 3.75 * np.exp(-P1 * (1 - P1) * times), rtol=1e-6)


@pytest.mark.slow
def test_velocity_is_the_part_of_the_gradient_in_the_null_space_of_the_hessian(table):
    problem, params_P = table
    hessian = jax.jit(problem.hessian)(params_P)
    null_PxN = linalg.null_space(np.asarray(hessian), rcond=1e-9)
    C, V = problem.probs_CxV.shape
    assert null_PxN.shape[1] == params_P.size - C * (V - 1)
    gradient_P = jax.jit(jax.grad(lambda p: jnp.trace(problem.hessian(p))))(params_P)
    expected = -null_PxN @ (null_PxN.T @ gradient_P) / 4
    found_P = jax.jit(lambda p: velocity(problem, p))(params_P)
    np.testing.assert_allclose(found_P, expected, atol=1e-10)


def test_flow_stays_on_the_manifold_and_the_trace_falls(table):
    problem, params_P = table
    path = flow(problem, params_P, np.asarray([0.0, 1.0, 2.0, 4.0]), 5)
    np.testing.assert_allclose(path[0], params_P, atol=1e-12)
    both = jax.jit(jax.vmap(lambda p: (problem.excess_loss(p), problem.trace(p))))
    losses, traces = (column.tolist() for column in both(path))
    assert max(losses) < 1e-20
    assert traces == sorted(traces, reverse=True)
    assert traces[-1] < 0.9 * traces[0]


def test_projection_ends_on_the_manifold_nearby(table):
    problem, params_P = table
    beside_P = params_P + 0.03 * jax.random.normal(jax.random.key(1), params_P.shape)
    projected_P = jax.jit(lambda p: project(problem, p))(beside_P)
    assert problem.excess_loss(beside_P) > 1e-5
    assert problem.excess_loss(projected_P) < 1e-20
    assert jnp.linalg.norm(projected_P - beside_P) < jnp.linalg.norm(params_P - beside_P)


def test_draws_have_the_joint_probabilities_and_the_variance_of_a_batch(table):
    problem, _ = table
    keys = jax.random.split(jax.random.key(2), 20000)
    shares = np.asarray(jax.vmap(lambda key: drawn_shares(problem, key, 3))(keys))
    joint = np.asarray(problem.joint_CxV)
    np.testing.assert_allclose(shares.sum(axis=(1, 2)), 1, rtol=1e-12)
    variances = joint * (1 - joint) / 3
    z = (shares.mean(axis=0) - joint) / np.sqrt(variances / len(shares))
    assert np.abs(z).max() < 4
    np.testing.assert_allclose(shares.var(axis=0), variances, rtol=0.1)


def test_exact_targets_move_nothing_at_a_minimiser(table):
    problem, params_P = table
    how = {"learning_rate": 0.1, "batch_size": 1, "num_steps": 50, "num_records": 2}
    start = params_P[None]
    still = run_chains(problem, start, jax.random.key(0), **how, exact=True)
    np.testing.assert_allclose(still, jnp.stack([start, start]), atol=1e-12)
    moved = run_chains(problem, start, jax.random.key(0), **how)
    assert np.abs(np.asarray(moved[0, 0] - params_P)).max() > 1e-3
    assert np.abs(np.asarray(moved[1, 0] - moved[0, 0])).max() > 1e-3


def test_the_way_to_rate_zero_leaves_out_two_orders():
    rates = 4.0, 2.0, 1.0
    values = [7 + 3 * rate - 5 * rate**2 for rate in rates]
    assert pair.at_rate_zero(values, [0, 0, 0]) == pytest.approx((7, 0))
    _, sem = pair.at_rate_zero(values, [3.0, 0.5, 3 / 8])
    assert sem == pytest.approx(3**0.5)


@pytest.mark.parametrize(("power", "holds"), [(1, True), (2, False), (0, False)])
def test_the_order_of_the_error_is_found(power, holds):
    errors = [-0.3 * rate**power for rate in (0.4, 0.2, 0.1)]
    check = pair.order_check("x", errors, [1e-5] * 3, "")
    assert check.measured == pytest.approx(power)
    assert check.holds is holds


@pytest.mark.parametrize(("slower", "holds"), [(4.0, True), (2.0, False), (4.2, False)])
def test_decay_goes_as_one_over_the_batch(slower, holds):
    times_R = np.asarray([5.0, 10.0])
    sems_R = 1e-5 * np.ones(2)
    small = pair.Decay(0.05, 1, times_R, np.exp(-0.2 * times_R), sems_R)
    large = pair.Decay(0.05, 4, times_R, np.exp(-0.2 * times_R * 4 / slower), sems_R)
    check = pair.batch_check(small, large, "")
    assert check.measured == pytest.approx(slower)
    assert check.holds is holds


def test_the_closed_form_solves_its_equation():
    """d log D / dt = -s - s^2 eta / 2 sqrt(D_0^2 exp(-2 s t) + 4), by differences."""
    s, rate, step = P1 * (1 - P1), 0.1, 1e-4
    for time in (0.5, 3.0, 9.0):
        low, high = np.log(pair.closed_form(np.asarray([time - step, time + step]), rate))
        length = np.sqrt((3.75 * np.exp(-s * time)) ** 2 + 4)
        expected = -s - s**2 * rate / 2 * length
        np.testing.assert_allclose((high - low) / (2 * step), expected, rtol=1e-4)
