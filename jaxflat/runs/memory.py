"""Predict the memory of training steps and invariant traces, from shapes only."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from rich import box
from rich.table import Column, Table

from jaxflat.config import Config, functions
from jaxflat.languages.batches import Source, masked_batch
from jaxflat.models.rescaling import moment_function
from jaxflat.runs import builders, trajectory
from jaxflat.runs.languages import language_kind, make_language
from jaxflat.runs.measure_flatness import is_ours
from jaxflat.runs.trajectory import Phase

GIB = 2**30


def table(points: Iterable[tuple[str, Config]]) -> Table:
    """Return a table with a row for each point: GiB for the whole batch on one device.

    A row counts all slots of the point's program. The last column is for this machine's devices.
    """
    columns = (
        Column("point", overflow="fold"),
        "parameters",
        "parameters + optimizer",
        "gradient",
        "activations",
        "batch",
        "step, each device",
        "invariant traces",
    )
    memory_table = Table(*columns, box=box.SIMPLE_HEAD, title="GiB of memory, by shape")
    for name, config in points:
        row = [name]
        if config.phase_order:
            row += [f"{builders.num_params(config):,}"]
        if _is_trained(config):
            sizes = step_bytes(config)
            parts = [sizes[key] for key in ("state", "gradient", "activations", "batch")]
            parts += [bytes_on_each_device(config, sizes), moment_bytes(config)]
            row += [f"{size / GIB:.3f}" for size in parts]
        memory_table.add_row(*row)
    return memory_table


def _is_trained(config: Config) -> bool:
    language = config.language
    return bool(config.phase_order) and language_kind(language).is_prepared(language)


def step_bytes(config: Config) -> dict[str, int]:
    """Return the bytes of a training step with the whole batch on one device, by `jax.eval_shape`.

    They are those of the largest phase, and all slots of the point's program count. state:
    parameters and optimizer state. gradient: a second one is the sum over microbatches.
    activations: values that the forward pass of one microbatch stores for the backward pass, and
    twice those of a block: its values and their gradients, while the backward pass is there. batch.
    Adversary and flatness penalty are not counted. The step of every phase is traced as a whole,
    too. The sum without the batch is within 20% of XLA's own plan, see tests/configs/test_scales.
    """
    return _largest_phase(config)[1]


def _largest_phase(config: Config) -> tuple[Phase, dict[str, int]]:
    phases = trajectory.phases(config)
    sizes = [_step_bytes(config, phase) for phase in phases]
    return max(zip(phases, sizes, strict=True), key=lambda pair: sum(pair[1].values()))


def _step_bytes(config: Config, phase: Phase) -> dict[str, int]:
    model = builders.make_trained_model(config)
    params = jax.eval_shape(lambda: builders.init_params(config))
    state = jax.eval_shape(partial(builders.init_state, phase=phase), params)
    language, masking = make_language(config.language), config.language.masking
    settings, strength = phase.settings, phase.settings.flatness_penalty.strength or None
    key = jax.eval_shape(lambda: jax.random.key(0))

    def examples(number: int) -> Any:
        how = {"targets": settings.targets, "masking": masking}
        return jax.eval_shape(partial(masked_batch, batch_size=number, **how), language, key)

    steps = builders.train_steps(model, settings, masking, builders.make_mesh(config))
    schedule = builders.schedule(settings, anneal=False)
    span = phase.start, phase.stop
    jax.eval_shape(steps, state, Source(language), key, schedule, *span, strength)
    batch = examples(settings.batch_size)
    microbatch = examples(settings.microbatch_size or settings.batch_size)
    stored, block = _activation_bytes(config, settings, params, microbatch)
    num_gradients = 2 if settings.microbatch_size else 1
    num_bytes = {
        "state": _num_bytes(state),
        "gradient": num_gradients * _num_bytes(params),
        "activations": stored + 2 * block,
        "batch": _num_bytes(batch),
    }
    slots = config.training.together
    num_bytes = {name: slots * size for name, size in num_bytes.items()}
    copies = 1 if slots == 1 else 2  # the state of each slot, and the stacked states
    return num_bytes | {"state": copies * num_bytes["state"]}


def _activation_bytes(config: Config, settings: Config, params: Any, batch: Any) -> tuple[int, int]:
    """Return the bytes that the backward pass finds stored, and those of one block."""

    def stored(model: Any) -> int:
        loss_fn = builders.phase_loss_fn(model, settings)
        pullback = jax.eval_shape(
            lambda p, b: jax.vjp(lambda q: loss_fn(q, b)[0], p)[1], params, batch
        )
        return max(_num_bytes(pullback) - _num_bytes(params), 0)  # which it refers to

    model = builders.make_trained_model(config)
    own = config.model.name in functions.sections_in(config.model)
    blocks = stored(model if own else model.clone(remat=False))
    return stored(model), blocks // config.model.num_layers


def bytes_on_each_device(config: Config, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a step on each device of this machine's mesh, from `step_bytes`."""
    mesh = builders.make_mesh(config)
    num_model, num_batch = mesh.shape["model"], mesh.shape["model"] * mesh.shape["data"]
    params = (sizes["state"] + sizes["gradient"]) // num_model
    return params + (sizes["activations"] + sizes["batch"]) // num_batch


def advice(name: str, config: Config) -> str:
    """Return a line that says what to set if a point's step does not fit, "" if it fits.

    Accelerators say how much memory they have. CPU devices share the machine's.
    """
    if not _is_trained(config):
        return ""
    phase, sizes = _largest_phase(config)
    mesh, settings = builders.make_mesh(config), phase.settings
    available, needed = _device_bytes(mesh), bytes_on_each_device(config, sizes)
    if needed <= available:
        return ""
    problem = (
        f"Point {name} needs {needed / GIB:.1f} GiB on each device for a training step, and there "
        f"are {available / GIB:.1f}."
    )
    batch, num_devices = settings.batch_size, mesh.shape["data"] * mesh.shape["model"]
    size = settings.microbatch_size or batch
    # With microbatches there are two gradients.
    gradients = sizes["gradient"] * (1 if settings.microbatch_size else 2)
    params = (sizes["state"] + gradients) / mesh.shape["model"]
    batch_room = (available - params) * num_devices - sizes["batch"]
    smaller = [
        n
        for n in range(num_devices, size, num_devices)
        if batch % n == 0 and sizes["activations"] * n / size <= batch_room
    ]
    if smaller:
        return f"{problem} Set phases.{phase.name}.microbatch_size={smaller[-1]}."
    if params < available and not config.training.remat:
        return f"{problem} Set training.remat=True and phases.{phase.name}.microbatch_size."
    return f"{problem} Set mesh.model to the number of devices, or use more of them."


def _device_bytes(mesh: Mesh) -> float:
    if statistics := mesh.local_devices[0].memory_stats():
        return statistics["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(mesh.local_devices)


def moment_bytes(config: Config) -> int:
    """Return the bytes that `flatness.trace.fisher_moments` holds for the largest invariant trace.

    0 without invariant traces. Attention has 3 width^2 head_size products a layer.
    """
    if not (config.flatness.invariant and is_ours(config)):
        return 0
    larger = config.flatness.embedded_width
    model = builders.make_largest_model(config) if larger else builders.make_model(config)
    params = jax.eval_shape(builders.initializer(model, None), jax.random.key(0))
    moments = jax.eval_shape(moment_function(config.model.head_size), params)
    return 3 * _num_bytes(moments)  # two groups, and the products of one gradient


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
