"""The local learning coefficient against posteriors in closed form and reduced-rank regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxflat import flatness
from jaxflat.flatness import learning_coefficient as sampler
from jaxflat.flatness import local_learning_coefficient, split_r_hat
from tests.support.counts import FULL, in_full
from tests.support.optimized import optimized

effective_sample_size = jax.jit(flatness.effective_sample_size)
CENTER_P = np.asarray([0.5, -1.0, 2.0])


def repeated(loss_fn, params, batches, num_repeats=32, num_chains=2, **options):
    """Independent estimates; nearly every one has to have a value."""

    @jax.jit
    @jax.vmap
    def estimate(key):
        options_of_all = options | {"num_chains": num_chains}
        return local_learning_coefficient(loss_fn, params, batches, key, **options_of_all).estimate

    with optimized():
        found = estimate(jax.random.split(jax.random.key(0), num_repeats))
    means_R, sems_R = np.asarray(found.mean), np.asarray(found.sem)
    given_R = np.isfinite(means_R)
    assert given_R.mean() > 0.95
    return means_R[given_R], sems_R[given_R]


def mean_and_sem(means_R):
    return means_R.mean(), means_R.std(ddof=1) / len(means_R) ** 0.5


@pytest.mark.parametrize(("beta", "step"), [(None, 0.25), (0.5, 0.25), (None, 3.0)])
@pytest.mark.slow
def test_a_regular_model_has_half_its_parameters(monkeypatch, beta, step):
    """n beta E[u'Au / 2] = 1/2 sum_i n beta a_i / (n beta a_i + gamma), with any step size.

    Langevin steps would multiply each term by 1 / (1 - step / 4): the fastest one with 3 by 4.
    """
    monkeypatch.setattr(sampler, "STEP", step)
    root_PxP = np.random.default_rng(0).normal(size=(3, 3))
    curvature_PxP = np.eye(3) + root_PxP @ root_PxP.T / 3

    def loss_fn(params, batch):
        offset_P = params - CENTER_P
        return 5.0 * (batch + offset_P @ curvature_PxP @ offset_P / 2), jnp.asarray(5)

    scale, gamma = 1000 * (1 / np.log(1000) if beta is None else beta), 60.0
    values_P = scale * np.linalg.eigvalsh(curvature_PxP)
    truth = (values_P / (values_P + gamma)).sum() / 2
    means_R, _ = repeated(
        loss_fn, CENTER_P, np.ones(1),
        num_examples=1000, num_draws=2000, localization=gamma, inverse_temperature=beta,
    )  # fmt: skip
    mean, sem = mean_and_sem(means_R)
    print(f"exact {truth:.4f}, found {mean:.4f} +- {sem:.4f}")
    assert sem < 0.01 * truth
    assert abs(mean - truth) < 3 * sem


@pytest.mark.slow
def test_intervals_contain_the_truth_as_often_as_they_say():
    """Of 30 curvatures over three decades, at the default localization; z-test at 4 sigma."""
    curvatures_P = np.geomspace(1e-3, 1, 30)

    def loss_fn(params, batch):
        return batch * jnp.sum(curvatures_P * params**2) / 2, batch

    num_repeats, scale = 4000 if FULL else 1000, 1000 / np.log(1000)
    truth = (curvatures_P / (curvatures_P + 0.1)).sum() / 2
    means_R, sems_R = repeated(
        loss_fn, np.zeros(30), np.ones(1), num_repeats,
        num_chains=4, num_examples=1000, num_draws=1000, localization=0.1 * scale,
    )  # fmt: skip
    covered_R = np.abs(means_R - truth) < stats.t.ppf(0.975, 3) * sems_R
    mean, sem = mean_and_sem(means_R)
    spread = np.sqrt((sems_R**2).mean()) / means_R.std(ddof=1)
    share, z = covered_R.mean(), (mean - truth) / sem
    print(f"coverage {share:.1%} of {len(means_R)}, SEM / spread {spread:.3f}, z {z:.1f}")
    assert abs(share - 0.95) < 4 * np.sqrt(0.05 * 0.95 / num_repeats)
    assert abs(spread - 1) < 0.1
    assert abs(z) < 3


@pytest.mark.slow
def test_unequal_microbatches_and_a_slope_have_the_closed_form():
    """L is the mean over predictions. A slope g lowers the result by (s g)^2 (2a - s h) / 2a^2."""
    batches = {
        "weight": np.asarray([1, 5, 2]),
        "curvature": np.asarray([[8.0, 1.0, 0.5], [1.0, 2.0, 0.0], [0.0, 4.0, 3.0]]),
        "slope": np.asarray([[1.0, -2.0, 0.5], [-0.4, 0.2, 0.1], [0.5, 0.5, -0.5]]),
        "offset": np.asarray([100.0, 0.0, -50.0]),  # it cancels in rises
    }

    def loss_fn(params, batch):
        u_P = params - CENTER_P
        mean = jnp.sum(batch["curvature"] * u_P**2 / 2 + batch["slope"] * u_P) + batch["offset"]
        return batch["weight"].astype(float) * mean, batch["weight"]

    share_M = batches["weight"] / 8
    curvature_P, slope_P = (share_M @ batches[name] for name in ("curvature", "slope"))
    slope_P += (given_P := np.asarray([0.1, -0.3, 0.2]))
    batches["slope"] = batches["slope"] + given_P
    scale, gamma = 100 / np.log(100), 4.0
    all_P = scale * curvature_P + gamma
    lost_P = (scale * slope_P) ** 2 * (2 * all_P - scale * curvature_P) / (2 * all_P**2)
    truth = (scale * curvature_P / (2 * all_P) - lost_P).sum()
    means_R, _ = repeated(
        loss_fn, CENTER_P, batches, num_examples=100, num_draws=3000, localization=gamma
    )
    mean, sem = mean_and_sem(means_R)
    print(f"exact {truth:.4f}, {lost_P.sum():.4f} of it lost; found {mean:.4f} +- {sem:.4f}")
    assert lost_P.sum() > 10 * sem
    assert sem < 0.02 * truth
    assert abs(mean - truth) < 3 * sem


@pytest.mark.parametrize("step", [0.25, *in_full(2.0)])
@pytest.mark.slow
def test_normal_crossings_agree_with_the_integral(monkeypatch, step):
    """L = x^2 y^2 (lambda 1/2, multiplicity 2), with y integrated out; at n = 1000 it is 0.36."""
    monkeypatch.setattr(sampler, "STEP", step)
    scale = 1000 / np.log(1000)

    def density(x):  # up to a constant
        return np.exp(-(x**2) / 2) * (2 * scale * x**2 + 1) ** -0.5

    def moment(x):
        return density(x) * scale * x**2 / (2 * scale * x**2 + 1)

    truth = integrate.quad(moment, 0, 20)[0] / integrate.quad(density, 0, 20)[0]

    def loss_fn(params, batch):
        return batch * params[0] ** 2 * params[1] ** 2, batch

    means_R, _ = repeated(
        loss_fn, np.zeros(2), np.ones(1), num_examples=1000, num_draws=15_000, localization=1.0
    )
    mean, sem = mean_and_sem(means_R)
    print(f"exact {truth:.4f}, found {mean:.4f} +- {sem:.4f}")
    assert sem < 0.02 * truth
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


def reduced_rank_estimate(config, n, num_draws):
    """A spring of strength 1, with curvatures at distance 1 of the order of n beta."""
    loss_fn, params = reduced_rank(*config)
    options = {"num_examples": n, "num_draws": num_draws, "localization": 1.0}
    return mean_and_sem(repeated(loss_fn, params, np.zeros(1), **options)[0])


@pytest.mark.parametrize(
    ("config", "truth", "n", "num_draws"),
    [
        ((1, 1, 3, 0), 1 / 2, 1000, 10_000),  # of 6 parameters
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


@pytest.mark.slow
def test_it_is_local():
    """y = b a x, b of 4: where b = 0 and a = 1 only b's four directions cost, and lambda is 2."""
    loss_fn, params = reduced_rank(1, 4, 1, 0)
    params["A"] = np.ones((1, 1))
    options = {"num_examples": 100_000, "num_draws": 1000, "localization": 100.0}
    mean, sem = mean_and_sem(repeated(loss_fn, params, np.zeros(1), **options)[0])
    print(f"found {mean:.4f} +- {sem:.4f}")
    assert sem < 0.02 * 2
    assert abs(mean - 2) < 0.1 * 2


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="takes six minutes: make full")
def test_a_singular_posterior_has_no_bias_left():
    """y = b . a x, a and b of 3, at finite n, b integrated out: a radial integral over a."""
    n = 1000
    scale = n / np.log(n)

    def density(s):  # of s = |a|, up to a constant
        return s**2 * np.exp(-(s**2) / 2) * (1 + scale * s**2) ** -0.5

    def moment(s):
        return density(s) * scale * s**2 / (1 + scale * s**2) / 2

    truth = integrate.quad(moment, 0, 20)[0] / integrate.quad(density, 0, 20)[0]
    mean, sem = reduced_rank_estimate((1, 1, 3, 0), n, 30_000)
    print(f"exact {truth:.4f}, found {mean:.4f} +- {sem:.4f}")
    assert sem < 0.01 * truth
    assert abs(mean - truth) < 3 * sem


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


def effective_samples_by_definition(values_CxT):
    """Vehtari et al. (2021), eq. 10 and 11, term by term."""
    n = values_CxT.shape[1] // 2
    halves = [half for chain in values_CxT for half in (chain[-2 * n : -n], chain[-n:])]
    within = np.mean([half.var(ddof=1) for half in halves])
    pooled = (n - 1) / n * within + np.var([half.mean() for half in halves], ddof=1)

    def rho(lag):
        terms = [((h - h.mean())[: n - lag] @ (h - h.mean())[lag:]) / (n - 1) for h in halves]
        return 1 - (within - np.mean(terms)) / pooled

    tau, last = -1.0, np.inf
    for k in range(n // 2):
        if (pair := rho(2 * k) + rho(2 * k + 1)) <= 0:
            break
        last = min(last, pair)
        tau += 2 * last
    return len(halves) * n / max(tau, 1 / np.log10(len(halves) * n))


def autoregressive(share, shape, seed=0):
    """Chains with x <- share x + noise, from their stationary distribution."""
    noise_CxT = np.random.default_rng(seed).normal(size=shape)
    values_CxT = np.empty(shape)
    values_CxT[:, 0] = noise_CxT[:, 0] / np.sqrt(1 - share**2)
    for t in range(1, shape[1]):
        values_CxT[:, t] = share * values_CxT[:, t - 1] + noise_CxT[:, t]
    return values_CxT


@pytest.mark.parametrize("num_draws", [16, 17, 300])
@pytest.mark.parametrize("share", [-0.5, 0.0, 0.9])
def test_effective_samples_are_the_definition(share, num_draws):
    values_CxT = autoregressive(share, (3, num_draws))
    found = effective_sample_size(jnp.asarray(values_CxT))
    np.testing.assert_allclose(found, effective_samples_by_definition(values_CxT), rtol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_effective_samples_of_an_autoregressive_chain(share):
    """C T (1 - share) / (1 + share)."""
    values_CxT = autoregressive(share, (4, 50_000))
    truth = 200_000 * (1 - share) / (1 + share)
    np.testing.assert_allclose(effective_sample_size(jnp.asarray(values_CxT)), truth, rtol=0.1)


@pytest.mark.slow
def test_effective_samples_agree_with_tensorflow_probability():
    """Its sum ends at the same pair, but a pair may exceed an earlier one; few do so much."""
    tfp = pytest.importorskip("tensorflow_probability.substrates.jax")
    for share in (0.3, 0.9):
        values_CxT = autoregressive(share, (4, 4000))
        halves_Nx2C = values_CxT.reshape(8, -1).T
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            other = tfp.mcmc.effective_sample_size(
                halves_Nx2C, filter_beyond_positive_pairs=True, cross_chain_dims=1
            )
        found = effective_sample_size(jnp.asarray(values_CxT))
        np.testing.assert_allclose(found, other, rtol=0.05)


def test_chains_that_disagree_or_break_off_have_few_effective_samples():
    values_CxT = np.random.default_rng(2).normal(size=(4, 1000))
    assert effective_sample_size(jnp.asarray(values_CxT + 10 * np.arange(4)[:, None])) < 10
    values_CxT[0, 3] = np.nan
    assert np.isnan(effective_sample_size(jnp.asarray(values_CxT)))


def quadratic(params, batch):
    return batch * jnp.sum(params**2), jnp.asarray(1.0)


SHORT = {"num_examples": 100, "localization": 10.0, "num_chains": 3, "num_draws": 20}


@pytest.mark.slow
def test_a_step_depends_on_its_key_chain_and_number_alone():
    args = quadratic, np.zeros(2), np.arange(1.0, 4.0)
    found = local_learning_coefficient(*args, jax.random.key(0), **SHORT)
    longer = SHORT | {"num_chains": 4, "num_draws": 30}
    again = local_learning_coefficient(*args, jax.random.key(0), **longer)
    other = local_learning_coefficient(*args, jax.random.key(1), **SHORT)
    np.testing.assert_array_equal(again.num_burnin_C[:3], found.num_burnin_C)
    np.testing.assert_array_equal(again.rises_CxT[:3, :20], found.rises_CxT)
    starts = np.concatenate([x.rises_CxT[:, 0] for x in (found, other)])
    assert len(set(starts.tolist())) == 6
    scale = 100 / np.log(100)
    np.testing.assert_allclose(found.per_chain_C, scale * found.rises_CxT.mean(axis=1))
    np.testing.assert_allclose(found.r_hat, split_r_hat(found.rises_CxT))
    assert (found.num_burnin_C < 64).all()  # 20 draws cut it short, so no draw counts
    np.testing.assert_array_equal(found.effective_samples, 0.0)


@pytest.mark.slow
def test_a_burnin_lasts_twenty_relaxation_times_or_the_result_has_no_value():
    """The largest curvature of U is n beta 2 + gamma, so relaxing takes 9.5 steps at gamma 2."""
    scale = 100 / np.log(100)
    needed = sampler.RELAXATIONS * np.sqrt((2 * scale + 2) / 2 / sampler.STEP)
    args = quadratic, np.zeros(2), np.ones(1), jax.random.key(0)
    for num_draws, num_burnin in ((2000, 256), (20, 32)):
        options = SHORT | {"localization": 2.0, "num_draws": num_draws}
        found = local_learning_coefficient(*args, **options)
        assert (found.num_burnin_C == num_burnin).all()
        relaxed = num_burnin >= needed
        assert bool(found.effective_samples > 0) == relaxed
        assert bool(np.isfinite(found.estimate.mean)) == relaxed


@pytest.mark.parametrize(
    ("r_hat", "size", "trusted"),
    [(1.049, 100, True), (1.051, 100, False), (1.0, 99, False), (np.nan, 500, False)],
)
def test_a_value_needs_agreement_and_effective_samples(r_hat, size, trusted):
    per_chain_C = jnp.asarray([1.0, 2.0, 4.0])
    found = sampler.LearningCoefficient(
        jnp.zeros((3, 9)), per_chain_C, jnp.zeros(3), jnp.asarray(r_hat), jnp.asarray(size)
    ).estimate
    assert (found.num_samples, found.over) == (3, "chains")
    if trusted:
        np.testing.assert_allclose(found.mean, 7 / 3)
        np.testing.assert_allclose(found.sem, stats.sem([1, 2, 4]))
    else:
        assert np.isnan(found.mean)
        assert np.isnan(found.sem)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_has_no_value():
    def loss_fn(params, batch):
        return jnp.where(params[0] == 0, 0.0, jnp.nan) * jnp.sum(params**2), batch

    found = local_learning_coefficient(loss_fn, np.zeros(2), np.ones(1), jax.random.key(0), **SHORT)
    assert not np.isfinite(found.per_chain_C).any()
    assert np.isnan(found.r_hat)
    assert np.isnan(found.estimate.mean)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_examples", 1, "at least 2, not 1"),
        ("num_chains", 1, "at least 2, not 1"),
        ("num_draws", 7, "at least 8, not 7"),
        ("localization", 0.0, r"positive, not 0\.0"),
        ("localization", float("nan"), "positive, not nan"),
        ("inverse_temperature", 0.0, r"positive, not 0\.0"),
    ],
)
def test_settings_out_of_range_raise(name, value, message):
    with pytest.raises(ValueError, match=f"{name} must be {message}"):
        local_learning_coefficient(
            quadratic, np.zeros(2), np.ones(1), jax.random.key(0), **SHORT | {name: value}
        )
