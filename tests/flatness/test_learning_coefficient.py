"""The local learning coefficient against Gaussian posteriors and reduced-rank regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxflat.flatness import local_learning_coefficient, split_r_hat
from tests.support.counts import in_full

CENTER_P = np.asarray([0.5, -1.0, 2.0])


def repeated(loss_fn, params, batches, num_repeats=32, **options):
    """The mean of independent estimates of two chains each, and its standard error."""

    @jax.jit
    @jax.vmap
    def estimate(key):
        found = local_learning_coefficient(
            loss_fn, params, batches, key, num_chains=2, num_burnin=options["num_draws"], **options
        )
        return found.mean

    means_R = np.asarray(estimate(jax.random.split(jax.random.key(0), num_repeats)))
    return means_R.mean(), means_R.std(ddof=1) / num_repeats**0.5


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.slow
def test_a_regular_model_has_half_its_parameters(beta):
    """n beta E[u'Au / 2] = 1/2 sum_i n beta a_i / h_i, h_i = n beta a_i + gamma, at step 0.

    With u <- (1 - e h_i / 2) u + N(0, e) a step e multiplies the variance by 1 / (1 - e h_i / 4).
    """
    root_PxP = np.random.default_rng(0).normal(size=(3, 3))
    curvature_PxP = np.eye(3) + root_PxP @ root_PxP.T / 3

    def loss_fn(params, batch):
        offset_P = params - CENTER_P
        return 5.0 * (batch + offset_P @ curvature_PxP @ offset_P / 2), jnp.asarray(5)

    scale, gamma = 1000 * (1 / np.log(1000) if beta is None else beta), 60.0
    values_P = scale * np.linalg.eigvalsh(curvature_PxP)
    step = 0.4 / (values_P[-1] + gamma)
    shares_P = values_P / (values_P + gamma)
    truth = (shares_P / (1 - step * (values_P + gamma) / 4)).sum() / 2
    mean, sem = repeated(
        loss_fn, CENTER_P, np.ones(1),
        num_examples=1000, num_draws=1000, localization=gamma,
        inverse_temperature=beta, step_size=step,
    )  # fmt: skip
    print(f"at step 0 {shares_P.sum() / 2:.4f}, at this {truth:.4f}, found {mean:.4f} +- {sem:.4f}")
    assert sem < 0.01 * truth
    assert abs(mean - truth) < 3 * sem


def test_unequal_microbatches_and_large_steps_have_the_variance_they_should():
    """Every direction is a random recurrence with a stationary variance in closed form.

    u <- (1 - step h_m / 2) u - step n beta c_m / 2 + N(0, step), h_m = n beta a_m + gamma. m is
    uniform; a_m and c_m are a microbatch's curvature and slope times M weight_m / sum(weight).
    """
    batches = {
        "weight": np.asarray([1, 5, 2]),
        "curvature": np.asarray([[8.0, 1.0, 0.5], [1.0, 2.0, 0.0], [0.0, 4.0, 3.0]]),
        "slope": np.asarray([[1.0, -2.0, 0.5], [-0.4, 0.2, 0.1], [0.5, 0.5, -0.5]]),
        "offset": np.asarray([100.0, 0.0, -50.0]),  # differences that are not paired would drown
    }

    def loss_fn(params, batch):
        u_P = params - CENTER_P
        mean = jnp.sum(batch["curvature"] * u_P**2 / 2 + batch["slope"] * u_P) + batch["offset"]
        return batch["weight"].astype(float) * mean, batch["weight"]

    share_Mx1 = 3 * batches["weight"][:, None] / 8
    np.testing.assert_allclose((share_Mx1 * batches["slope"]).sum(axis=0), 0, atol=1e-15)
    scale, gamma, step = 100 / np.log(100), 4.0, 0.01
    factors_MxP = 1 - step / 2 * (scale * share_Mx1 * batches["curvature"] + gamma)
    kicks_P = (step / 2 * scale) ** 2 * ((share_Mx1 * batches["slope"]) ** 2).mean(axis=0)
    variances_P = (step + kicks_P) / (1 - (factors_MxP**2).mean(axis=0))
    truth = scale / 2 * (share_Mx1 * batches["curvature"]).mean(axis=0) @ variances_P
    mean, sem = repeated(
        loss_fn, CENTER_P, batches,
        num_examples=100, num_draws=1500, localization=gamma, step_size=step,
    )  # fmt: skip
    print(f"stationary {truth:.4f}, found {mean:.4f} +- {sem:.4f}")
    assert sem < 0.01 * truth
    assert abs(mean - truth) < 3 * sem


def reduced_rank_coefficient(M, N, H, r):
    """lambda of y = B A x + noise, A of shape HxM, B NxH, the true BA of rank r.

    Aoyagi & Watanabe, Stochastic complexities of reduced rank regression in Bayesian estimation,
    Neural Networks 18, 2005, main theorem.
    """
    if N + r > M + H:
        return (H * M - H * r + N * r) / 2
    if M + r > N + H:
        return (H * N - H * r + M * r) / 2
    if H + r > M + N:
        return M * N / 2
    odd = (M + H + N + r) % 2
    return (2 * (H + r) * (M + N) - (M - N) ** 2 - (H + r) ** 2 + odd) / 8


def reduced_rank(M, N, H, r):
    """The population's loss, less a constant, and the most singular of the true parameters.

    For x and noise ~ N(0, I) the loss is |BA - T|^2 / 2. On a sample, n beta (E[L_n] - L_n(w*)) at
    the true w* spreads around lambda by sqrt(lambda / (2 log n)) (Watanabe, A widely applicable
    Bayesian information criterion, 2013). At n = 10^8 this is a quarter of a lambda of 1/2. With
    the population's loss only the sampler's errors remain. Local coefficients differ along the
    fibre BA = T. The theorem gives the smallest, at the deepest singularity, where A and B have
    rank at most r.
    """
    eye_HxR = np.eye(H, r)
    target_NxM = np.eye(N, r) @ np.eye(M, r).T

    def loss_fn(params, batch):
        return jnp.sum((params["B"] @ params["A"] - target_NxM) ** 2) / 2, jnp.asarray(1.0)

    return loss_fn, {"A": eye_HxR @ np.eye(M, r).T, "B": np.eye(N, r) @ eye_HxR.T}


def reduced_rank_estimate(config, n, num_draws, step=0.05):
    """Step sizes in units of 1 / (n beta), the largest curvature at distance 1."""
    loss_fn, params = reduced_rank(*config)
    options = {"num_examples": n, "num_draws": num_draws, "step_size": step * np.log(n) / n}
    return repeated(loss_fn, params, np.zeros(1), localization=1.0, **options)


@pytest.mark.parametrize(
    ("config", "truth", "n", "num_draws"),
    [
        ((1, 1, 3, 0), 1 / 2, 1000, 2500),  # of 6 parameters
        ((3, 2, 2, 1), 5 / 2, 1000, 2500),  # of 10
        *in_full(
            ((2, 2, 2, 0), 3 / 2, 3000, 15_000),  # of 8
            ((2, 6, 2, 1), 4, 3000, 15_000),  # of 16
        ),
    ],
)
@pytest.mark.slow
def test_reduced_rank_regression_has_its_known_coefficient(config, truth, n, num_draws):
    assert reduced_rank_coefficient(*config) == truth
    mean, sem = reduced_rank_estimate(config, n, num_draws)
    print(f"{config}: lambda {truth}, found {mean:.4f} +- {sem:.4f}")
    assert sem < 0.03 * truth
    assert abs(mean - truth) < 0.1 * truth


def test_it_is_local():
    """y = b a x, b of 4: where b = 0 and a = 1 only b's four directions cost, and lambda is 2."""
    loss_fn, params = reduced_rank(1, 4, 1, 0)
    params["A"] = np.ones((1, 1))
    mean, sem = repeated(
        loss_fn, params, np.zeros(1),
        num_examples=100_000, num_draws=1000, localization=100.0, step_size=1e-5,
    )  # fmt: skip
    print(f"found {mean:.4f} +- {sem:.4f}")
    assert sem < 0.02 * 2
    assert abs(mean - 2) < 0.1 * 2


@pytest.mark.slow
def test_what_is_left_of_a_singular_posterior_is_the_step():
    """y = b . a x, a and b of 3, at finite n, b integrated out: a radial integral over a.

    The error halves with the step, and the line through two steps meets the integral at step 0.
    """
    n = 1000
    scale = n / np.log(n)

    def density(s):  # of s = |a|, up to a constant
        return s**2 * np.exp(-(s**2) / 2) * (1 + scale * s**2) ** -0.5

    def moment(s):
        return density(s) * scale * s**2 / (1 + scale * s**2) / 2

    truth = integrate.quad(moment, 0, 20)[0] / integrate.quad(density, 0, 20)[0]
    (one, sem_one), (half, sem_half) = (
        reduced_rank_estimate((1, 1, 3, 0), n, 30_000, step) for step in (0.1, 0.05)
    )
    line, sem = 2 * half - one, np.hypot(2 * sem_half, sem_one)
    print(f"exact {truth:.4f}, steps {one:.4f}, {half:.4f}, at step 0 {line:.4f} +- {sem:.4f}")
    assert one - half > 5 * np.hypot(sem_half, sem_one)
    assert sem < 0.02 * truth
    assert abs(line - truth) < 3 * sem


@pytest.mark.parametrize("num_draws", [10, 11])
def test_split_r_hat_is_the_textbook_formula(num_draws):
    values_CxT = np.random.default_rng(1).normal(size=(3, num_draws)).cumsum(axis=1)
    halves = [half for chain in values_CxT for half in (chain[-10:-5], chain[-5:])]
    means = [sum(half) / 5 for half in halves]
    within = sum(sum((x - m) ** 2 for x in h) / 4 for h, m in zip(halves, means, strict=True)) / 6
    between = 5 * sum((m - sum(means) / 6) ** 2 for m in means) / 5
    truth = np.sqrt((4 / 5 * within + between / 5) / within)
    np.testing.assert_allclose(split_r_hat(jnp.asarray(values_CxT)), truth, rtol=1e-12)


def test_split_r_hat_tells_agreement_from_disagreement():
    values_CxT = np.random.default_rng(2).normal(size=(4, 10_000))
    assert abs(split_r_hat(jnp.asarray(values_CxT)) - 1) < 1e-3
    levels_Cx1, drift_1xT = np.arange(4)[:, None] * 10, np.linspace(0, 10, 10_000)[None]
    assert split_r_hat(jnp.asarray(values_CxT + levels_Cx1)) > 5
    assert split_r_hat(jnp.asarray(values_CxT + drift_1xT)) > 1.5  # no chain is stationary


def quadratic(params, batch):
    return batch * jnp.sum(params**2), jnp.asarray(1.0)


SHORT = {"num_examples": 100, "step_size": 1e-3, "localization": 1.0}
SHORT |= {"num_chains": 3, "num_draws": 8, "num_burnin": 0}


def test_a_step_depends_on_its_key_chain_and_number_alone():
    args = quadratic, np.zeros(2), np.arange(1.0, 4.0)
    found = local_learning_coefficient(*args, jax.random.key(0), **SHORT)
    longer = SHORT | {"num_chains": 4, "num_draws": 5, "num_burnin": 3}
    again = local_learning_coefficient(*args, jax.random.key(0), **longer)
    other = local_learning_coefficient(*args, jax.random.key(1), **SHORT)
    np.testing.assert_array_equal(again.rises_CxT[:3], found.rises_CxT[:, 3:])
    np.testing.assert_array_equal(found.rises_CxT[:, 0], 0)  # chains start at w*
    everything = np.concatenate([x.rises_CxT[:, 1:].ravel() for x in (found, other)])
    assert len(set(everything.tolist())) == everything.size
    scale = 100 / np.log(100)
    np.testing.assert_allclose(found.per_chain_C, scale * found.rises_CxT.mean(axis=1))
    np.testing.assert_allclose(found.mean, scale * found.rises_CxT.mean())
    np.testing.assert_array_equal(found.r_hat, split_r_hat(found.rises_CxT))


def test_a_diverged_chain_is_not_finite():
    options = SHORT | {"step_size": 1e6, "num_draws": 100}
    found = local_learning_coefficient(
        quadratic, np.zeros(2), np.ones(1), jax.random.key(0), **options
    )
    assert not np.isfinite(found.per_chain_C).any()
    assert not np.isfinite(found.mean)
    assert not np.isfinite(found.r_hat)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_examples", 1, "at least 2, not 1"),
        ("num_chains", 1, "at least 2, not 1"),
        ("num_draws", 3, "at least 4, not 3"),
        ("num_burnin", -1, "at least 0, not -1"),
        ("localization", -1.0, r"at least 0, not -1\.0"),
        ("step_size", 0.0, r"positive, not 0\.0"),
        ("step_size", float("nan"), "positive, not nan"),
        ("inverse_temperature", 0.0, r"positive, not 0\.0"),
    ],
)
def test_settings_out_of_range_raise(name, value, message):
    with pytest.raises(ValueError, match=f"{name} must be {message}"):
        local_learning_coefficient(
            quadratic, np.zeros(2), np.ones(1), jax.random.key(0), **SHORT | {name: value}
        )
