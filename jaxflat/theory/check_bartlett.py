"""Result 1: if the model is the true conditional, the gradient's covariance is the Hessian.

Let s = grad log p(v | c) and A = Hessian of log p, with answers from p*. Then
Sigma = E*[s s'] - E*s E*s' and H = -E*[A]. Bartlett's identity E_p[s s' + A] = 0 holds for answers
from the model p. So

    Sigma - H = E*[s s' + A] - E*s E*s' = sum_cv q_c (p* - p)(v | c) (s s' + A) - E*s E*s',

which is 0 at p = p* and linear in p - p*. It grows as the square root of the excess loss
KL(p* || p).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.axes import Axes
from scipy import stats

from jaxflat.analysis.page.drawing import COLORS
from jaxflat.flatness import Estimate, gradient_noise
from jaxflat.theory.check import NUM_ERRORS, Check, CheckOutcome, mean_and_sem
from jaxflat.theory.saturated import SaturatedProblem
from jaxflat.theory.tiny_language import all_questions, saturated_network, tiny_hmm

TOLERANCE = 1e-10  # for an identity in float64
NUM_DIRECTIONS = 16
SIZES = np.logspace(-4, 0.75, 20)  # lengths of the steps away from the optimum
SMALL_LOSS = 1e-4  # nats: the power is fitted to steps below this
POWER_BIAS = 0.01  # allowance for higher orders in the fitted power
LEVELS = (1e-6, 1e-4, 1e-2, 1e-1)  # excess losses, in nats, at which to report the gap
NUM_MICROBATCHES, MICROBATCH = 6000, 16


class Gap(NamedTuple):
    """Excess loss (nats), and |Sigma - H| and |G - H| over |H| in Frobenius norms, at a point."""

    excess_loss: Array
    of_covariance: Array
    of_gauss_newton: Array


def gap(problem: SaturatedProblem, params_P: Array) -> Gap:
    """Return the relative distances of Sigma and G from H, by enumeration."""
    hessian = problem.hessian(params_P)
    covariance, gauss_newton = problem.gradient_covariance(params_P), problem.gauss_newton(params_P)
    distances = (jnp.linalg.norm(m - hessian) for m in (covariance, gauss_newton))
    shares = (distance / jnp.linalg.norm(hessian) for distance in distances)
    return Gap(problem.excess_loss(params_P), *shares)


def gaps_along(problem: SaturatedProblem, params_P: Array, key: Array, sizes_L: np.ndarray) -> Gap:
    """Return the gaps, DxL, after steps of these lengths from the optimum in random directions."""

    def along(key: Array) -> Gap:
        direction_P = jax.random.normal(key, params_P.shape)
        direction_P /= jnp.linalg.norm(direction_P)
        return jax.lax.map(lambda size: gap(problem, params_P + size * direction_P), sizes_L)

    return jax.jit(lambda keys: jax.lax.map(along, keys))(jax.random.split(key, NUM_DIRECTIONS))


def powers(excess_DxL: np.ndarray, gap_DxL: np.ndarray, below: float) -> np.ndarray:
    """Fit b of gap = a excess^b in each direction, to log-log points of small excess loss."""
    fits = []
    for excess_L, gap_L in zip(excess_DxL, gap_DxL, strict=True):
        small_L = excess_L < below
        fits.append(stats.linregress(np.log(excess_L[small_L]), np.log(gap_L[small_L])))
    return np.asarray([fit.slope for fit in fits])


def sampled_noise(
    problem: SaturatedProblem, params_P: Array, key: Array
) -> tuple[Estimate, Estimate]:
    """Estimate tr Sigma and tr(Sigma H) from sampled answers, by `flatness.gradient_noise`."""
    logits_CV = jnp.log(problem.joint_CxV).reshape(-1)
    cells_MxB = jax.random.categorical(key, logits_CV, shape=(NUM_MICROBATCHES, MICROBATCH))

    def loss_fn(params_P: Array, cells_B: Array) -> tuple[Array, Array]:
        log_probs_B = problem.log_probs(params_P).reshape(-1)[cells_B]
        return -log_probs_B.sum(), jnp.asarray(MICROBATCH, jnp.result_type(float))

    noise = gradient_noise(loss_fn, params_P, cells_MxB)
    return noise.covariance_trace, noise.alignment


def run() -> CheckOutcome:
    """Check the identity at the optimum, the gap near it, and the noise of sampled gradients."""
    questions = all_questions(tiny_hmm(0, num_words=3, length=3))
    keys = jax.random.split(jax.random.key(0), 3)
    problem, params_P = saturated_network(questions, keys[0], hidden=32)
    at_optimum = jax.jit(lambda p: gap(problem, p))(params_P)
    beside = jax.tree.map(np.asarray, gaps_along(problem, params_P, keys[1], SIZES))
    hessian = jax.jit(problem.hessian)(params_P)
    noise, alignment = sampled_noise(problem, params_P, keys[2])
    checks = [
        Check("excess loss of the exact model (nats)", 0, float(at_optimum.excess_loss),
              TOLERANCE, "tolerance"),
        Check("there, |Sigma - H| / |H|", 0, float(at_optimum.of_covariance),
              TOLERANCE, "tolerance"),
        Check("there, |G - H| / |H|", 0, float(at_optimum.of_gauss_newton),
              TOLERANCE, "tolerance"),
        power_check("power of the excess loss in |Sigma - H|", beside, beside.of_covariance),
        power_check("power of the excess loss in |G - H|", beside, beside.of_gauss_newton),
        sampled_check("tr Sigma of sampled gradients is tr H", jnp.trace(hessian), noise),
        sampled_check("tr(Sigma H) of the same is tr(H H)", jnp.sum(hessian**2), alignment),
    ]  # fmt: skip
    size = f"{len(questions.weights_C)} questions, {params_P.size} parameters"
    about = f"masked LM with one hidden layer on a hidden Markov model: {size}"
    lines = [about, *levels(beside)]
    return CheckOutcome(
        checks, [("Gradient noise and Hessian", lambda ax: draw(ax, beside))], lines
    )


def power_check(name: str, beside: Gap, gap_DxL: np.ndarray) -> Check:
    """Check that the gap grows as the power 1/2 of the excess loss near the optimum."""
    mean, sem = mean_and_sem(powers(np.asarray(beside.excess_loss), gap_DxL, SMALL_LOSS))
    error = f"{NUM_ERRORS} SEM of {NUM_DIRECTIONS} directions + {POWER_BIAS}"
    return Check(name, 0.5, mean, NUM_ERRORS * sem + POWER_BIAS, error)


def sampled_check(name: str, exact: Array, found: Estimate) -> Check:
    """Check that the interval of a sampled estimate contains the exact value."""
    error = f"{NUM_ERRORS} SEM of {found.num_samples} triples of batches"
    return Check(name, float(exact), float(found.mean), NUM_ERRORS * float(found.sem), error)


def levels(beside: Gap) -> list[str]:
    """Return lines with the mean gap and its SEM at LEVELS, interpolated in each direction."""
    lines = []
    for level in LEVELS:
        found = [
            np.exp(np.interp(np.log(level), np.log(excess_L), np.log(gap_L)))
            for excess_L, gap_L in zip(beside.excess_loss, beside.of_covariance, strict=True)
            if excess_L[-1] > level
        ]
        if len(found) > 1:
            mean, sem = mean_and_sem(found)
            lines.append(f"at {level:g} nats, |Sigma - H| / |H| is {mean:.3g} +- {sem:.1g} (SEM)")
    return lines


def draw(ax: Axes, beside: Gap) -> None:
    """Draw the gap against the excess loss, one line for each direction, and the square root."""
    for excess_L, gap_L in zip(beside.excess_loss, beside.of_covariance, strict=True):
        ax.loglog(excess_L, gap_L, ".-", color=COLORS[0], linewidth=0.6, markersize=3)
    first = np.asarray(beside.excess_loss)[:, 0].mean(), np.asarray(beside.of_covariance)[:, 0]
    grid = np.logspace(np.log10(first[0]), 0, 20)
    root = first[1].mean() * np.sqrt(grid / first[0])
    ax.loglog(grid, root, "--", color="black", label="square root")
    ax.set_xlabel("Excess loss (nats)")
    ax.set_ylabel("|Σ − H| / |H|")
    ax.legend(frameon=False)
