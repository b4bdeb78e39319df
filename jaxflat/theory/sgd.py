"""Many independent chains of SGD on a problem with known probabilities of all answers."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.theory.saturated import SaturatedProblem


def drawn_shares(problem: SaturatedProblem, key: Array, batch_size: int) -> Array:
    """Return the share of each (question, answer) in a batch of independent draws, CxV."""
    edges_N = jnp.cumsum(problem.joint_CxV.reshape(-1))
    edges_N = edges_N / edges_N[-1]
    uniforms_Bx1 = jax.random.uniform(key, (batch_size, 1), edges_N.dtype)
    below_BxN = (uniforms_Bx1 < edges_N[None]).astype(edges_N.dtype)
    shares_N = jnp.diff(below_BxN.mean(axis=0), prepend=0)
    return shares_N.reshape(problem.joint_CxV.shape)


def run_chains(
    problem: SaturatedProblem,
    start_NxP: Array,
    key: Array,
    *,
    learning_rate: float,
    batch_size: int,
    num_steps: int,
    num_records: int = 1,
    exact: bool = False,
) -> Array:
    """Run SGD; return the parameters of every chain, RxNxP, at `num_records` times.

    Records are num_steps apart. Each step draws batch_size questions with one answer each. With
    `exact` it takes all of them, weighted by their probability, so there is no noise.
    """

    def gradient(params_P: Array, shares_CxV: Array) -> Array:
        return jax.grad(lambda p: -jnp.sum(shares_CxV * problem.log_probs(p)))(params_P)

    def gradients(params_NxP: Array, index: Array) -> Array:
        if exact:
            return jax.vmap(lambda p: gradient(p, problem.joint_CxV))(params_NxP)
        keys = jax.random.split(jax.random.fold_in(key, index), len(params_NxP))
        shares = jax.vmap(partial(drawn_shares, problem, batch_size=batch_size))(keys)
        return jax.vmap(gradient)(params_NxP, shares)

    def to_next_record(params_NxP: Array, record: Array) -> tuple[Array, Array]:
        def step(i: Array, params_NxP: Array) -> Array:
            index = record * num_steps + i
            return params_NxP - learning_rate * gradients(params_NxP, index)

        params_NxP = jax.lax.fori_loop(0, num_steps, step, params_NxP)
        return params_NxP, params_NxP

    def all_records(start_NxP: Array) -> Array:
        return jax.lax.scan(to_next_record, start_NxP, jnp.arange(num_records))[1]

    return jax.jit(all_records)(start_NxP)
