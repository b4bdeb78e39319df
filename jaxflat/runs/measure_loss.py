"""Measure a checkpoint's loss, and its excess over the best possible loss, in nats."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxflat.config import Config
from jaxflat.distributed import sharding
from jaxflat.flatness import ratio_estimate
from jaxflat.languages.batches import Questions, make_questions
from jaxflat.models.masked import MaskedModel
from jaxflat.runs import builders
from jaxflat.runs.languages import make_language
from jaxflat.runs.measurements import Estimates, PartialResults, load_params
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder
from jaxflat.training.objectives import prediction_losses


def settings(config: Config) -> dict[str, Config]:
    """Return the settings on which the losses depend, except training's."""
    return {"losses": config.evaluation}


def measure(
    config: Config,
    folder: Folder,
    checkpoint: Checkpoint,
    measures: Sequence[str],
    partial_results: PartialResults,
) -> Iterator[tuple[str, Estimates]]:
    """Yield loss, optimal_loss and excess_loss in nats on the language's evaluation set."""
    yield "losses", _losses(config, folder, checkpoint)


def _losses(config: Config, folder: Folder, checkpoint: Checkpoint) -> Estimates:
    mesh = builders.make_mesh(config)
    question_set = evaluation_set(config.language, config.evaluation, mesh)
    if config.model.name == "lookup_table":  # its predictions are exact
        log_probs_SxRxMxV = question_set.log_probs_SxRxMxV
    else:
        params = load_params(config, folder, checkpoint)
        model, batch_size = builders.make_model(config), config.evaluation.batch_size
        log_probs_SxRxMxV = _log_probs(model, mesh, batch_size, params, question_set)
    losses = jax.jit(_sentence_losses)(log_probs_SxRxMxV, question_set)
    weights_S = question_set.weights_SxRxM.sum((1, 2))
    return {name: ratio_estimate(losses[name], weights_S, over="sentences") for name in losses}


@functools.cache
def evaluation_set(language: Config, settings: Config, mesh: Mesh) -> Questions:
    """Return the predictions asked of every model of a language, with their exact answers."""
    sampler = make_language(language)
    key = builders.purpose_key(language.seed, "evaluation")
    sentences = sampler.sample(key, settings.num_sentences)
    if settings.num_sentences % mesh.size == 0:
        sentences = sharding.shard_examples(mesh, sentences)
    mask_key = builders.purpose_key(language.seed, "evaluation/masks")
    return make_questions(sampler, mask_key, sentences, language.masking, settings.num_positions)


def _sentence_losses(log_probs_SxRxMxV: jax.Array, question_set: Questions) -> dict[str, jax.Array]:
    """Return each loss by sentence: the weighted sum over its predictions, in nats."""
    losses = prediction_losses(
        log_probs_SxRxMxV, question_set.log_probs_SxRxMxV, question_set.words_SxRxM
    )
    return {name: (loss * question_set.weights_SxRxM).sum((1, 2)) for name, loss in losses.items()}


@functools.partial(jax.jit, static_argnames=("model", "mesh", "batch_size"))
def _log_probs(
    model: MaskedModel, mesh: Mesh, batch_size: int, params: Any, question_set: Questions
) -> jax.Array:
    """Return the model's log-probabilities, SxRxMxV nats, in batches of `batch_size` sentences."""

    def batch(examples: tuple[jax.Array, ...]) -> jax.Array:
        inputs_BxRxT, lengths_B, positions_BxRxM = sharding.shard_examples(mesh, examples)
        B, R, M = positions_BxRxM.shape
        logits_QxMxV, _ = model.apply(
            {"params": params},
            inputs_BxRxT.reshape(B * R, -1),
            jax.numpy.repeat(lengths_B, R),
            positions_BxRxM.reshape(B * R, M),
        )
        return jax.nn.log_softmax(logits_QxMxV).reshape(B, R, M, -1)

    examples = (question_set.inputs_SxRxT, question_set.lengths_S, question_set.positions_SxRxM)
    batches = jax.tree.map(lambda x: x.reshape(-1, batch_size, *x.shape[1:]), examples)
    log_probs_NxBxRxMxV = jax.lax.map(batch, batches)
    return log_probs_NxBxRxMxV.reshape(-1, *log_probs_NxBxRxMxV.shape[2:])
