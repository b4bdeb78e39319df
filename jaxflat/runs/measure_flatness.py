"""Measure how flat the loss is around a checkpoint."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial

from jaxflat.config import Config, functions
from jaxflat.distributed import ranks, sharding
from jaxflat.flatness import MEASURES, Problem, TraceTerms
from jaxflat.flatness.measures import TRACES, draw_trace_round, sample_trace, trace_estimates
from jaxflat.flatness.trace import fisher_moments
from jaxflat.languages.batches import Batch, sampled_batch
from jaxflat.models import rescaling
from jaxflat.models.blocks import block_of, is_stacked, kind_of
from jaxflat.models.enlarge import enlarge, gauss_newton_factors
from jaxflat.runs import builders
from jaxflat.runs.languages import make_language
from jaxflat.runs.measurements import Estimates, PartialResults, load_params
from jaxflat.runs.trajectory import Checkpoint, sentences_seen
from jaxflat.storage.leased_folder import Folder
from jaxflat.training.objectives import self_labelled_loss

ROUNDS = ("num_probes", "probes_per_pass", "relative_error", "max_rounds")
SHARPNESS = ("sharpness", "num_probes", "probes_per_pass")
KEYS = {
    "hessian_trace": (*ROUNDS, "by_block", "invariant"),
    "gauss_newton_trace": (*ROUNDS, "invariant"),
    "fisher_trace": (*ROUNDS, "by_block", "invariant"),
    "hessian_eigenvalues": ("eigenvalues",),
    "hessian_density": ("density",),
    "average_sharpness": SHARPNESS,
    "adaptive_average_sharpness": SHARPNESS,
    "worst_sharpness": ("sharpness",),
    "adaptive_worst_sharpness": ("sharpness",),
    "critical_sharpness": (),
    "gradient_noise": (),
    "local_learning_coefficient": ("learning_coefficient",),
}
"""The keys of `flatness` on which a measure depends, in addition to SHARED; no entry: all keys."""
SHARED = (
    *("labels", "num_microbatches", "microbatch_size", "remat"),
    *("embedded_width", "embedded_layers"),
)


def settings(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings of each configured measure; an untrained model has no measures."""
    measures = config.flatness.measures if config.phase_order else ()
    every_key = set(config.flatness) - {"measures"}
    keys = KEYS | {name: (name,) for name in functions.sections_in(config.flatness)}
    return {
        name: {key: config.flatness[key] for key in (*SHARED, *keys.get(name, every_key))}
        | {"probe_seed": config.probe_seed}
        for name in measures
    }


def measure(
    config: Config,
    folder: Folder,
    checkpoint: Checkpoint,
    measures: Sequence[str],
    partial_results: PartialResults,
) -> Iterator[tuple[str, Estimates]]:
    """Yield the estimates of each measure, of the model and of the sweep's common model."""
    problems = Problems(config, load_params(config, folder, checkpoint), checkpoint)
    for name in measures:
        yield name, measure_problems(problems, name, partial_results)


@dataclass(frozen=True)
class Problems:
    """The problems of a checkpoint: of its model, and of the model embedded in the largest one.

    Both also have a version in the coordinates of the least Gauss-Newton trace.
    """

    config: Config
    params: Any
    checkpoint: Checkpoint

    @cached_property
    def own(self) -> Problem:
        """The model's own problem."""
        model = builders.make_model(self.config)
        return make_problem(self.config, model, self.params, self.checkpoint)

    @cached_property
    def own_flattest(self) -> Problem:
        """The same in the coordinates of its least Gauss-Newton trace."""
        return flattest_problem(self.config, self.own, self.checkpoint)

    @cached_property
    def embedded(self) -> Problem:
        """The problem of the embedded model; the model's own if that is the largest."""
        if self._larger == (1, 0):
            return self.own
        large = builders.make_largest_model(self.config)
        params = enlarge(self.params, *self._larger)
        # It keeps its groupings, so the largest models of the sweep share its compiled program.
        return make_problem(self.config, large, params, self.checkpoint)

    @cached_property
    def embedded_flattest(self) -> Problem:
        """The same in the coordinates of its least Gauss-Newton trace."""
        if self._larger == (1, 0):
            return self.own_flattest
        return flattest_problem(self.config, self.embedded, self.checkpoint)

    def embedding_factors(self) -> Any:
        """Return the factors by which the embedding multiplies the Fisher trace of each leaf."""
        return gauss_newton_factors(self.params, *self._larger)

    @cached_property
    def _larger(self) -> tuple[int, int]:
        """The largest model's width as a multiple of the model's, and its additional layers."""
        model, large = builders.make_model(self.config), builders.make_largest_model(self.config)
        return large.width // model.width, large.num_layers - model.num_layers


def measure_problems(
    problems: Problems, measure: str, partial_results: PartialResults
) -> Estimates:
    """Return a measure's estimates, by column.

    "@embedded": of the embedded model, if the models of a sweep have a common one. The embedded
    Fisher trace is a weighted sum of the raw terms. Other measures have no such rule and are
    measured again. "@invariant" and "@embedded_invariant": traces in the coordinates of the least
    Gauss-Newton trace, for the models whose rescalings jaxflat knows.
    """
    config, own = problems.config, problems.own
    has_invariant = measure in TRACES and config.flatness.invariant and builders.is_ours(config)

    def take(name: str, problem: Problem) -> Estimates:
        # A name that was taken before costs nothing: the partial results hold its samples.
        if has_invariant and problem.rescale is None:  # one compiled program for all coordinates
            one = rescaling.no_rescaling(problem.params, config.model.head_size)
            one_2 = jax.tree.map(lambda x: jnp.stack([x, x]), one)
            problem = _in_coordinates(problem, one_2, builders.make_mesh(config))
        return _estimates(config, problem, measure, name, partial_results)

    estimates = take(measure, own)
    if has_invariant:
        invariant = take(f"{measure}@invariant", problems.own_flattest)[measure]
        estimates[f"{measure}@invariant"] = invariant
    if not config.flatness.embedded_width:
        return estimates
    embedded = problems.embedded
    if measure == "fisher_trace":
        terms = _trace_terms(config, own, measure, measure, partial_results)
        values = {measure: terms.weighted(problems.embedding_factors())}
    else:
        values = take(measure if embedded is own else f"{measure}@embedded", embedded)
    # Traces of parameter groups are defined only for the raw model.
    totals = [name for name in values if name == measure or not measure.endswith("_trace")]
    estimates |= {f"{name}@embedded": values[name] for name in totals}
    if has_invariant:
        name = f"{measure}@embedded_invariant"
        if embedded is own:
            estimates[name] = invariant
        else:
            estimates[name] = take(name, problems.embedded_flattest)[measure]
    return estimates


def flattest_problem(config: Config, problem: Problem, checkpoint: Checkpoint) -> Problem:
    """Return the problem of a checkpoint in the coordinates of its least Gauss-Newton trace."""
    key = jax.random.fold_in(builders.purpose_key(config.probe_seed, "rescaling"), checkpoint.step)
    num_samples, mesh = config.flatness.num_probes, builders.make_mesh(config)
    return in_flattest_coordinates(problem, key, config.model.head_size, num_samples, mesh)


def in_flattest_coordinates(
    problem: Problem, key: jax.Array, head_size: int, num_samples: int, mesh: Mesh
) -> Problem:
    """Return the problem of a model of ours in the coordinates of its least Gauss-Newton trace."""
    return _in_coordinates(problem, flattest_rescalings(problem, key, head_size, num_samples), mesh)


def flattest_rescalings(problem: Problem, key: jax.Array, head_size: int, num_samples: int) -> Any:
    """Return for each half of the microbatches the flattest rescaling, for `rescale_by_half`.

    Each half takes the scales of the other half. So the scales are independent of the samples that
    they rescale, and no minimum over noise biases the trace downward. Noise in the scales biases it
    upward a little.
    """
    assert problem.log_probs_fn is not None  # jaxflat's own models have it
    moments_2 = fisher_moments(
        problem.log_probs_fn,
        problem.params,
        problem.sample(0),
        key,
        rescaling.moment_function(head_size),
        num_samples=num_samples,
        num_groups=2,
    )
    return _rescalings_of_the_other_half(moments_2, problem.params)


@jax.jit
def _rescalings_of_the_other_half(moments_2: Any, params: Any) -> Any:
    """Return for each half of the microbatches the flattest rescaling of the other half."""
    flattest = jax.vmap(rescaling.flattest_rescaling, in_axes=(0, None))
    return jax.tree.map(lambda leaf: leaf[::-1], flattest(moments_2, params))


def _in_coordinates(problem: Problem, rescaling_2: Any, mesh: Mesh) -> Problem:
    """Return the problem in other coordinates, given for each half of the microbatches."""
    on_all = sharding.replicate(mesh, rescaling_2)  # the same placement: no second compilation
    return problem._replace(rescale=Partial(rescale_by_half, on_all))


def rescale_by_half(rescaling_2: Any, index: jax.Array, vector: Any) -> Any:
    """Rescale a vector of the index-th microbatch by the rescaling of its half."""
    own = jax.tree.map(lambda leaf: leaf[index % 2], rescaling_2)
    return rescaling.rescale(own, vector)


def _estimates(
    config: Config, problem: Problem, measure: str, name: str, partial_results: PartialResults
) -> Estimates:
    """Return a measure's estimates; each round of a trace is a part, any other measure is one."""
    settings = config.flatness
    if measure in TRACES:
        terms = _trace_terms(config, problem, measure, name, partial_results)
        return trace_estimates(measure, terms, problem).estimates
    if measure in MEASURES:
        return partial_results.estimates(
            name, lambda: MEASURES[measure](problem, settings).estimates
        )
    own = settings[measure]  # a user's function
    return partial_results.estimates(name, lambda: {measure: functions.call(own, problem=problem)})


def _trace_terms(
    config: Config, problem: Problem, measure: str, name: str, partial_results: PartialResults
) -> TraceTerms:
    """Return a trace's samples; each round is a part, saved at an interruption."""
    mesh = builders.make_mesh(config)

    def draw_round(i: int) -> TraceTerms:
        def lists() -> tuple[Any, list, str]:
            drawn = draw_trace_round(measure, problem, config.flatness, i)
            arrays = sharding.to_host(sharding.replicate(mesh, (drawn.terms, drawn.weights_n)))
            numbers = (*jax.tree.map(lambda x: x.tolist(), arrays), drawn.over)
            return ranks.all_gather(numbers, "round")[0]  # all ranks must stop at the same round

        terms, weights_n, over = partial_results.value(f"{name}/round_{i}", lists)
        terms = jax.tree.map(jnp.asarray, terms, is_leaf=lambda x: isinstance(x, list))
        return TraceTerms(terms, jnp.asarray(weights_n), over)

    return sample_trace(draw_round, config.flatness)


def make_problem(config: Config, model: Any, params: Any, checkpoint: Checkpoint) -> Problem:
    """Return the problem that measures see: the loss at `params` on sentences of the language."""
    settings = config.flatness
    key = jax.random.fold_in(builders.purpose_key(config.probe_seed, "flatness"), checkpoint.step)
    data_key, key = jax.random.split(key)
    loss_fn, log_probs_fn = labelled_losses(model, settings.labels, settings.remat)

    def sample(i: int) -> Batch:
        return sample_microbatches(config, jax.random.fold_in(data_key, i))

    groupings = (block_of, kind_of) if builders.is_ours(config) else (_top_module,)
    return Problem(
        loss_fn,
        log_probs_fn,
        params,
        sample,
        key,
        sentences_seen(config, checkpoint),
        groupings=groupings if settings.by_block else (),
        stacked=is_stacked if builders.is_ours(config) else None,
    )


def _top_module(path: str) -> str:
    return path.partition("/")[0]


def sample_microbatches(config: Config, key: jax.Array) -> Batch:
    """Return independent microbatches (leading axis), with sentences sharded over the mesh."""
    settings = config.flatness
    # Labels of the model need no targets.
    targets = "exact" if settings.labels == "exact" else "sampled"
    language = make_language(config.language)
    mesh = builders.make_mesh(config)
    target_settings = (targets, config.language.masking)
    return _microbatches(
        mesh, settings.num_microbatches, settings.microbatch_size, target_settings, language, key
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _microbatches(
    mesh: Any,
    num_microbatches: int,
    size: int,
    target_settings: tuple[str, str],
    language: Any,
    key: jax.Array,
) -> Batch:
    keys_M = jax.random.split(key, num_microbatches)
    batches = jax.lax.map(lambda k: sampled_batch(language, k, size, *target_settings), keys_M)
    return sharding.shard_examples(mesh, batches, axis=1)


@functools.cache
def labelled_losses(model: Any, labels: str, remat: bool = False) -> tuple[Any, Any]:
    """Return (loss_fn, log_probs_fn); with labels "model", the model's own predictions are targets.

    With remat, matrix products recompute activations instead of storing them.
    """
    loss_fn, log_probs_fn = builders.loss_functions(model)
    if labels == "model":
        loss_fn = self_labelled_loss(log_probs_fn)
    return (
        (jax.checkpoint(loss_fn), jax.checkpoint(log_probs_fn))
        if remat
        else (loss_fn, log_probs_fn)
    )
