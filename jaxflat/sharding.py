"""The device mesh, and where arrays live on it.

One global view: code is written for the whole batch and `jit` partitions it. The mesh's axes are
Auto: with the Explicit ones that `jax.make_mesh` gives by default, Linen's layers raise
ShardingTypeError.
"""

import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("sweep", "data", "model")


def use_cpu_cores() -> None:
    """Make each CPU core a device, up to eight; call it before anything touches a device.

    Small models leave most of a core idle when every operation is split over all cores; a part of
    the batch for each core does not. Without effect where there is a GPU or TPU.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 8))


def make_mesh(num_data: int) -> Mesh:
    """Return a mesh of the first `num_data` devices along "data".

    Raises ValueError where there are fewer.
    """
    devices = jax.devices()
    if not 1 <= num_data <= len(devices):
        raise ValueError(
            f"mesh.data={num_data}, but there are {len(devices)} devices; "
            f"give 1 to {len(devices)}, or -1 for as many as share the batches evenly"
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((1, num_data, 1), AXES, axis_types=axis_types, devices=devices[:num_data])


def shard_examples(mesh: Mesh, batch: Any, axis: int = 0) -> Any:
    """Split `axis` of every array in `batch` over the mesh's data axis, inside or outside jit."""
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))
    return jax.lax.with_sharding_constraint(batch, jax.tree.map(lambda _: sharding, batch))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put a copy of every array on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
