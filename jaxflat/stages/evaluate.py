"""How far a checkpoint is from the optimum."""

import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxflat import experiment, sharding
from jaxflat.config import Config
from jaxflat.languages.masking import mask_each, mask_id
from jaxflat.languages.sentences import Sentences
from jaxflat.models.transformer import Transformer
from jaxflat.stages.records import Record, load_params, mean_estimate, record
from jaxflat.training.objectives import masked_conditionals, sentence_losses


def evaluate(config: Config, directory: Path, step: int) -> list[Record]:
    """Measure loss, optimal_loss and excess_loss in nats on the language's evaluation set."""
    sentences, exact_SxTxV = evaluation_set(config.language, config.evaluation.num_sentences)
    tokens_SxT, lengths_S = sentences.tokens_BxT, sentences.lengths_B
    if config.phase_order:
        params = load_params(config, directory, step)
        mesh = experiment.make_mesh(config)
        model, batch_size = experiment.make_model(config), config.evaluation.batch_size
        log_probs_SxTxV = _conditionals(model, mesh, batch_size, params, tokens_SxT, lengths_S)
    else:  # the lookup table: what it says is exact
        log_probs_SxTxV = exact_SxTxV
    losses = jax.jit(sentence_losses)(log_probs_SxTxV, exact_SxTxV, tokens_SxT, lengths_S)
    return [record(step, name, mean_estimate(losses[name])) for name in losses]


@functools.cache
def evaluation_set(language: Config, num_sentences: int) -> tuple[Sentences, jax.Array]:
    """Return the language's evaluation sentences and their exact conditionals, BxTxV nats."""
    made = experiment.make_language(language)
    sentences = made.sample(experiment.purpose_key(language.seed, "evaluation"), num_sentences)
    return sentences, made.conditional_log_probs(sentences.tokens_BxT, sentences.lengths_B)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "batch_size"))
def _conditionals(
    model: Transformer,
    mesh: Mesh,
    batch_size: int,
    params: Any,
    tokens_SxT: jax.Array,
    lengths_S: jax.Array,
) -> jax.Array:
    """Return the model's conditionals of all words, `batch_size` sentences at a time."""

    def batch(examples: tuple[jax.Array, jax.Array]) -> jax.Array:
        tokens_BxT, lengths_B = sharding.shard_examples(mesh, examples)
        masked_BxTxT = mask_each(tokens_BxT, lengths_B, mask_id(model.num_words))
        return masked_conditionals(model.apply, params, masked_BxTxT, lengths_B)

    batches = jax.tree.map(
        lambda x: x.reshape(-1, batch_size, *x.shape[1:]), (tokens_SxT, lengths_S)
    )
    log_probs_NxBxTxV = jax.lax.map(batch, batches)
    return log_probs_NxBxTxV.reshape(len(tokens_SxT), *log_probs_NxBxTxV.shape[2:])
