"""What a linear probe reads out of a checkpoint's representations."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat import experiment
from jaxflat.config import Config
from jaxflat.flatness import Estimate, ratio_estimate
from jaxflat.languages.sentences import Sentences
from jaxflat.models.lookup_table import lookup_features
from jaxflat.models.transformer import Transformer
from jaxflat.probes.features import pool, sentence_features
from jaxflat.probes.linear import Labelled, linear_probe_correct
from jaxflat.stages.probe_sets import ProbeSets, probe_sets
from jaxflat.stages.records import Record, load_params, record
from jaxflat.trajectory import Snapshot

SLICE = 512  # sentences whose representations are computed at once


def probe(config: Config, directory: Path, snapshot: Snapshot) -> list[Record]:
    """Measure probe accuracy by task, labeling and shots, and the Bayes accuracy beside it."""
    if config.model.name == "lookup_table":
        source = (config.model.features, experiment.make_language(config.language))
    else:
        source = (experiment.make_model(config), load_params(config, directory, snapshot))
    groups = probe_sets(config.language, config.probes, config.probe_seed)
    return [line for sets in groups for line in _records(config.probes, source, sets, snapshot)]


def _records(
    settings: Config, source: tuple[Any, Any], sets: ProbeSets, snapshot: Snapshot
) -> list[Record]:
    parts = [
        _featurize(settings.pooling, *source, *part)
        for part in (sets.train, sets.validation, sets.test)
    ]
    records = []
    correct = _probe_correct(
        *parts,
        jnp.asarray(settings.l2),
        shots=settings.shots,
        num_classes=sets.num_classes,
        iterations=settings.iterations,
    )
    for k, name in enumerate(sets.names):
        for shots, correct_DxKxN in zip(settings.shots, correct, strict=True):
            accuracy = accuracy_estimate(correct_DxKxN[:, k], sets.test[2][k])
            records.append(record(snapshot, f"linear_probe/{name}/{shots}", accuracy))
        if name in sets.bayes:
            records.append(record(snapshot, f"bayes/{name}", sets.bayes[name]))
    return records


def accuracy_estimate(correct_DxN: jax.Array, valid_N: jax.Array) -> Estimate:
    """Return the mean accuracy over valid test sentences and D draws of training sentences.

    SEM^2 = (variance over sentences) / N + (variance over draws) / D.
    """
    hits_N = jnp.where(valid_N, correct_DxN.mean(0), 0)
    over_sentences = ratio_estimate(hits_N, valid_N.astype(hits_N.dtype), over="sentences")
    num_draws = len(correct_DxN)
    if num_draws == 1:
        return over_sentences
    accuracies_D = (correct_DxN & valid_N[None]).sum(1) / valid_N.sum()
    sem = jnp.sqrt(over_sentences.sem**2 + accuracies_D.var(ddof=1) / num_draws)
    return Estimate(over_sentences.mean, sem, num_draws, "draws+sentences")


@functools.partial(jax.jit, static_argnames=("model", "pooling"))
def _featurize(
    pooling: str,
    model: Transformer | str,
    source: Any,
    sentences: Sentences,
    labels_KxN: jax.Array,
    valid_KxN: jax.Array,
) -> Labelled:
    """Return features of a trained model (source: its parameters) or of the lookup table
    (model: which features; source: the language), with the labels beside them."""
    leading = sentences.lengths_B.shape
    tokens_NxT = sentences.tokens_BxT.reshape(-1, sentences.tokens_BxT.shape[-1])

    def features(sentence: tuple[jax.Array, jax.Array]) -> jax.Array:
        tokens_1xT, length_1 = sentence[0][None], sentence[1][None]
        if isinstance(model, str):
            log_probs_1xTxV = source.conditional_log_probs(tokens_1xT, length_1)
            return pool(lookup_features(log_probs_1xTxV, model), length_1, pooling)[0]
        return sentence_features(model.apply, source, tokens_1xT, length_1, pooling)[0]

    sentences_N = (tokens_NxT, sentences.lengths_B.reshape(-1))
    features_NxF = jax.lax.map(features, sentences_N, batch_size=SLICE)
    return Labelled(features_NxF.reshape(*leading, -1), labels_KxN, valid_KxN)


@functools.partial(jax.jit, static_argnames=("shots", "num_classes", "iterations"))
def _probe_correct(
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    l2_L: jax.Array,
    *,
    shots: tuple[int, ...],
    num_classes: int,
    iterations: int,
) -> list[jax.Array]:
    """Return correct_DxKxN for each number of shots: all fits in one compiled call."""

    def fits(shots: int) -> jax.Array:
        def fit(draw: Labelled) -> jax.Array:
            return linear_probe_correct(
                draw,
                validation,
                test,
                l2_L,
                shots=shots,
                num_classes=num_classes,
                iterations=iterations,
            )

        return jax.lax.map(fit, train)

    return [fits(s) for s in shots]
