"""Make the batches of a phase, and its adversary or flatness penalty."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxflat.config import Config
from jaxflat.distributed import sharding
from jaxflat.flatness import penalty
from jaxflat.languages.batches import Source, interleave_by_length, source_batch
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import all_labels
from jaxflat.probes.features import sentence_features
from jaxflat.probes.ridge import unexplained_variance
from jaxflat.training.adversarial import AdversarialBatch, Adversary
from jaxflat.training.flatness_penalty import FlatnessPenalty
from jaxflat.training.gradient import Division
from jaxflat.training.objectives import (
    LossFn,
    masked_excess_loss,
    masked_lm_loss_and_log_probs,
    masked_log_probs,
    word_features,
)

POOLING = "concatenate"  # the head sees the representations of all words

Labelled = tuple[Sentences, jax.Array]  # (sentences, targets_NxKxC), as in probes.ridge
SampleBatch = Callable[[Source, jax.Array, jax.Array], Any]  # (source, step's key, place in call)


def make_sampler(settings: Config, masking: str, mesh: Mesh, division: Division) -> SampleBatch:
    """Return sample_batch(source, key, index) of a phase; batches are sharded over the mesh.

    If the division leaves out padding, sentences of similar lengths are in one microbatch. With an
    adversary the result is an AdversarialBatch.
    """
    adversary = settings.adversary
    batch_settings = (settings.batch_size, settings.targets, masking)

    shard = partial(sharding.shard_examples, mesh, over=sharding.RUN_AXES)

    def pretraining_batch(source: Source, key: jax.Array, index: jax.Array) -> Any:
        batch = shard(source_batch(source, key, index, *batch_settings))
        if division.lengths:  # devices then exchange sentences
            batch = shard(interleave_by_length(batch, division.num_microbatches))
        return batch

    def with_labelled(source: Source, key: jax.Array, index: jax.Array) -> AdversarialBatch:
        keys = jax.random.split(jax.random.fold_in(key, 1))  # other than `key`
        drawn = [_labelled(source.language, adversary, k) for k in keys]
        fit, held_out = shard(drawn)
        return AdversarialBatch(pretraining_batch(source, key, index), fit, held_out)

    return with_labelled if adversary.strength else pretraining_batch


def make_adversary(apply_fn: Callable[..., Any], settings: Config) -> Adversary | None:
    """Return the adversary of a phase, None if its strength is 0."""
    chosen = settings.adversary
    if chosen.strength == 0:
        return None
    return Adversary(partial(_downstream_loss, apply_fn, chosen.l2), chosen.strength)


def make_flatness_penalty(
    apply_fn: Callable[..., Any], loss_fn: LossFn, settings: Config
) -> FlatnessPenalty:
    """Return the penalty of a phase whose loss without it is `loss_fn`; its strength is not read.

    H is the Hessian of `loss_fn`. G belongs to the model's predictions of the masked words, even if
    `loss_fn` is a user's function.
    """
    chosen = settings.flatness_penalty
    next_vectors, curvature = partial(penalty.random_signs, chosen.num_probes), None
    if chosen.measure == "gauss_newton_trace":
        both_fn = masked_lm_loss_and_log_probs(apply_fn)
        if settings.objective in settings:  # a user's function, which has its own forward pass
            both_fn = partial(_loss_and_log_probs, loss_fn, masked_log_probs(apply_fn))
        curvature = partial(penalty.gauss_newton_curvature, both_fn)
    elif chosen.measure == "parameter_norm":
        curvature = partial(penalty.squared_norm, loss_fn)
    elif chosen.measure == "feature_rank":
        curvature = partial(penalty.feature_rank, loss_fn, word_features(apply_fn))
    else:
        curvature = partial(penalty.hessian_curvature, loss_fn)
        if chosen.measure == "hessian_max_eigenvalue":
            next_vectors = partial(penalty.power_step, loss_fn)
    return FlatnessPenalty(next_vectors, curvature, masked_excess_loss(apply_fn), chosen.max_excess)


def _loss_and_log_probs(
    loss_fn: LossFn, log_probs_fn: Callable[..., Any], params: Any, batch: Any
) -> tuple[Any, Any]:
    return loss_fn(params, batch), log_probs_fn(params, batch)


def _labelled(language: Any, adversary: Config, key: jax.Array) -> Labelled:
    """Return sentences and their one-hot labels for every task of the language."""
    sentences = language.sample(key, adversary.num_sentences)
    num_classes = max(task.num_classes for task in language.tasks.values())
    labels = all_labels(language.tasks, sentences, (adversary.labeling,)).values()
    targets = [
        jnp.where(valid_N[:, None], jax.nn.one_hot(labels_N, num_classes), 0)
        for labels_N, valid_N in labels
    ]
    return sentences, jnp.stack(targets, axis=1)


def _downstream_loss(
    apply_fn: Callable[..., Any], l2: float, params: Any, fit: Labelled, held_out: Labelled
) -> jax.Array:
    def examples(labelled: Labelled) -> tuple[jax.Array, jax.Array]:
        sentences, targets_NxKxC = labelled
        words = (sentences.tokens_BxT, sentences.lengths_B)
        return sentence_features(apply_fn, params, *words, POOLING), targets_NxKxC

    return unexplained_variance(examples(fit), examples(held_out), l2)
