"""Split batches and parameters over the devices: the device mesh and the sharding of arrays.

Code is written for the whole batch, and `jit` partitions it. The mesh's axes are Auto: with the
Explicit axes that `jax.make_mesh` gives by default, Linen's layers raise ShardingTypeError.
"""

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("sweep", "data", "model")
RUN_AXES = ("data", "model")
"""The axes along which the batch of one run is split while one program trains several runs."""

LARGE = 2**22
"""Numbers in an array of an optimizer's state that devices along "data" divide, at least."""

ACCELERATOR_PLUGINS = ("jax_plugins", "libtpu")
"""The modules through which JAX finds GPUs and TPUs."""


def set_up_devices() -> None:
    """Make each CPU core a device, up to eight; set XLA's flags for CPUs and GPUs.

    Call it before anything touches a device. A small model does not use several cores well if XLA
    splits every operation over them; splitting the batch does. On CPUs, XLA compiles our programs
    at level 1 in half the time of level 3, and they run as fast. On GPUs, atomic additions and
    kernels chosen by timing give other bits in each run; the flag set here makes XLA avoid both.
    Values in $XLA_FLAGS take precedence.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = {"xla_gpu_deterministic_ops": "true"}
    if not any(find_spec(plugin) for plugin in ACCELERATOR_PLUGINS):
        chosen["xla_backend_optimization_level"] = "1"  # it would apply to GPUs, too
    added = [f"--{name}={value}" for name, value in chosen.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *added]).strip()
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


def divide(mesh: Mesh, tree: Any) -> Any:
    """Split the largest dimension of every array that divides over all devices, inside jit."""
    shardings = jax.tree.map(lambda array: _sharding(mesh, array, AXES), tree)
    return jax.lax.with_sharding_constraint(tree, shardings)


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of each parameter: its largest dimension that divides over "model".

    Parameters without such a dimension are on every device. All are replicated along "data".
    """
    return jax.tree.map(lambda array: _sharding(mesh, array, ("model",)), tree)


def moment_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of each array of an optimizer's state.

    Devices along "data" divide arrays of at least LARGE numbers, too: each updates its part of the
    parameters, and all gather the result (ZeRO-1, Rajbhandari et al. 2020). Smaller arrays are
    placed like parameters.
    """

    def of(array: Any) -> NamedSharding:
        return _sharding(mesh, array, ("model", "data") if array.size >= LARGE else ("model",))

    return jax.tree.map(of, tree)


def _sharding(mesh: Mesh, array: Any, axes: tuple[str, ...]) -> NamedSharding:
    """Return a sharding that cuts the largest dimension that divides over the devices of `axes`.

    Without such a dimension the last axis is left out.
    """
    if not axes:
        return NamedSharding(mesh, PartitionSpec())
    number = math.prod(mesh.shape[axis] for axis in axes)
    sizes = [size if size % number == 0 else 0 for size in array.shape]
    if number == 1 or not any(sizes):
        return _sharding(mesh, array, axes[:-1])
    return NamedSharding(mesh, PartitionSpec(*(None,) * sizes.index(max(sizes)), axes))


def to_memory(tree: Any, kind: str) -> Any:
    """Return a tree whose arrays are divided as before, in another memory of their devices.

    kind: "device", or "pinned_host" for the memory of the host.
    """
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))


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
