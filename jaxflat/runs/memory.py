"""How much memory a point's training step needs, from shapes alone; nothing is allocated."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from rich import box
from rich.table import Column, Table

from jaxflat.config import Config
from jaxflat.languages.batches import Source, masked_batch
from jaxflat.runs import experiment, trajectory
from jaxflat.runs.languages import kind_of, make_language

GIB = 2**30


def table(points: Iterable[tuple[str, Config]]) -> Table:
    """Return a table with a row for each point, in GiB for the whole batch on one device.

    A row counts all points that share a program.
    """
    columns = (
        Column("point", overflow="fold"),
        "parameters",
        "parameters + optimizer",
        "gradient",
        "kept for backward",
    )
    made = Table(*columns, "batch", box=box.SIMPLE_HEAD, title="GiB of memory, by shape")
    for name, config in points:
        row = [name]
        if config.phase_order:
            row += [f"{experiment.num_params(config):,}"]
        if config.phase_order and kind_of(config.language).is_prepared(config.language):
            sizes = step_bytes(config)
            row += [
                f"{sizes[key] / GIB:.3f}" for key in ("state", "gradient", "residuals", "batch")
            ]
        made.add_row(*row)
    return made


def step_bytes(config: Config) -> dict[str, int]:
    """Return the bytes that the first phase's training step holds, by `jax.eval_shape`.

    They count all points that share a program. state: parameters and optimizer; gradient;
    residuals: what the forward pass keeps for the backward pass (without the compiler's savings);
    batch. The whole step is traced as well.
    """
    phase, model = trajectory.phases(config)[0], experiment.make_model(config)
    loss_fn, _ = experiment.loss_functions(model)
    params = jax.eval_shape(lambda: experiment.init_params(config))
    state = jax.eval_shape(partial(experiment.init_state, phase=phase), params)
    language, masking = make_language(config.language), config.language.masking
    settings = phase.settings
    sample = partial(
        masked_batch, batch_size=settings.batch_size, targets=settings.targets, masking=masking
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(sample, language, key)
    pullback = jax.eval_shape(lambda p, b: jax.vjp(lambda q: loss_fn(q, b)[0], p)[1], params, batch)
    mesh = experiment.make_mesh(config)
    steps = experiment.train_steps(model, settings, masking, mesh)
    schedule = experiment.schedule(settings, anneal=False)
    jax.eval_shape(steps, state, Source(language), key, schedule, phase.start, phase.stop)
    parts = {"state": state, "gradient": params, "residuals": pullback, "batch": batch}
    num_bytes = {name: config.training.together * _num_bytes(tree) for name, tree in parts.items()}
    copies = 1 if config.training.together == 1 else 2  # states of lanes, and stacked ones
    return num_bytes | {"state": copies * num_bytes["state"]}


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
