"""One estimate for each of many seeds, split over the devices."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxflat.benchmark.calibration_problems import CalibrationProblem, PyTree
from jaxflat.distributed import sharding
from jaxflat.flatness.estimate import Estimate, Over

NUM_SAMPLES = 64
SIDE_BY_SIDE = 50  # seeds in one step of a loop


def on_each_seed(
    problem: CalibrationProblem, over: Over, estimator: Callable[[PyTree, jax.Array], Any]
) -> Callable[[jax.Array], Any]:
    """Return a function that maps estimator(microbatches, key) over keys."""

    def one_seed(key: jax.Array) -> Any:
        data_key, key = jax.random.split(key)
        batches = problem.batches(over)
        if over != "probes":
            size = jax.tree.leaves(batches)[0].shape[0]
            chosen = jax.random.randint(data_key, (NUM_SAMPLES,), 0, size)
            batches = jax.tree.map(lambda x: x[chosen], batches)
        return estimator(batches, key)

    return over_seeds(one_seed)


def over_seeds(one_seed: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Return a function that maps one_seed over keys, split over the devices, to NumPy arrays."""

    def part(keys: jax.Array) -> Any:
        return jax.lax.map(one_seed, keys, batch_size=min(SIDE_BY_SIDE, len(keys)))

    def run(keys_S: jax.Array) -> Any:
        fair = (n for n in range(1, jax.device_count() + 1) if len(keys_S) % n == 0)
        mesh = sharding.make_mesh(max(fair))
        return jax.device_get(compiled(mesh)(keys_S))

    @cache
    def compiled(mesh: jax.sharding.Mesh) -> Any:
        data = P("data")
        return jax.jit(
            jax.shard_map(part, mesh=mesh, in_specs=data, out_specs=data, check_vma=False)
        )

    return run


def seed_keys(num_seeds: int, stream: int = 0) -> jax.Array:
    """Return a key for each seed."""
    return jax.random.split(jax.random.key(stream), num_seeds)


def spread(estimate: Estimate) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return the mean, both ends of the interval, and the number of samples."""
    low, high = estimate.interval()
    return np.asarray(estimate.mean), np.asarray(low), np.asarray(high), estimate.num_samples
