"""Measure a checkpoint's loss, and its excess over the best possible loss, in nats."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxflat.config import Config
from jaxflat.distributed import sharding
from jaxflat.flatness import Estimate, ratio_estimate
from jaxflat.languages.batches import Questions, make_questions
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.windows import TextWindows
from jaxflat.models.language_model import LanguageModel
from jaxflat.runs import builders
from jaxflat.runs.languages import make_language
from jaxflat.runs.measurements import Estimates, PartialResults, load_params
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder
from jaxflat.training.objectives import prediction_losses

NUM_PARTS = 16
"""Parts of the held-out documents. Their losses give the error of a difference of two models."""


class EvaluationSet(NamedTuple):
    """The predictions asked of every model of a language, with their exact answers if known.

    documents_SxRxM: of a text, the held-out document of each hidden word, from 0. Otherwise None:
    the sentences are independent.
    """

    questions: Questions
    documents_SxRxM: jax.Array | None = None
    num_documents: int = 0


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
    """Yield loss, optimal_loss and excess_loss in nats on the language's evaluation set.

    On a text, yield the loss of its held-out documents, and of NUM_PARTS parts of them.
    """
    yield "losses", _losses(config, folder, checkpoint)


def _losses(config: Config, folder: Folder, checkpoint: Checkpoint) -> Estimates:
    mesh = builders.make_mesh(config)
    asked = evaluation_set(config.language, config.evaluation, mesh)
    questions = asked.questions
    if config.model.name == "lookup_table":  # its predictions are exact
        losses = jax.jit(_table_losses)(questions)
    else:
        params = load_params(config, folder, checkpoint)
        model, batch_size = builders.make_model(config), config.evaluation.batch_size
        losses = _model_losses(model, mesh, batch_size, params, questions)
    weights_SxRxM = questions.weights_SxRxM
    if asked.documents_SxRxM is None:
        weights_S = weights_SxRxM.sum((1, 2))
        return {
            name: ratio_estimate((loss * weights_SxRxM).sum((1, 2)), weights_S, over="sentences")
            for name, loss in losses.items()
        }
    sums_D, weights_D = (
        jax.ops.segment_sum(x.ravel(), asked.documents_SxRxM.ravel(), asked.num_documents)
        for x in (losses["loss"] * weights_SxRxM, weights_SxRxM)
    )
    return document_estimates(sums_D, weights_D)


def document_estimates(sums_D: jax.Array, weights_D: jax.Array) -> Estimates:
    """Return the loss with its error over documents, and a value for each of P parts of them.

    sums_D: each document's weighted sum of losses, in nats. weights_D: its sum of weights. P is
    NUM_PARTS, or the number of documents if that is less. Part k has the documents k, k + P, ...
    and the linearised value

        R + P (s_k - R w_k) / sum(w),    R = sum(s) / sum(w),

    with the part's own sums s_k and w_k. So the mean of the values is R, and their standard error
    is that of `ratio_estimate` over parts. Differences of two models' values have these properties
    for the difference of the two losses: they are paired by part (Wolter 2007, Introduction to
    Variance Estimation, ch. 2: the method of random groups).
    """
    loss = ratio_estimate(sums_D, weights_D, over="documents")
    num_parts = min(NUM_PARTS, len(sums_D))
    parts_D = jnp.arange(len(sums_D), dtype=jnp.int32) % num_parts
    sums_P, weights_P = (jax.ops.segment_sum(x, parts_D, num_parts) for x in (sums_D, weights_D))
    values_P = loss.mean + num_parts * (sums_P - loss.mean * weights_P) / weights_D.sum()
    no_error = jnp.full_like(loss.mean, jnp.nan)
    return {"loss": loss} | {
        f"loss/documents_{k:02}": Estimate(value, no_error, 1, "documents")
        for k, value in enumerate(values_P, start=1)
    }


@functools.cache
def evaluation_set(language: Config, settings: Config, mesh: Mesh) -> EvaluationSet:
    """Return the predictions asked of every model of a language.

    They are on new sentences, or on a text's held-out windows.
    """
    sampler = make_language(language)
    mask_key = builders.purpose_key(language.seed, "evaluation/masks")
    if isinstance(sampler, TextWindows):
        return held_out_set(sampler, mask_key, language.masking, settings)
    key = builders.purpose_key(language.seed, "evaluation")
    sentences = sampler.sample(key, settings.num_sentences)
    if settings.num_sentences % mesh.size == 0:
        sentences = sharding.shard_examples(mesh, sentences)
    how = language.masking, settings.num_positions
    return EvaluationSet(make_questions(sampler, mask_key, sentences, *how))


def held_out_set(
    text: TextWindows, key: jax.Array, masking: str, settings: Config
) -> EvaluationSet:
    """Return the predictions of at most num_sentences held-out windows, evenly spaced.

    To fill the last batch, windows are repeated with weight 0.
    """
    H = len(text.held_out_HxT)
    number = min(settings.num_sentences, H)
    size = -(-number // settings.batch_size) * settings.batch_size
    places_S = np.arange(size)
    rows_S = places_S % number * H // number
    lengths_S = jnp.full(size, text.max_length, jnp.int32)
    sentences = Sentences(text.held_out_HxT[rows_S], lengths_S, latents=None)
    asked = make_questions(text, key, sentences, masking, settings.num_positions)
    counted_S = jnp.asarray(places_S < number)
    found, documents_SxT = np.unique(text.documents_HxT[rows_S], return_inverse=True)
    documents_SxRxM = jnp.take_along_axis(
        jnp.asarray(documents_SxT, jnp.int32)[:, None], asked.positions_SxRxM, axis=2
    )
    weights_SxRxM = jnp.where(counted_S[:, None, None], asked.weights_SxRxM, 0)
    asked = replace(asked, weights_SxRxM=weights_SxRxM)
    return EvaluationSet(asked, documents_SxRxM, len(found))


def _table_losses(questions: Questions) -> dict[str, jax.Array]:
    exact_SxRxMxV = questions.log_probs_SxRxMxV
    assert exact_SxRxMxV is not None  # a text has no lookup table
    return prediction_losses(exact_SxRxMxV, exact_SxRxMxV, questions.words_SxRxM)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "batch_size"))
def _model_losses(
    model: LanguageModel, mesh: Mesh, batch_size: int, params: Any, questions: Questions
) -> dict[str, jax.Array]:
    """Return each loss of each prediction, SxRxM nats, in batches of `batch_size` sentences."""

    def batch(asked: Questions) -> dict[str, jax.Array]:
        asked = sharding.shard_examples(mesh, asked)
        B, R, M = asked.positions_SxRxM.shape
        logits_QxMxV, _ = model.apply(
            {"params": params},
            asked.inputs_SxRxT.reshape(B * R, -1),
            jnp.repeat(asked.lengths_S, R),
            asked.positions_SxRxM.reshape(B * R, M),
        )
        log_probs_BxRxMxV = jax.nn.log_softmax(logits_QxMxV).reshape(B, R, M, -1)
        return prediction_losses(log_probs_BxRxMxV, asked.log_probs_SxRxMxV, asked.words_SxRxM)

    batches = jax.tree.map(lambda x: x.reshape(-1, batch_size, *x.shape[1:]), questions)
    losses = jax.lax.map(batch, batches)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), losses)
