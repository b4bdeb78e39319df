"""Drift of a language model: the table of logits in two factors, on a tiny hidden Markov model.

Its minimisers are a manifold: for any invertible M, R M and M^-1 K give the same table. The table
is exact at the start. SGD with one sampled answer a question then drifts along the manifold.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.axes import Axes

from jaxflat.analysis.page.drawing import COLORS, GREY
from jaxflat.theory.check import NUM_ERRORS, Check
from jaxflat.theory.flow import project
from jaxflat.theory.pair import TO_RATE_ZERO, at_rate_zero, order_check
from jaxflat.theory.saturated import SaturatedProblem
from jaxflat.theory.sgd import run_chains
from jaxflat.theory.tiny_language import all_questions, saturated_table, tiny_hmm

RATES = (0.05, 0.025, 0.0125)
GRID = np.linspace(0, 10, 41)  # t = eta^2 k / B
TIMES = GRID[10::10]  # the times at which SGD is recorded
LARGE_BATCH = 4
NUM_CHAINS = 256


@dataclass(frozen=True)
class Drift:
    """Chains at TIMES, projected to the manifold: traces_RxN and params_RxNxP."""

    learning_rate: float
    batch_size: int
    traces_RxN: np.ndarray
    params_RxNxP: np.ndarray

    @property
    def means_R(self) -> np.ndarray:
        """The mean trace over chains."""
        return self.traces_RxN.mean(axis=1)

    @property
    def sems_R(self) -> np.ndarray:
        """The standard error of the mean trace."""
        return self.traces_RxN.std(axis=1, ddof=1) / self.traces_RxN.shape[1] ** 0.5


def traces(problem: SaturatedProblem, params: Array) -> np.ndarray:
    """Return tr H of each minimiser along the first axis."""
    return np.asarray(jax.jit(jax.vmap(problem.trace))(params))


def make_table() -> tuple[SaturatedProblem, Array]:
    """Return six questions of three answers and a sharp model of rank three: 27 parameters."""
    questions = all_questions(tiny_hmm(0, num_words=3, length=2))
    return saturated_table(questions, jax.random.key(0), rank=3, scale=2.5)


def drift(
    problem: SaturatedProblem,
    params_P: Array,
    rate: float,
    batch_size: int,
    num_records: int,
    key: Array,
) -> Drift:
    """Run SGD from params_P, and return the traces at the minimisers nearest to its chains."""
    how = {"learning_rate": rate, "batch_size": batch_size, "num_records": num_records}
    num_steps = round(TIMES[0] * batch_size / rate**2)
    start_NxP = jnp.broadcast_to(params_P, (NUM_CHAINS, params_P.size))
    params_RxNxP = run_chains(problem, start_NxP, key, **how, num_steps=num_steps)
    return Drift(rate, batch_size, *projected(problem, params_RxNxP))


def projected(problem: SaturatedProblem, params_RxNxP: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the traces RxN at the nearest minimisers, and the minimisers RxNxP."""

    def at_minimiser(params_P: Array) -> tuple[Array, Array]:
        params_P = project(problem, params_P)
        return problem.trace(params_P), params_P

    traces_RxN, found_RxNxP = jax.jit(jax.vmap(jax.vmap(at_minimiser)))(params_RxNxP)
    return np.asarray(traces_RxN), np.asarray(found_RxNxP)


def checks(
    problem: SaturatedProblem, path_GxP: Array, drifts: list[Drift], large: list[Drift]
) -> list[Check]:
    """Check SGD against the flow at eta -> 0, the order of its error, 1 / B, and exact targets.

    path_GxP: the flow's parameters on GRID.
    """
    flow_R = traces(problem, path_GxP)[10::10]
    chains = f"{NUM_ERRORS} SEM of {NUM_CHAINS} chains"
    found = []
    for r, time in enumerate(TIMES):
        mean, sem = at_rate_zero([d.means_R[r] for d in drifts], [d.sems_R[r] for d in drifts])
        name = f"table: tr H at t = {time:g}, eta -> 0"
        found.append(Check(name, flow_R[r], mean, NUM_ERRORS * sem, chains))
    found.append(path_check(path_GxP, drifts, chains))
    errors = [float(np.sqrt(np.mean((d.means_R - flow_R) ** 2))) for d in drifts]
    sems = [float(np.sqrt(np.mean(d.sems_R**2))) for d in drifts]
    found.append(order_check("table", errors, sems, chains))
    mean, sem = at_rate_zero([d.means_R[0] for d in large], [d.sems_R[0] for d in large])
    name = f"table: tr H at B = {LARGE_BATCH}, after {TIMES[0] * LARGE_BATCH:g} / eta^2 steps"
    found.append(Check(name, flow_R[0], mean, NUM_ERRORS * sem, chains))
    return [*found, exact_check(problem, path_GxP[0])]


def path_check(path_GxP: Array, drifts: list[Drift], error: str) -> Check:
    """Check that the chains' mean parameters agree with the flow, not only their traces."""
    means_P, sems_P = [], []
    for run in drifts:
        last_NxP = run.params_RxNxP[-1]
        means_P.append(last_NxP.mean(axis=0))
        sems_P.append(last_NxP.std(axis=0, ddof=1) / len(last_NxP) ** 0.5)
    shares = TO_RATE_ZERO
    start_P, end_P = np.asarray(path_GxP[0]), np.asarray(path_GxP[-1])
    length = np.linalg.norm(end_P - start_P)
    apart = float(np.linalg.norm(shares @ np.stack(means_P) - end_P) / length)
    sem = float(np.linalg.norm(shares[:, None] * np.stack(sems_P)) / length)
    name = "table: SGD's mean to the flow's end, in lengths of the flow, eta -> 0"
    return Check(name, 0, apart, NUM_ERRORS * sem, error)


def exact_check(problem: SaturatedProblem, params_P: Array) -> Check:
    """Check that exact targets lead back to the manifold, and that the trace is then constant."""
    noise_NxP = jax.random.normal(jax.random.key(7), (16, params_P.size))
    how = {"learning_rate": 0.1, "batch_size": 1, "num_steps": 20_000, "num_records": 2}
    start_NxP = params_P[None] + 0.1 * noise_NxP
    paths = run_chains(problem, start_NxP, jax.random.key(0), **how, exact=True)
    first_N, last_N = np.asarray(jax.vmap(jax.vmap(problem.trace))(paths))
    worst = (last_N / first_N)[np.argmax(np.abs(last_N / first_N - 1))]
    name = "table: tr H after 20,000 more steps on exact targets, over before"
    return Check(name, 1, worst, 1e-6, "tolerance; worst of 16 starts")


def draw(ax: Axes, flow_G: np.ndarray, drifts: list[Drift]) -> None:
    """Draw the trace against time; flow_G is the flow's trace on GRID."""
    ax.plot(GRID, flow_G, color="black", label="dθ/dt = −¼ ∇ tr H")
    for color, run in zip(COLORS, drifts, strict=False):
        ax.errorbar(
            TIMES, run.means_R, yerr=NUM_ERRORS * run.sems_R, fmt="o", markersize=4,
            color=color, label=f"SGD, η = {run.learning_rate}",
        )  # fmt: skip
    ax.axhline(flow_G[0], linestyle="--", color=GREY, label="exact targets")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("t = η² steps / B")
    ax.set_ylabel("tr H (nats)")
    ax.legend(frameon=False)
