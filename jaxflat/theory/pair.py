"""Drift with two parameters: logit = u v, labels 1 with probability p = sigmoid(1).

With g = sigmoid(u v) - mean label, one step is u' = u - eta g v and v' = v - eta g u. It multiplies
D = u^2 - v^2 by exactly 1 - eta^2 g^2. Near u v = 1, with s = p (1 - p) and r = u^2 + v^2,

    E g^2 = s / B + E(sigmoid(u v) - p)^2 = s / B (1 + s eta r / 2 + O(eta^2)),

because u v varies by eta r / (2 B) around 1. So E D = D_0 exp(-s t) (1 + O(eta)) with
t = eta^2 k / B. The O(eta) is -s^2 eta / 2 times the integral of r = sqrt(D^2 + 4) over time.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.axes import Axes

from jaxflat.analysis.page.drawing import COLORS
from jaxflat.theory.check import NUM_ERRORS, Check, mean_and_sem
from jaxflat.theory.flow import flow
from jaxflat.theory.saturated import SaturatedProblem
from jaxflat.theory.sgd import run_chains

START = (2.0, 0.5)
TIME, NUM_RECORDS = 10.0, 5  # last t = eta^2 k / B, and the number of records up to it
RATES = (0.1, 0.05, 0.025)
LARGE_BATCH, ITS_RATE = 4, 0.05
TO_RATE_ZERO = np.asarray([1 / 3, -2.0, 8 / 3])  # errors of order eta and eta^2 cancel
NUM_CHAINS = 4096
P1 = float(1 / (1 + np.exp(-1)))
VARIANCE = P1 * (1 - P1)


def pair_problem() -> SaturatedProblem:
    """Return the model with its single question."""

    def logits_fn(params_2: Array) -> Array:
        return jnp.stack([jnp.zeros_like(params_2[0]), params_2[0] * params_2[1]])[None]

    return SaturatedProblem(logits_fn, jnp.ones(1), jnp.asarray([[1 - P1, P1]]))


def difference(params: Array) -> np.ndarray:
    """Return u^2 - v^2 over its value at the start."""
    squares = np.asarray(params) ** 2
    return (squares[..., 0] - squares[..., 1]) / (START[0] ** 2 - START[1] ** 2)


def closed_form(times_R: np.ndarray, learning_rate: float = 0.0) -> np.ndarray:
    """Return E D / D_0 at times t = eta^2 k / B, to first order in eta."""
    start = START[0] ** 2 - START[1] ** 2
    found = []
    for time in times_R:
        fine = np.linspace(0, time, 1000)
        lengths = np.sqrt((start * np.exp(-VARIANCE * fine)) ** 2 + 4)
        correction = VARIANCE**2 * learning_rate / 2 * np.trapezoid(lengths, fine)
        found.append(np.exp(-VARIANCE * time - correction))
    return np.asarray(found)


@dataclass(frozen=True)
class Decay:
    """E D / D_0 over chains: means_R with standard errors sems_R, at times_R."""

    learning_rate: float
    batch_size: int
    times_R: np.ndarray
    means_R: np.ndarray
    sems_R: np.ndarray


def decay(learning_rate: float, batch_size: int, key: Array, num_chains: int) -> Decay:
    """Run SGD from START up to t = TIME."""
    num_steps = round(TIME / NUM_RECORDS * batch_size / learning_rate**2)
    start_Nx2 = jnp.broadcast_to(jnp.asarray(START), (num_chains, 2))
    how = {"learning_rate": learning_rate, "batch_size": batch_size, "num_steps": num_steps}
    params_RxNx2 = run_chains(pair_problem(), start_Nx2, key, **how, num_records=NUM_RECORDS)
    times_R = learning_rate**2 * num_steps / batch_size * np.arange(1, NUM_RECORDS + 1)
    found = [mean_and_sem(values_N) for values_N in difference(params_RxNx2)]
    return Decay(learning_rate, batch_size, times_R, *map(np.asarray, zip(*found, strict=True)))


def checks(decays: list[Decay], large: Decay) -> list[Check]:
    """Check the decay at each rate and at rate 0, its order, 1 / B, and exact targets."""
    found, errors, sems = [flow_check()], [], []
    chains = f"{NUM_ERRORS} SEM of {NUM_CHAINS} chains"
    for run in (*decays, large):
        expected, limit = (
            closed_form(run.times_R, run.learning_rate)[-1],
            closed_form(run.times_R)[-1],
        )
        error_bar = NUM_ERRORS * run.sems_R[-1] + expected * np.log(limit / expected) ** 2
        name = f"u, v: E D / D_0, eta = {run.learning_rate}, B = {run.batch_size}, O(eta) included"
        found.append(
            Check(name, expected, run.means_R[-1], error_bar, f"{chains} + (its O(eta))^2")
        )
    for run in decays:
        errors.append(closed_form(run.times_R)[-1] - run.means_R[-1])
        sems.append(run.sems_R[-1])
    limit = closed_form(decays[0].times_R)[-1]
    mean, sem = at_rate_zero([run.means_R[-1] for run in decays], sems)
    found.append(Check("u, v: E D / D_0, eta -> 0", limit, mean, NUM_ERRORS * sem, chains))
    found.append(order_check("u, v", errors, sems, chains))
    found.append(batch_check(decays[RATES.index(ITS_RATE)], large, chains))
    return [*found, exact_check()]


def at_rate_zero(values: list, sems: list) -> tuple[float, float]:
    """Extrapolate to eta -> 0 from 4 h, 2 h and h (Richardson); return value and standard error."""
    mean, sem = TO_RATE_ZERO @ np.asarray(values), np.linalg.norm(TO_RATE_ZERO * np.asarray(sems))
    return float(mean), float(sem)


def order_check(name: str, errors: list, sems: list, error: str) -> Check:
    """Check order 1: the error at 4 h is 4 times the error at h."""
    order = np.log2(abs(errors[0] / errors[-1])) / 2
    sem = np.hypot(sems[0] / errors[0], sems[-1] / errors[-1]) / np.log(2) / 2
    bias = 0.1
    return Check(
        f"{name}: order in eta of the error", 1, order, NUM_ERRORS * sem + bias, f"{error} + {bias}"
    )


def batch_check(small: Decay, large: Decay, error: str) -> Check:
    """Check the ratio of the decay a step at batch 1 to the decay at a larger batch."""
    logs = [np.log(run.means_R[-1]) for run in (small, large)]
    steps = [run.times_R[-1] * run.batch_size / run.learning_rate**2 for run in (small, large)]
    ratio = logs[0] / steps[0] / (logs[1] / steps[1])
    relative = [
        run.sems_R[-1] / run.means_R[-1] / log
        for run, log in zip((small, large), logs, strict=True)
    ]
    name = f"u, v: decay a step at B = 1 over B = {large.batch_size}, eta = {small.learning_rate}"
    bias = small.learning_rate**2
    bar = ratio * (NUM_ERRORS * float(np.hypot(*relative)) + bias)
    return Check(name, large.batch_size, ratio, bar, f"{error} + eta^2")


def flow_check() -> Check:
    """Check that -1/4 grad tr H, integrated on the manifold, is the closed form: this fixes 1/4."""
    times = np.asarray([TIME])
    found = difference(flow(pair_problem(), jnp.asarray(START), times, 50))[0]
    name = "u, v: D / D_0 by d theta / dt = -1/4 grad tr H"
    return Check(name, closed_form(times)[0], found, 1e-6, "tolerance")


def exact_check() -> Check:
    """Check that D is constant with exact targets once u v = 1."""
    how = {"learning_rate": RATES[0], "batch_size": 1, "num_steps": 10_000, "num_records": 2}
    start = 1.3 * jnp.asarray([START])
    params = run_chains(pair_problem(), start, jax.random.key(0), **how, exact=True)
    first, last = difference(params)[:, 0]
    return Check(
        "u, v: D after 10,000 more steps on exact targets, over before",
        1,
        last / first,
        1e-9,
        "tolerance",
    )


def draw(ax: Axes, decays: list[Decay]) -> None:
    """Draw the decay against time."""
    grid = np.linspace(0, TIME, 100)
    ax.plot(grid, closed_form(grid), color="black", label="exp(−p(1−p) t)")
    for color, run in zip(COLORS, decays, strict=False):
        ax.errorbar(
            run.times_R, run.means_R, yerr=NUM_ERRORS * run.sems_R, fmt="o", markersize=4,
            color=color, label=f"SGD, η = {run.learning_rate}",
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xlabel("t = η² steps / B")
    ax.set_ylabel("E(u² − v²), start = 1")
    ax.legend(frameon=False)
