"""The cost of one more probe of the curvature, in gradients of the same microbatches.

Both sides loop over the same few microbatches inside one compiled call, on the run's own mesh. The
gradient is a training step's (`training.gradient`). The cost of a probe is marginal, because the
loss is linearised once in every microbatch for any number of probes. It is the time of three passes
of --probes_per_pass probes minus the time of one pass, over the number of additional probes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.benchmark.timing import Figure, Stopwatch, repeated, summarize
from jaxflat.benchmark.workload import Shape, resolved_config
from jaxflat.distributed import sharding
from jaxflat.flatness import (
    fisher_trace_terms,
    gauss_newton_trace_samples,
    hessian_quadratic_form,
    hessian_trace_samples,
    hessian_trace_terms,
    hessian_vector_product,
)
from jaxflat.models.blocks import is_stacked
from jaxflat.runs import builders
from jaxflat.runs.measure_flatness import labelled_losses, sample_microbatches
from jaxflat.training.gradient import Division, loss_and_gradient

MORE_PASSES = 2


class Probes:
    """A model of some shape, its microbatches, and a stopwatch for each kind of probe."""

    def __init__(self, shape: Shape, probes_per_pass: int, seconds: float):
        config = resolved_config(shape)
        mesh, settings = builders.make_mesh(config), config.flatness
        self.loss_fn, self.log_probs_fn = labelled_losses(
            builders.make_model(config), settings.labels
        )
        self.params = sharding.replicate(mesh, builders.init_params(config))
        self.batches = sample_microbatches(config, jax.random.key(0))
        num_shards = mesh.shape["data"] if jax.default_backend() == "cpu" else 1
        gradient_fn = jax.jit(partial(mean_gradients, self.loss_fn, num_shards))
        self.gradient = gradient_fn.lower(self.params, self.batches).compile()
        self._num_first = probes_per_pass
        self._num_more = MORE_PASSES * self._num_first

        def stopwatch(function: Callable[[], Any]) -> Stopwatch:
            return Stopwatch(partial(repeated, function), seconds)

        self._gradient_watch = stopwatch(lambda: self.gradient(self.params, self.batches))
        measures = _measures(self, probes_per_pass)
        counts = self._num_first, self._num_first + self._num_more
        self._watches = {
            name: [stopwatch(partial(measure, count)) for count in counts]
            for name, measure in measures.items()
        }
        self.names = tuple(measures)

    def gradient_seconds(self) -> float:
        """Return the seconds of a gradient of one microbatch."""
        return self._gradient_watch.seconds() / len(self.batches.lengths_B)

    def seconds(self, name: str) -> tuple[float, float]:
        """Return the seconds of one more probe of a kind on one microbatch, and of a first pass.

        The first pass of --probes_per_pass probes also linearises the loss.
        """
        first, more = (watch.seconds() for watch in self._watches[name])
        num_microbatches = len(self.batches.lengths_B)
        return (more - first) / self._num_more / num_microbatches, first / num_microbatches


def measure_flatness(probes: Probes, repeats: int) -> dict[str, Figure]:
    """Return each probe's cost, and the memory of H v and both forms of v' H v, in gradients.

    Every repeat times all functions in turn and gives one ratio for each.
    """
    gradients, first_passes, costs = [], [], {name: [] for name in probes.names}
    for _ in range(repeats):
        gradients.append(probes.gradient_seconds())
        for name, ratios in costs.items():
            one_more, first_pass = probes.seconds(name)
            ratios.append(one_more / gradients[-1])
            if name == "hvp_probe":
                first_passes.append(first_pass / gradients[-1])
    figures = {"flatness/gradient_ms": summarize([1e3 * s for s in gradients], "ms")}
    for name, ratios in costs.items():
        figures[f"flatness/{name}_in_gradients"] = summarize(ratios, "gradients")
    figures["flatness/hvp_first_pass_in_gradients"] = summarize(first_passes, "gradients")
    for name, compiled in _compiled_for_memory(probes).items():
        memory = memory_ratio(compiled, probes.gradient)
        if memory is not None:
            figures[f"flatness/{name}_memory_in_gradients"] = summarize([memory], "gradients")
    return figures


def mean_gradients(loss_fn: Callable[..., Any], num_shards: int, params: Any, batches: Any) -> Any:
    """Return the sum over microbatches of the mean loss's gradient."""

    def add_microbatch(total: Any, batch: Any) -> tuple[Any, None]:
        _, gradient = loss_and_gradient(loss_fn, batch, params, Division(num_shards))
        return jax.tree.map(jnp.add, total, gradient), None

    total, _ = jax.lax.scan(add_microbatch, jax.tree.map(jnp.zeros_like, params), batches)
    return total


def memory_ratio(compiled: jax.stages.Compiled, gradient: jax.stages.Compiled) -> float | None:
    """Return the ratio of the working memories of one compiled function and a gradient.

    The compiler plans working memory in addition to arguments and results, on one device
    (`memory_analysis().temp_size_in_bytes`). None if the backend does not report it.
    """
    planned = [compiled.memory_analysis(), gradient.memory_analysis()]
    sizes = [getattr(plan, "temp_size_in_bytes", 0) for plan in planned]
    return sizes[0] / sizes[1] if all(sizes) else None


def _compiled_for_memory(probes: Probes) -> dict[str, jax.stages.Compiled]:
    """Return H v, v' H v by two forward derivatives, and the trace by v' H v of one probe."""
    loss_fn, params, batches = probes.loss_fn, probes.params, probes.batches
    trace = jax.jit(partial(hessian_trace_samples, loss_fn, num_probes=1))
    product, form = (
        jax.jit(partial(function, loss_fn))
        for function in (hessian_vector_product, hessian_quadratic_form)
    )
    return {
        "probe": product.lower(params, batches, params).compile(),
        "forward_form": form.lower(params, batches, params).compile(),
        "hessian_form": trace.lower(params, batches, jax.random.key(1)).compile(),
    }


def _measures(probes: Probes, per_pass: int) -> dict[str, Callable[[int], Any]]:
    """Return each measure as a function of its number of probes (for Fisher: label draws)."""
    loss_fn, log_probs_fn = probes.loss_fn, probes.log_probs_fn
    params, batches = probes.params, probes.batches
    key = jax.random.key(1)

    def hvp(count: int) -> Any:
        return hessian_trace_terms(
            loss_fn, params, batches, key,
            num_probes=count, probes_per_pass=per_pass, stacked=is_stacked,
        )  # fmt: skip

    def form(count: int) -> Any:
        return hessian_trace_samples(
            loss_fn, params, batches, key, num_probes=count, probes_per_pass=per_pass
        )

    def ggn(count: int) -> Any:
        return gauss_newton_trace_samples(
            log_probs_fn, params, batches, key,
            num_probes=count, probes_per_pass=per_pass,
        )  # fmt: skip

    def fisher(count: int) -> Any:
        return fisher_trace_terms(
            log_probs_fn, params, batches, key,
            num_samples=count, samples_per_pass=per_pass, stacked=is_stacked,
        )  # fmt: skip

    return {"hvp_probe": hvp, "hessian_form": form, "ggn_probe": ggn, "fisher_sample": fisher}
