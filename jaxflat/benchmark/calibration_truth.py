"""The true values for a calibration problem, by independent methods in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxflat.benchmark.calibration_problems import HEAD_SIZE, CalibrationProblem, PyTree
from jaxflat.flatness.estimate import Over
from jaxflat.flatness.trees import path_name
from jaxflat.models import rescaling

REFERENCE_DRAWS = 2**15


@dataclass(frozen=True)
class Truth:
    """The true value of an estimate, and the effective rank (tr M)^2 / tr M^2 of its matrix."""

    value: float
    rank: float

    @classmethod
    def of_matrix(cls, matrix: np.ndarray) -> "Truth":
        """Return the trace of a symmetric matrix, with its effective rank."""
        trace = float(np.trace(matrix))
        return cls(trace, trace**2 / float(np.sum(matrix**2)))


def known_truths(
    problem: CalibrationProblem, over: Over, matrices: dict[str, np.ndarray], sigma: float
) -> dict[str, Truth]:
    """Return the truth for every estimator on the problem's microbatches."""
    truths = trace_truths(problem, matrices)
    sharpness, _ = sharpness_reference(problem, problem.batches(over), matrices["H"], sigma)
    truths["average_sharpness"] = Truth(sharpness, truths["hessian_trace"].rank)
    return truths


def trace_truths(problem: CalibrationProblem, matrices: dict[str, np.ndarray]) -> dict[str, Truth]:
    """Return the truth for every trace of the matrices, and for its blocks."""
    hessian, gauss_newton = matrices["H"], matrices["G"]
    truths = {
        "hessian_trace": Truth.of_matrix(hessian),
        "hessian_trace_terms": Truth.of_matrix(hessian),
        "gauss_newton_trace": Truth.of_matrix(gauss_newton),
        "fisher_trace": Truth.of_matrix(gauss_newton),
    }
    for block, indices in block_indices(problem).items():
        part = np.ix_(indices, indices)
        truths[f"hessian_trace_terms/{block}"] = Truth.of_matrix(hessian[part])
        truths[f"fisher_trace/{block}"] = Truth.of_matrix(gauss_newton[part])
    return truths


def excess_truth(problem: CalibrationProblem) -> Truth:
    """Return the excess loss of the whole pool in nats; a loss has no effective rank."""
    with jax.enable_x64(True):
        flat_P, unravel, merged = _flat_problem(problem, problem.pool)
        excess_sum, weight = problem.excess_loss_fn(unravel(flat_P), merged)
        return Truth(float(excess_sum / weight), float("nan"))


def invariant_truth(problem: CalibrationProblem, matrices: dict[str, np.ndarray]) -> Truth:
    """Return a model's trace of T'HT, with the rescaling T for which the trace of T'GT is least.

    The moments that give T are those of the scaled eigenvectors g of G, since sum g g' = G.
    """
    with jax.enable_x64(True):
        flat_P, unravel = ravel_pytree(_in_float64(problem.params))
        values, vectors = np.linalg.eigh(matrices["G"])
        gradients_PxP = (vectors * np.sqrt(np.maximum(values, 0))).T
        moment_fn = rescaling.moment_function(HEAD_SIZE)
        moments_P = jax.lax.map(lambda g: moment_fn(unravel(g)), jnp.asarray(gradients_PxP))
        moments = jax.tree.map(lambda x: x.sum(0), moments_P)
        flattest = rescaling.flattest_rescaling(moments, unravel(flat_P))
        columns = jax.vmap(lambda e: ravel_pytree(rescaling.rescale(flattest, unravel(e)))[0])
        map_PxP = np.asarray(columns(jnp.eye(flat_P.size))).T
    return Truth.of_matrix(map_PxP.T @ matrices["H"] @ map_PxP)


def _in_float64(tree: PyTree) -> PyTree:
    def widen(x: Any) -> np.ndarray:
        return np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)

    return jax.tree.map(widen, tree)


def _flat_problem(problem: CalibrationProblem, batches: PyTree) -> tuple[Any, Callable, PyTree]:
    """Return flat parameters, their unravel function, and one merged batch, in float64."""
    flat_P, unravel = ravel_pytree(_in_float64(problem.params))
    merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _in_float64(batches))
    return flat_P, unravel, merged


def dense_matrices(problem: CalibrationProblem, batches: PyTree) -> dict[str, np.ndarray]:
    """Return H and G of the mean loss, PxP in the order of `ravel_pytree`, by differentiation.

    G = sum_i w_i sum_v p_iv s_iv s_iv' / sum_i w_i, where s_iv is the gradient of log p_iv.
    """
    with jax.enable_x64(True):
        flat_P, unravel, merged = _flat_problem(problem, batches)

        @jax.jit
        def matrices(flat_P: jax.Array) -> tuple[jax.Array, jax.Array]:
            def mean_loss(flat_P: jax.Array) -> jax.Array:
                loss_sum, weight = problem.loss_fn(unravel(flat_P), merged)
                return loss_sum / weight

            log_probs, weights = problem.log_probs_fn(unravel(flat_P), merged)
            scores = jax.jacfwd(lambda p: problem.log_probs_fn(unravel(p), merged)[0])(flat_P)
            shares_N = (jnp.exp(log_probs) * weights[..., None] / weights.sum()).reshape(-1)
            scores_NxP = scores.reshape(-1, flat_P.size)
            return jax.hessian(mean_loss)(flat_P), scores_NxP.T @ (shares_N[:, None] * scores_NxP)

        hessian, gauss_newton = matrices(flat_P)
        return {"H": np.asarray(hessian), "G": np.asarray(gauss_newton)}


def sharpness_reference(
    problem: CalibrationProblem, batches: PyTree, hessian: np.ndarray, sigma: float
) -> tuple[float, float]:
    """Return average-case sharpness and its standard error, from NumPy's normal numbers.

    It is sigma^2/2 tr H, exact, plus the mean of the rise minus u'Hu/2, which varies little.
    """
    size = len(hessian)
    noise_NxP = sigma * np.random.default_rng(0).standard_normal((REFERENCE_DRAWS, size))
    with jax.enable_x64(True):
        flat_P, unravel, merged = _flat_problem(problem, batches)

        def loss(flat_P: jax.Array) -> jax.Array:
            loss_sum, weight = problem.loss_fn(unravel(flat_P), merged)
            return loss_sum / weight

        def rise(noise_P: jax.Array) -> jax.Array:
            return (loss(flat_P + noise_P) + loss(flat_P - noise_P)) / 2 - loss(flat_P)

        rises_N = jax.jit(lambda x: jax.lax.map(rise, x, batch_size=256))(noise_NxP)
        quadratic_N = 0.5 * np.sum((noise_NxP @ hessian) * noise_NxP, axis=1)
        rest_N = np.asarray(rises_N) - quadratic_N
    exact = sigma**2 / 2 * float(np.trace(hessian))
    return exact + rest_N.mean(), rest_N.std(ddof=1) / REFERENCE_DRAWS**0.5


def block_indices(problem: CalibrationProblem) -> dict[str, np.ndarray]:
    """Return the flat indices of each block of parameters."""
    blocks: dict[str, list[np.ndarray]] = {}
    start = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(problem.params):
        block = blocks.setdefault(problem.block_of(path_name(path)), [])
        block.append(np.arange(start, start + leaf.size))
        start += leaf.size
    return {name: np.concatenate(parts) for name, parts in blocks.items()}
