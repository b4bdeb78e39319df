"""Predict the memory of training steps and invariant traces, from shapes only."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from rich import box
from rich.table import Column, Table

from jaxflat.config import Config
from jaxflat.languages.batches import Source, masked_batch
from jaxflat.models.rescaling import moment_function
from jaxflat.runs import builders, trajectory
from jaxflat.runs.languages import language_kind, make_language
from jaxflat.runs.measure_flatness import is_ours
from jaxflat.runs.trajectory import Phase

GIB = 2**30


def table(points: Iterable[tuple[str, Config]]) -> Table:
    """Return a table with a row for each point, in GiB for the whole batch on one device.

    A row counts all slots of the point's program.
    """
    columns = (
        Column("point", overflow="fold"),
        "parameters",
        "parameters + optimizer",
        "gradient",
        "kept for backward",
    )
    others = "batch", "invariant traces"
    memory_table = Table(*columns, *others, box=box.SIMPLE_HEAD, title="GiB of memory, by shape")
    for name, config in points:
        row = [name]
        if config.phase_order:
            row += [f"{builders.num_params(config):,}"]
        if config.phase_order and language_kind(config.language).is_prepared(config.language):
            sizes = step_bytes(config)
            sizes["moments"] = moment_bytes(config)
            shown = "state", "gradient", "residuals", "batch", "moments"
            row += [f"{sizes[key] / GIB:.3f}" for key in shown]
        memory_table.add_row(*row)
    return memory_table


def step_bytes(config: Config) -> dict[str, int]:
    """Return the bytes that a training step holds, by `jax.eval_shape`, in the largest phase.

    All slots of the point's program count. state: parameters and optimizer state; gradient;
    residuals: values that the forward pass stores for the backward pass, before compiler
    optimizations, without adversary and flatness penalty; batch. The step of every phase is traced
    as a whole, too.
    """
    sizes = (_step_bytes(config, phase) for phase in trajectory.phases(config))
    return max(sizes, key=lambda parts: sum(parts.values()))


def _step_bytes(config: Config, phase: Phase) -> dict[str, int]:
    model = builders.make_model(config)
    params = jax.eval_shape(lambda: builders.init_params(config))
    state = jax.eval_shape(partial(builders.init_state, phase=phase), params)
    language, masking = make_language(config.language), config.language.masking
    settings, strength = phase.settings, phase.settings.flatness_penalty.strength or None
    loss_fn = builders.phase_loss_fn(model, settings)
    sample = partial(
        masked_batch, batch_size=settings.batch_size, targets=settings.targets, masking=masking
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(sample, language, key)
    pullback = jax.eval_shape(lambda p, b: jax.vjp(lambda q: loss_fn(q, b)[0], p)[1], params, batch)
    mesh = builders.make_mesh(config)
    steps = builders.train_steps(model, settings, masking, mesh)
    schedule = builders.schedule(settings, anneal=False)
    span = phase.start, phase.stop
    jax.eval_shape(steps, state, Source(language), key, schedule, *span, strength)
    parts = {"state": state, "gradient": params, "residuals": pullback, "batch": batch}
    num_bytes = {name: config.training.together * _num_bytes(tree) for name, tree in parts.items()}
    copies = (
        1 if config.training.together == 1 else 2
    )  # the state of each slot, and the stacked states
    return num_bytes | {"state": copies * num_bytes["state"]}


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
