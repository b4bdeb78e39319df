"""Split batches and parameters over the devices: the device mesh and the sharding of arrays.

Code is written for the whole batch, and `jit` partitions it. The mesh's axes are Auto: with the
Explicit axes that `jax.make_mesh` gives by default, Linen's layers raise ShardingTypeError.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("sweep", "data", "model")
RUN_AXES = ("data", "model")
"""The axes along which the batch of one run is split while one program trains several runs."""


def set_up_devices() -> None:
    """Make each CPU core a device, up to eight, and make GPUs give the same bits in each run.

    Call it before anything touches a device. A small model does not use several cores well if XLA
    splits every operation over them; splitting the batch does. On GPUs, atomic additions and
    kernels chosen by timing give other bits in each run; the flag set here makes XLA avoid both.
    Values in $XLA_FLAGS take precedence.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if "xla_force_host_platform_device_count" not in flags:
        jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 8))


def make_mesh(
    num_data: int, num_model: int = 1, num_sweep: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a mesh of the first devices, with axes "sweep", "data" and "model".

    Runs that train in one program are split along "sweep", examples along all three axes. Unless
    `devices` are given, the mesh uses the devices of all processes.

    Raises ValueError if there are fewer devices.
    """
    devices, size = devices or jax.devices(), num_sweep * num_data * num_model
    if not 1 <= size <= len(devices):
        raise ValueError(
            f"mesh.data={num_data} times mesh.model={num_model}, but there are {len(devices)} "
            "devices; mesh.data=-1 uses as many as divide the batches evenly"
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    shape = (num_sweep, num_data, num_model)
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices[:size])


def shard_examples(mesh: Mesh, batch: Any, axis: int = 0, over: tuple[str, ...] = AXES) -> Any:
    """Split `axis` of every array in `batch` over the devices, inside or outside jit.

    over: the axes of the mesh to split along; a run's training batch uses RUN_AXES.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, over))
    return jax.lax.with_sharding_constraint(batch, jax.tree.map(lambda _: sharding, batch))


def shard_params(mesh: Mesh, tree: Any) -> Any:
    """Put parameters, or state of the same shapes, on the devices of `param_shardings`."""
    return jax.device_put(tree, param_shardings(mesh, tree))


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of each parameter: its largest dimension that divides over "model".

    Parameters without such a dimension are on every device. All are replicated along "data".
    """
    num_model = mesh.shape["model"]

    def of(array: Any) -> NamedSharding:
        sizes = [size if size % num_model == 0 else 0 for size in array.shape]
        if num_model == 1 or not any(sizes):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*(None,) * sizes.index(max(sizes)), "model"))

    return jax.tree.map(of, tree)


def to_host(tree: Any) -> Any:
    """Return a tree of arrays as numpy arrays, once the programs that compute them have ended.

    A transfer that waits for a running program takes a thread of XLA's CPU client. With as many
    threads as devices (JAX 0.10), the program's devices can then wait for each other in a
    collective until XLA ends the process. Wait first, and nothing is in flight during the transfer.
    """
    return jax.tree.map(np.asarray, jax.block_until_ready(tree))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put a copy of every array on every device of the mesh, inside or outside jit."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: sharding, tree))
