"""The machine's peak rate of matrix products."""

import functools

import jax
import jax.numpy as jnp

from jaxflat.benchmark.timing import Figure, Stopwatch, summarize
from jaxflat.distributed import sharding

CPU_SIZE, ACCELERATOR_SIZE = 2048, 8192


def measure_matmul(repeats: int, seconds: float) -> Figure:
    """Return the rate of square float32 matrix products, at the backend's default precision.

    One device or all of them share the rows; the faster case counts. One compiled call chains the
    products, each on the result of the last.
    """
    size = CPU_SIZE if jax.default_backend() == "cpu" else ACCELERATOR_SIZE
    figures = [
        _measure_over(num_devices, size, repeats, seconds)
        for num_devices in sorted({1, jax.device_count()})
    ]
    return max(figures, key=lambda figure: figure.max)


def _measure_over(num_devices: int, size: int, repeats: int, seconds: float) -> Figure:
    mesh = sharding.make_mesh(num_devices)
    matrix_NxN = jax.random.normal(jax.random.key(0), (size, size)) * size**-0.5
    rows_NxN = jax.jit(functools.partial(sharding.shard_examples, mesh))(matrix_NxN)
    factor_NxN = sharding.replicate(mesh, matrix_NxN)

    @jax.jit
    def products(rows_NxN: jax.Array, factor_NxN: jax.Array, num_times: int) -> jax.Array:
        return jax.lax.fori_loop(0, num_times, lambda _, x: jnp.matmul(x, factor_NxN), rows_NxN)

    watch = Stopwatch(lambda n: products(rows_NxN, factor_NxN, n), seconds)
    rates = [2 * size**3 / watch.seconds() / 1e9 for _ in range(repeats)]
    return summarize(rates, "GFLOP/s")
