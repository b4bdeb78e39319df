"""Measure how flat the loss is around a checkpoint."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxflat.config import Config, functions
from jaxflat.distributed import ranks, sharding
from jaxflat.flatness import MEASURES, Problem, TraceTerms
from jaxflat.flatness.measures import TRACES, draw_trace_round, sample_trace, trace_estimates
from jaxflat.languages.batches import MaskedBatch, masked_batch
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
    "hessian_trace": (*ROUNDS, "by_block"),
    "gauss_newton_trace": ROUNDS,
    "fisher_trace": (*ROUNDS, "by_block"),
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
    """Yield the estimates of each measure: raw, and embedded in the sweep's largest model."""
    params = load_params(config, folder, checkpoint)
    for name in measures:
        yield name, measure_raw_and_embedded(config, params, name, checkpoint, partial_results)


def measure_raw_and_embedded(
    config: Config,
    params: Any,
    measure: str,
    checkpoint: Checkpoint,
    partial_results: PartialResults,
) -> Estimates:
    """Return a measure's estimates, and their "@embedded" values if models have a common width.

    The embedded Fisher trace is a weighted sum of the raw terms. Other measures have no such
    rule and are measured again on the embedded model.
    """
    settings, mesh = config.flatness, builders.make_mesh(config)
    model = builders.make_model(config)
    problem = make_problem(config, model, params, checkpoint)
    if measure == "fisher_trace":
        terms = _trace_terms(mesh, problem, settings, measure, measure, partial_results)
        estimates = trace_estimates(measure, terms, problem).estimates
    else:
        estimates = _estimates(mesh, problem, settings, measure, measure, partial_results)
    if not settings.embedded_width:
        return estimates
    large = builders.make_largest_model(config)
    larger = large.width // model.width, large.num_layers - model.num_layers
    if measure == "fisher_trace":
        embedded = {measure: terms.weighted(gauss_newton_factors(params, *larger))}
    elif large == model:
        embedded = estimates
    else:
        embedded_problem = make_problem(config, large, enlarge(params, *larger), checkpoint)
        embedded_problem = embedded_problem._replace(groupings=())
        name = f"{measure}@embedded"
        embedded = _estimates(mesh, embedded_problem, settings, measure, name, partial_results)
    # Traces of parameter groups are defined only for the raw model.
    totals = [name for name in embedded if name == measure or not measure.endswith("_trace")]
    return estimates | {f"{name}@embedded": embedded[name] for name in totals}


def _estimates(
    mesh: Mesh,
    problem: Problem,
    settings: Config,
    measure: str,
    name: str,
    partial_results: PartialResults,
) -> Estimates:
    """Return a measure's estimates; each round of a trace is a part, any other measure is one."""
    if measure in TRACES:
        terms = _trace_terms(mesh, problem, settings, measure, name, partial_results)
        return trace_estimates(measure, terms, problem).estimates
    if measure in MEASURES:
        return partial_results.estimates(
            name, lambda: MEASURES[measure](problem, settings).estimates
        )
    own = settings[measure]  # a user's function
    return partial_results.estimates(name, lambda: {measure: functions.call(own, problem=problem)})


def _trace_terms(
    mesh: Mesh,
    problem: Problem,
    settings: Config,
    measure: str,
    name: str,
    partial_results: PartialResults,
) -> TraceTerms:
    """Return a trace's samples; each round is a part, saved at an interruption."""

    def draw_round(i: int) -> TraceTerms:
        def lists() -> tuple[Any, list, str]:
            drawn = draw_trace_round(measure, problem, settings, i)
            arrays = sharding.to_host(sharding.replicate(mesh, (drawn.terms, drawn.weights_n)))
            numbers = (*jax.tree.map(lambda x: x.tolist(), arrays), drawn.over)
            return ranks.all_gather(numbers, "round")[0]  # all ranks must stop at the same round

        terms, weights_n, over = partial_results.value(f"{name}/round_{i}", lists)
        terms = jax.tree.map(jnp.asarray, terms, is_leaf=lambda x: isinstance(x, list))
        return TraceTerms(terms, jnp.asarray(weights_n), over)

    return sample_trace(draw_round, settings)


def make_problem(config: Config, model: Any, params: Any, checkpoint: Checkpoint) -> Problem:
    """Return the problem that measures see: the loss at `params` on sentences of the language."""
    settings = config.flatness
    key = jax.random.fold_in(builders.purpose_key(config.probe_seed, "flatness"), checkpoint.step)
    data_key, key = jax.random.split(key)
    loss_fn, log_probs_fn = labelled_losses(model, settings.labels, settings.remat)

    def sample(i: int) -> MaskedBatch:
        return sample_microbatches(config, jax.random.fold_in(data_key, i))

    is_ours = config.model.name not in functions.sections_in(config.model)
    groupings = (block_of, kind_of) if is_ours else (_top_module,)
    return Problem(
        loss_fn,
        log_probs_fn,
        params,
        sample,
        key,
        sentences_seen(config, checkpoint),
        groupings=groupings if settings.by_block else (),
        stacked=is_stacked if is_ours else None,
    )


def _top_module(path: str) -> str:
    return path.partition("/")[0]


def sample_microbatches(config: Config, key: jax.Array) -> MaskedBatch:
    """Return independent microbatches (leading axis), with sentences sharded over the mesh."""
    settings = config.flatness
    targets = "sampled" if settings.labels == "data" else "exact"
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
) -> MaskedBatch:
    keys_M = jax.random.split(key, num_microbatches)
    batches = jax.lax.map(lambda k: masked_batch(language, k, size, *target_settings), keys_M)
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
