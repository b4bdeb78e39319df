"""How flat the loss is around a checkpoint."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxflat import experiment, sharding
from jaxflat.config import Config
from jaxflat.flatness import TraceTerms, fisher_trace_terms, hessian_trace_terms
from jaxflat.languages.batches import MaskedBatch, masked_batch
from jaxflat.models.blocks import block_of, is_stacked
from jaxflat.models.enlarge import enlarge, gauss_newton_factors
from jaxflat.stages.records import Record, load_params, record


def flatness(config: Config, directory: Path, step: int) -> list[Record]:
    """Measure each configured trace: raw, by block, and as seen in the sweep's largest model.

    The value after embedding is, for the Fisher trace, a weighted sum of the raw terms; the
    Hessian's second-derivative part has no such rule, so it is measured on the embedded model.
    """
    model, params = experiment.make_model(config), load_params(config, directory, step)
    factor = config.flatness.embedded_width // model.width
    key = jax.random.fold_in(experiment.purpose_key(config.probe_seed, "flatness"), step)
    records = []
    for measure in config.flatness.measures:
        terms = trace_terms(config, model, params, measure, key)
        estimates = {measure: terms.total()}
        estimates |= {f"{measure}/{b}": e for b, e in terms.by_block(block_of).items()}
        if measure == "fisher_trace" and factor:
            estimates[f"{measure}@embedded"] = terms.weighted(gauss_newton_factors(params, factor))
        elif factor == 1:
            estimates[f"{measure}@embedded"] = estimates[measure]
        elif factor:
            large = model.clone(width=model.width * factor, num_heads=model.num_heads * factor)
            terms = trace_terms(config, large, enlarge(params, factor), measure, key)
            estimates[f"{measure}@embedded"] = terms.total()
        records += [record(step, name, estimate) for name, estimate in estimates.items()]
    return records


def trace_terms(
    config: Config, model: Any, params: Any, measure: str, key: jax.Array
) -> TraceTerms:
    """Return the samples of one trace at `params`, on sentences and probes drawn from `key`."""
    settings = config.flatness
    data_key, key = jax.random.split(key)
    batches = sample_microbatches(config, data_key)
    loss_fn, log_probs_fn = labelled_losses(model, settings.labels)
    passes = min(settings.probes_per_pass, settings.num_probes)
    if measure == "hessian_trace":
        return hessian_trace_terms(
            loss_fn,
            params,
            batches,
            key,
            num_probes=settings.num_probes,
            probes_per_pass=passes,
            stacked=is_stacked,
        )
    return fisher_trace_terms(
        log_probs_fn,
        params,
        batches,
        key,
        num_samples=settings.num_probes,
        samples_per_pass=passes,
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
def labelled_losses(model: Any, labels: str) -> tuple[Any, Any]:
    """Return (loss_fn, log_probs_fn); with labels "model" the targets are the model's own."""
    loss_fn, log_probs_fn = experiment.loss_functions(model)
    if labels != "model":
        return loss_fn, log_probs_fn

    def model_labelled(params: Any, batch: MaskedBatch) -> tuple[jax.Array, jax.Array]:
        log_probs_BxMxV, _ = log_probs_fn(jax.lax.stop_gradient(params), batch)
        return loss_fn(params, replace(batch, targets_BxMxV=jax.numpy.exp(log_probs_BxMxV)))

    return model_labelled, log_probs_fn
