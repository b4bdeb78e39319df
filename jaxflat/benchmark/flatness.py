"""What one more probe of the curvature costs, in gradients of the same microbatches.

Both sides walk over the same few microbatches inside one compiled call, on the run's own mesh. A
gradient is the one a training step takes (`training.step.mean_gradient`). A probe's cost is
marginal: the loss is linearised once in every microbatch however many probes follow, so it is the
difference between three passes of `flatness.probes_per_pass` probes and one pass, divided by how
many more probes that is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat import experiment, sharding
from jaxflat.benchmark.timing import Figure, Stopwatch, repeated, summarize
from jaxflat.benchmark.workload import Shape, resolved_config
from jaxflat.flatness import (
    fisher_trace_terms,
    gauss_newton_trace,
    hessian_trace_terms,
    hessian_vector_product,
)
from jaxflat.models.blocks import is_stacked
from jaxflat.stages.flatness import labelled_losses, sample_microbatches
from jaxflat.training.step import mean_gradient

MORE_PASSES = 2


def measure_flatness(shape: Shape, repeats: int, seconds: float) -> dict[str, Figure]:
    """Return each probe's cost, and the memory of a Hessian-vector product, in gradients.

    Times are taken side by side: every repeat times all functions in turn and gives one ratio.
    """
    config = resolved_config(shape)
    mesh, settings = experiment.make_mesh(config), config.flatness
    loss_fn, log_probs_fn = labelled_losses(experiment.make_model(config), settings.labels)
    params = sharding.replicate(mesh, experiment.init_params(config))
    batches = sample_microbatches(config, jax.random.key(0))
    num_shards = mesh.shape["data"] if jax.default_backend() == "cpu" else 1
    gradient_fn = jax.jit(partial(mean_gradients, loss_fn, num_shards))
    gradient = gradient_fn.lower(params, batches).compile()
    measures = _measures(loss_fn, log_probs_fn, params, batches, settings.probes_per_pass)
    num_first = settings.probes_per_pass
    num_more = MORE_PASSES * num_first

    def stopwatch(function: Callable[[], Any]) -> Stopwatch:
        return Stopwatch(partial(repeated, function), seconds)

    gradient_watch = stopwatch(lambda: gradient(params, batches))
    watches = {
        name: [stopwatch(partial(measure, count)) for count in (num_first, num_first + num_more)]
        for name, measure in measures.items()
    }
    costs: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats):
        gradient_seconds = gradient_watch.seconds()
        for name, (first, more) in watches.items():
            more_seconds = (more.seconds() - first.seconds()) / num_more
            costs[name].append(more_seconds / gradient_seconds)
    figures = {
        f"flatness/{name}_in_gradients": summarize(ratios, "gradients")
        for name, ratios in costs.items()
    }
    memory = probe_memory(loss_fn, gradient, params, batches)
    if memory is not None:
        name = "flatness/probe_memory_in_gradients"
        figures[name] = summarize([memory], "gradients")
    return figures


def mean_gradients(loss_fn: Callable[..., Any], num_shards: int, params: Any, batches: Any) -> Any:
    """Return the sum over microbatches of the mean loss's gradient."""

    def add_microbatch(total: Any, batch: Any) -> tuple[Any, None]:
        _, gradient = mean_gradient(loss_fn, params, batch, num_shards)
        return jax.tree.map(jnp.add, total, gradient), None

    total, _ = jax.lax.scan(add_microbatch, jax.tree.map(jnp.zeros_like, params), batches)
    return total


def probe_memory(
    loss_fn: Callable[..., Any], gradient: jax.stages.Compiled, params: Any, batches: Any
) -> float | None:
    """Return the working memory of one Hessian-vector product over that of one gradient.

    Working memory is what the compiler plans beyond arguments and results, on one device
    (`memory_analysis().temp_size_in_bytes`); None where the backend does not tell.
    """
    product = hessian_vector_product.lower(loss_fn, params, batches, params).compile()
    planned = [product.memory_analysis(), gradient.memory_analysis()]
    sizes = [getattr(plan, "temp_size_in_bytes", 0) for plan in planned]
    return sizes[0] / sizes[1] if all(sizes) else None


def _measures(
    loss_fn: Callable[..., Any],
    log_probs_fn: Callable[..., Any],
    params: Any,
    batches: Any,
    per_pass: int,
) -> dict[str, Callable[[int], Any]]:
    """Return each measure as a function of its number of probes (for Fisher: label draws)."""
    key = jax.random.key(1)

    def hvp(count: int) -> Any:
        return hessian_trace_terms(
            loss_fn, params, batches, key,
            num_probes=count, probes_per_pass=per_pass, stacked=is_stacked,
        )  # fmt: skip

    def ggn(count: int) -> Any:
        return gauss_newton_trace(
            log_probs_fn, params, batches, key,
            num_probes=count, probes_per_pass=per_pass,
        )  # fmt: skip

    def fisher(count: int) -> Any:
        return fisher_trace_terms(
            log_probs_fn, params, batches, key,
            num_samples=count, samples_per_pass=per_pass, stacked=is_stacked,
        )  # fmt: skip

    return {"hvp_probe": hvp, "ggn_probe": ggn, "fisher_sample": fisher}
