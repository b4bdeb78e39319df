"""The device mesh, and where arrays live on it.

One global view: code is written for the whole batch and `jit` partitions it. The mesh's axes are
Auto: with the Explicit ones that `jax.make_mesh` gives by default, Linen's layers raise
ShardingTypeError.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("sweep", "data", "model")
OF_ONE_RUN = ("data", "model")
"""The axes along which a run's batch is split while others are trained with it."""


def set_up_devices() -> None:
    """Make each CPU core a device, up to eight, and GPUs repeat themselves to the bit.

    Call it before anything touches a device. Small models leave most of a core idle when every
    operation is split over all cores; a part of the batch for each core does not. On GPUs, sums by
    atomic additions and kernels that are chosen by a stopwatch differ from run to run: XLA does
    without. What $XLA_FLAGS says of either counts.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if "xla_force_host_platform_device_count" not in flags:
        jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 8))


def make_mesh(
    num_data: int, num_model: int = 1, num_sweep: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a mesh of as many of the first devices, along "sweep", "data" and "model".

    Runs that are trained at once are shared out along "sweep", examples along all three. The
    devices are of all processes, unless `devices` are given.

    Raises ValueError where there are fewer.
    """
    devices, size = devices or jax.devices(), num_sweep * num_data * num_model
    if not 1 <= size <= len(devices):
        raise ValueError(
            f"mesh.data={num_data} times mesh.model={num_model}, but there are {len(devices)} "
            "devices; mesh.data=-1 is as many as share the batches evenly"
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    shape = (num_sweep, num_data, num_model)
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices[:size])


def shard_examples(mesh: Mesh, batch: Any, axis: int = 0, over: tuple[str, ...] = AXES) -> Any:
    """Split `axis` of every array in `batch` over the devices, inside or outside jit.

    `over`: along which of the mesh's axes; a run's training batch has OF_ONE_RUN.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, over))
    return jax.lax.with_sharding_constraint(batch, jax.tree.map(lambda _: sharding, batch))


def place(mesh: Mesh, tree: Any) -> Any:
    """Put parameters and what is shaped like them where `placement` says."""
    return jax.device_put(tree, placement(mesh, tree))


def placement(mesh: Mesh, tree: Any) -> Any:
    """Return where each array of a tree lives: the largest dimension that divides over "model".

    Arrays of which none does are on every device, as all are along "data".
    """
    num_model = mesh.shape["model"]

    def of(array: Any) -> NamedSharding:
        sizes = [size if size % num_model == 0 else 0 for size in array.shape]
        if num_model == 1 or not any(sizes):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*(None,) * sizes.index(max(sizes)), "model"))

    return jax.tree.map(of, tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put a copy of every array on every device of the mesh, inside or outside jit."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: sharding, tree))
