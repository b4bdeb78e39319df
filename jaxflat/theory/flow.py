"""The drift of SGD with label noise: the flow of tr H on the manifold of minimisers.

At distance delta from a minimiser, take one step of learning rate eta. It uses a batch of B answers
from the truth: theta' = theta - eta (H delta + xi), Cov xi = Sigma / B = H / B by Bartlett's
identity. Across the manifold delta settles to the covariance C of H C + C H = eta H / B. So
C = eta / (2 B) on the range of H. Along the manifold the mean step is -eta/2 grad tr(H C). Per step

    E d theta = -eta^2 / (4 B) grad tr H,      d theta / dt = -1/4 grad tr H,  t = eta^2 k / B,

with the gradient on the manifold (Liu, Xie, Li & Ma 2023; Li, Wang & Arora, "What happens after
SGD reaches zero loss?", 2022). The next order in eta is neglected.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxflat.theory.saturated import SaturatedProblem

NEWTON_STEPS = 4
RELATIVE_RANK = 1e-10  # of J J': singular values below the root of this are 0


def misfit(problem: SaturatedProblem, params_P: Array) -> Array:
    """Return the logits minus the true ones, CV, centred over the answers: 0 on the manifold."""
    error_CxV = problem.logits_fn(params_P) - jnp.log(problem.probs_CxV)
    return (error_CxV - error_CxV.mean(axis=1, keepdims=True)).reshape(-1)


def _smallest_solution(jacobian_NxP: Array, right_N: Array) -> Array:
    """Return the shortest x_P with J x = right, for a J of rank less than N."""
    gram = jacobian_NxP @ jacobian_NxP.T
    inverse = jnp.linalg.pinv(gram, rtol=RELATIVE_RANK, hermitian=True)
    return jacobian_NxP.T @ (inverse @ right_N)


def project(problem: SaturatedProblem, params_P: Array) -> Array:
    """Bring the parameters to the manifold by Gauss-Newton steps of least length."""

    def step(_: Array, params_P: Array) -> Array:
        jacobian_NxP = jax.jacrev(lambda p: misfit(problem, p))(params_P)
        return params_P - _smallest_solution(jacobian_NxP, misfit(problem, params_P))

    return jax.lax.fori_loop(0, NEWTON_STEPS, step, params_P)


def velocity(problem: SaturatedProblem, params_P: Array) -> Array:
    """Return -1/4 grad tr H without its part across the manifold."""
    gradient_P = jax.grad(problem.trace)(params_P)
    jacobian_NxP = jax.jacrev(lambda p: misfit(problem, p))(params_P)
    across_P = _smallest_solution(jacobian_NxP, jacobian_NxP @ gradient_P)
    return -(gradient_P - across_P) / 4


def flow(
    problem: SaturatedProblem, params_P: Array, times: np.ndarray, steps_per_time: int
) -> Array:
    """Return the parameters at increasing times from 0, timesxP, by projected Runge-Kutta steps.

    The time is t = eta^2 k / B.
    """

    def step(params_P: Array, length: Array) -> Array:
        first = velocity(problem, params_P)
        second = velocity(problem, params_P + length / 2 * first)
        third = velocity(problem, params_P + length / 2 * second)
        fourth = velocity(problem, params_P + length * third)
        moved_P = params_P + length / 6 * (first + 2 * second + 2 * third + fourth)
        return project(problem, moved_P)

    def to_next_time(params_P: Array, span: Array) -> tuple[Array, Array]:
        length = span / steps_per_time
        params_P = jax.lax.fori_loop(0, steps_per_time, lambda _, p: step(p, length), params_P)
        return params_P, params_P

    spans = jnp.asarray(np.diff(times, prepend=0.0))
    return jax.jit(lambda params_P: jax.lax.scan(to_next_time, params_P, spans)[1])(params_P)
