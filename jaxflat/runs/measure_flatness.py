"""How flat the loss is around a checkpoint."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxflat.config import Config
from jaxflat.distributed import ranks, sharding
from jaxflat.distributed.preemption import Keep, afresh
from jaxflat.flatness import MEASURES, Estimate, Problem, TraceTerms
from jaxflat.flatness.measures import fisher_terms, trace_estimates
from jaxflat.languages.batches import MaskedBatch, masked_batch
from jaxflat.models.blocks import block_of, is_stacked, kind_of
from jaxflat.models.enlarge import enlarge, gauss_newton_factors
from jaxflat.runs import experiment
from jaxflat.runs.records import Record, load_params, record
from jaxflat.runs.trajectory import Snapshot, sentences_seen
from jaxflat.training.objectives import self_labelled_loss


def flatness(
    config: Config, directory: Path, snapshot: Snapshot, keep: Keep = afresh
) -> list[Record]:
    """Take each configured measure: raw, and as seen in the sweep's largest model."""
    params, records = load_params(config, directory, snapshot), []
    for measure in config.flatness.measures:
        estimates = measure_both(config, params, measure, snapshot, keep)
        records += [record(snapshot, name, estimate) for name, estimate in estimates.items()]
    return records


def measure_both(
    config: Config, params: Any, measure: str, snapshot: Snapshot, keep: Keep = afresh
) -> dict[str, Estimate]:
    """Return a measure's estimates, and their "@embedded" values where models have a common width.

    Embedded is, for the Fisher trace, a weighted sum of the raw terms; other measures have no such
    rule, so they are taken again on the embedded model.
    """
    settings, model = config.flatness, experiment.make_model(config)
    mesh = experiment.make_mesh(config)
    problem = _keeping_rounds(mesh, make_problem(config, model, params, snapshot), measure, keep)
    factor = settings.embedded_width // model.width
    large = experiment.make_largest_model(config) if factor else model
    larger = max(factor, 1), large.num_layers - model.num_layers
    if measure == "fisher_trace":
        terms = fisher_terms(problem, settings)
        estimates = trace_estimates(measure, terms, problem).estimates
        embedded = {measure: terms.weighted(gauss_newton_factors(params, *larger))}
    else:
        embedded = estimates = _estimates(problem, settings, measure, measure, keep)
        if large != model:
            name = f"{measure}@embedded"
            problem = make_problem(config, large, enlarge(params, *larger), snapshot)
            problem = _keeping_rounds(mesh, problem._replace(groupings=()), name, keep)
            embedded = _estimates(problem, settings, measure, name, keep)
    seen = embedded if factor else {}
    # Groups of parameters are of the model itself.
    whole = [name for name in seen if name == measure or not measure.endswith("_trace")]
    return estimates | {f"{name}@embedded": seen[name] for name in whole}


def _estimates(
    problem: Problem, settings: Config, measure: str, name: str, keep: Keep
) -> dict[str, Estimate]:
    """Return a measure's estimates, kept under a name as numbers."""

    def numbers() -> dict[str, Any]:
        found = MEASURES[measure](problem, settings).estimates.items()
        return {k: (float(e.mean), float(e.sem), e.num_samples, e.over) for k, e in found}

    return {
        key: Estimate(jnp.asarray(mean), jnp.asarray(sem), num_samples, over)
        for key, (mean, sem, num_samples, over) in keep(name, numbers).items()
    }


def _keeping_rounds(mesh: Mesh, problem: Problem, name: str, keep: Keep) -> Problem:
    """Return a problem whose traces have each of their rounds kept, as lists of numbers."""

    def keep_round(i: int, draw: Callable[[], TraceTerms]) -> TraceTerms:
        def lists() -> tuple[Any, list, str]:
            made = draw()
            arrays = sharding.replicate(mesh, (made.terms, made.weights_n))
            numbers = (*jax.tree.map(lambda x: x.tolist(), arrays), made.over)
            return ranks.gather(numbers, "round")[0]  # or one might stop where others go on

        terms, weights_n, over = keep(f"{name}/round_{i}", lists)
        terms = jax.tree.map(jnp.asarray, terms, is_leaf=lambda x: isinstance(x, list))
        return TraceTerms(terms, jnp.asarray(weights_n), over)

    return problem._replace(keep_round=keep_round)


def make_problem(config: Config, model: Any, params: Any, snapshot: Snapshot) -> Problem:
    """Return what is measured at `params`: the model's loss on the language's own sentences."""
    settings = config.flatness
    key = jax.random.fold_in(experiment.purpose_key(config.probe_seed, "flatness"), snapshot.step)
    data_key, key = jax.random.split(key)
    loss_fn, log_probs_fn = labelled_losses(model, settings.labels, settings.remat)

    def sample(i: int) -> MaskedBatch:
        return sample_microbatches(config, jax.random.fold_in(data_key, i))

    return Problem(
        loss_fn,
        log_probs_fn,
        params,
        sample,
        key,
        sentences_seen(config, snapshot),
        groupings=(block_of, kind_of) if settings.by_block else (),
        stacked=is_stacked,
    )


def sample_microbatches(config: Config, key: jax.Array) -> MaskedBatch:
    """Return independent microbatches (leading axis), their sentences split over the mesh."""
    settings = config.flatness
    targets = "sampled" if settings.labels == "data" else "exact"
    language = experiment.make_language(config.language)
    mesh = experiment.make_mesh(config)
    how = (targets, config.language.masking)
    return _microbatches(
        mesh, settings.num_microbatches, settings.microbatch_size, how, language, key
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _microbatches(
    mesh: Any, num_microbatches: int, size: int, how: tuple[str, str], language: Any, key: jax.Array
) -> MaskedBatch:
    keys_M = jax.random.split(key, num_microbatches)
    batches = jax.lax.map(lambda k: masked_batch(language, k, size, *how), keys_M)
    return sharding.shard_examples(mesh, batches, axis=1)


@functools.cache
def labelled_losses(model: Any, labels: str, remat: bool = False) -> tuple[Any, Any]:
    """Return (loss_fn, log_probs_fn); with labels "model" the targets are the model's own.

    With remat a product computes activations again instead of keeping them.
    """
    loss_fn, log_probs_fn = experiment.loss_functions(model)
    if labels == "model":
        loss_fn = self_labelled_loss(log_probs_fn)
    return (
        (jax.checkpoint(loss_fn), jax.checkpoint(log_probs_fn))
        if remat
        else (loss_fn, log_probs_fn)
    )
