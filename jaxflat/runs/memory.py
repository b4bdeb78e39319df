"""Predict the memory of training steps and invariant traces, from shapes only."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from rich import box
from rich.table import Column, Table

from jaxflat.config import Config
from jaxflat.config.sweeps import SEEDS
from jaxflat.config.validation import NEED_WHOLE_BATCH
from jaxflat.languages.batches import Source, sampled_batch
from jaxflat.models.rescaling import moment_function
from jaxflat.runs import builders, trajectory
from jaxflat.runs.languages import language_kind, make_language
from jaxflat.runs.trajectory import Phase

GIB = 2**30


@dataclass(frozen=True)
class StepMemory:
    """The bytes of one slot's training step with the whole batch on one device, from shapes.

    They are those of the point's largest phase. state: parameters and optimizer state. part: what
    a device of this machine's mesh holds of it. gradient: with microbatches a second one is their
    sum. activations: values that the forward pass of one microbatch stores for the backward pass,
    and twice those of a block: its values and their gradients, while the backward pass is there.
    Adversary and flatness penalty are not counted.
    """

    phase: Phase
    state: int
    part: int
    gradient: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        return self.state + self.gradient + self.activations + self.batch

    def on_each_device(self, config: Config) -> float:
        """Return the bytes on each device of this machine's mesh, for all slots of the program.

        Devices along "sweep" share the slots of a step. All hold each slot's state after it.
        """
        slots, mesh = config.training.together, builders.make_mesh(config).shape
        kept = slots * self.part if slots > 1 else 0
        examples = (self.activations + self.batch) / mesh["data"]
        shared = (self.gradient + examples) / mesh["model"]
        return kept + slots * (self.part + shared) / mesh["sweep"]


def step_memory(config: Config) -> StepMemory | None:
    """Return the memory of a point's training step; None without training or its language's data.

    The step of every phase is traced as a whole, too.
    """
    if not config.phase_order or not language_kind(config.language).is_prepared(config.language):
        return None
    found = [_step_memory(config, phase) for phase in trajectory.phases(config)]
    return max(found, key=lambda one: one.total)


def step_memories(configs: Sequence[Config]) -> list[StepMemory | None]:
    """Return `step_memory` of each point; points that differ only in seeds share a trace."""
    found: dict[str, StepMemory | None] = {}
    shapes = [_without_seeds(config) for config in configs]
    for shape, config in zip(shapes, configs, strict=True):
        if shape not in found:
            found[shape] = step_memory(config)
    return [found[shape] for shape in shapes]


def _without_seeds(config: Config) -> str:
    fields = json.loads(config.to_json())
    return json.dumps({key: fields[key] for key in fields if key not in SEEDS}, sort_keys=True)


def table(points: Sequence[tuple[str, Config, StepMemory | None]]) -> Table:
    """Return a table with a row for each point: GiB of one slot, its whole batch on one device.

    The last but one column is for this machine's devices, and counts all slots of the program.
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
    for name, config, step in points:
        row = [name]
        if config.phase_order:
            row += [f"{builders.num_params(config):,}"]
        if step:
            parts = [step.state, step.gradient, step.activations, step.batch]
            parts += [step.on_each_device(config), moment_bytes(config)]
            row += [f"{size / GIB:.3f}" for size in parts]
        memory_table.add_row(*row)
    return memory_table


def _step_memory(config: Config, phase: Phase) -> StepMemory:
    model = builders.make_trained_model(config)
    params = jax.eval_shape(lambda: builders.init_params(config))
    state = jax.eval_shape(partial(builders.init_state, phase=phase), params)
    language, masking = make_language(config.language), config.language.masking
    settings, strength = phase.settings, phase.settings.flatness_penalty.strength or None
    key = jax.eval_shape(lambda: jax.random.key(0))

    def examples(number: int) -> Any:
        how = {"targets": settings.targets, "masking": masking}
        return jax.eval_shape(partial(sampled_batch, batch_size=number, **how), language, key)

    mesh = builders.make_mesh(config)
    steps = builders.train_steps(config, settings, mesh)
    schedule = builders.schedule(settings, anneal=False)
    span = phase.start, phase.stop
    jax.eval_shape(steps, state, Source(language), key, schedule, *span, strength)

    def stored(model: Any, batch: Any) -> int:
        loss_fn = builders.phase_loss_fn(model, settings)
        return _num_bytes(
            jax.eval_shape(lambda p, b: jax.vjp(lambda q: loss_fn(q, b)[0], p)[1], params, batch)
        )

    def of_sentence(model: Any) -> int:  # without the parameters, which are stored once
        return stored(model, examples(2)) - stored(model, examples(1))

    size = settings.microbatch_size or settings.batch_size  # CPUs take smaller parts
    kept = block = of_sentence(model)
    if builders.is_ours(config) and config.training.remat:
        block = of_sentence(model.clone(remat=False))
    activations = size * (kept + 2 * block / config.model.num_layers)
    if config.training.compute_dtype != "float32":
        activations += _num_bytes(params) / 2  # the kernels in 16 bits
    num_gradients = 2 if size < settings.batch_size else 1
    return StepMemory(
        phase,
        _num_bytes(state),
        _part_bytes(state, builders.state_shardings(mesh, state)),
        num_gradients * _num_bytes(params),
        round(activations),
        _num_bytes(examples(settings.batch_size)),
    )


def advice(config: Config, step: StepMemory) -> str:
    """Return a sentence that says what to set if a point's step does not fit, "" if it fits.

    Accelerators say how much memory they have. CPU devices share the machine's.
    """
    mesh, phase, settings = builders.make_mesh(config), step.phase, step.phase.settings
    available = _device_bytes(mesh)
    if step.on_each_device(config) <= available:
        return ""
    num_devices = mesh.shape["data"] * mesh.shape["model"]
    size = settings.microbatch_size or settings.batch_size
    penalty = settings.flatness_penalty
    needs_whole = penalty.strength and penalty.measure in NEED_WHOLE_BATCH
    batches = {settings.batch_size}
    if settings.projection.checkpoint_steps:
        batches.add(settings.projection.batch_size)

    def fits(size_then: int) -> bool:
        smaller = replace(
            step,
            gradient=step.gradient * (1 if size < settings.batch_size else 2),
            activations=round(step.activations * size_then / size),
        )
        return smaller.on_each_device(config) <= available

    smaller = [
        n
        for n in range(num_devices, size, num_devices)
        if all(whole % n == 0 for whole in batches) and fits(n)
    ]
    if smaller and not needs_whole:
        return f"Set phases.{phase.name}.microbatch_size={smaller[-1]}."
    if fits(0) and not config.training.remat and builders.is_ours(config):
        return "Set training.remat=True, then see this table again."
    return "Set mesh.model to the number of devices, or use more of them."


def _device_bytes(mesh: Mesh) -> float:
    if statistics := mesh.local_devices[0].memory_stats():
        return statistics["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(mesh.local_devices)


def moment_bytes(config: Config) -> int:
    """Return the bytes that `flatness.trace.fisher_moments` holds for the largest invariant trace.

    0 without invariant traces. Attention has 3 width^2 head_size products a layer.
    """
    if not (config.flatness.invariant and builders.is_ours(config)):
        return 0
    larger = config.flatness.embedded_width
    model = builders.make_largest_model(config) if larger else builders.make_model(config)
    params = jax.eval_shape(builders.initializer(model, None), jax.random.key(0))
    moments = jax.eval_shape(moment_function(config.model.head_size), params)
    return 3 * _num_bytes(moments)  # two groups, and the products of one gradient


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part_bytes(tree: Any, shardings: Any) -> int:
    """Return the bytes of a tree on one device."""

    def of(leaf: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of, tree, shardings)))
