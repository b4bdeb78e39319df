"""Measure a checkpoint's transfer: linear probes, belief states, fine-tuning, a user's probe."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxflat.config import Config, functions
from jaxflat.distributed import sharding
from jaxflat.languages.batches import log_probs_by_word
from jaxflat.languages.sentences import Sentences
from jaxflat.models.language_model import LanguageModel
from jaxflat.models.lookup_table import lookup_features
from jaxflat.probes.features import pool, random_projection, span_mean
from jaxflat.probes.linear import LabelledFeatures, linear_probe_correct
from jaxflat.runs import builders
from jaxflat.runs.labelled_sentences import partly_labelled
from jaxflat.runs.languages import make_language
from jaxflat.runs.measure_belief_states import belief_state_determinations
from jaxflat.runs.measure_finetuning import finetuned_accuracies
from jaxflat.runs.measurements import Estimates, PartialResults, load_params
from jaxflat.runs.probe_estimates import accuracy_estimate
from jaxflat.runs.probe_sets import ProbeSets, probe_sets
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder

SLICE = 512  # sentences whose representations are computed together, at most


SAMPLED = ("num_draws", "num_validation", "num_test")
MEASURES = {
    "linear_probe": ("labelings", "shots", "pooling", "l2", "iterations"),
    "linear_probe_projected": (
        *("labelings", "shots", "pooling", "l2", "iterations"),
        "projected_dimension",
    ),
    "belief_state": ("shots", "l2"),
    "finetune": ("labelings", "finetune"),
}
"""The keys of `probes` on which each measure depends, in addition to SAMPLED."""


class LookupFeatures(NamedTuple):
    """What probes see of a lookup table: "p" or "log_p" of the words that a masking hides."""

    kind: str
    masking: str


def settings(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings on which each requested measure depends, except training's.

    `test_sentences` distinguishes them from results of older versions, in which the test sentences
    belonged to the language. `sentences` does so where older versions may have counted unlabelled
    sentences.
    """
    chosen, trained = config.probes, config.model.name != "lookup_table"
    seed = {"probe_seed": config.probe_seed, "test_sentences": "of probe_seed"}
    if partly_labelled(config.language, chosen):
        seed["sentences"] = "first labelled"
    own = dict.fromkeys(functions.sections_in(chosen), True)
    requested = own | {
        "linear_probe": True,
        "linear_probe_projected": chosen.projected_dimension > 0,
        "belief_state": chosen.belief_state,
        "finetune": chosen.finetune.shots > 0 and trained,
    }
    keys_of = MEASURES | {name: ("labelings", "shots", "pooling", name) for name in own}
    return {
        name: {key: chosen[key] for key in (*SAMPLED, *keys)} | seed
        for name, keys in keys_of.items()
        if requested[name]
    }


def measure(
    config: Config,
    folder: Folder,
    checkpoint: Checkpoint,
    measures: Sequence[str],
    partial_results: PartialResults,
) -> Iterator[tuple[str, Estimates]]:
    """Yield the accuracies and R^2 of each measure; linear_probe includes the Bayes accuracies."""
    if config.model.name == "lookup_table":
        kind = LookupFeatures(config.model.features, config.language.masking)
        source = (kind, make_language(config.language))
    else:
        source = (builders.make_model(config), load_params(config, folder, checkpoint))
    estimates: dict[str, Estimates] = {name: {} for name in measures}
    for sets in probe_sets(config.language, config.probes, config.probe_seed):
        computations = _linear_computations(config, source, sets)
        if sets.names and sets.finetune is not None:
            computations["finetune"] = functools.partial(
                finetuned_accuracies, config, *source, sets, partial_results
            )
        for name in measures:
            if name in computations:
                estimates[name] |= partial_results.estimates(
                    f"{sets.title}/{name}", computations[name]
                )
    yield from estimates.items()


def _linear_computations(
    config: Config, source: tuple[Any, Any], sets: ProbeSets
) -> dict[str, Callable[[], Estimates]]:
    """Return a function for each measure that fits linear maps of the representations.

    The representations are computed once for all measures. They are too large to save at an
    interruption.
    """
    settings, exact, mesh = config.probes, sets.exact, builders.make_mesh(config)
    spans = exact.spans if exact and settings.belief_state else ()

    @functools.cache
    def represented() -> tuple[Any, Any]:
        sentences = [part[0] for part in (sets.train, sets.validation, sets.test)]
        return _featurize(settings.pooling, spans, mesh, *source, sentences)

    def linear() -> Estimates:
        bayes = {f"bayes/{name}": best for name, best in sets.bayes.items()}
        return _linear_accuracies(settings, represented()[0], sets, "linear_probe") | bayes

    def projected() -> Estimates:
        features = represented()[0]
        key = builders.purpose_key(config.language.seed, "probe_projection")
        matrix_FxP = random_projection(key, features[0].shape[-1], settings.projected_dimension)
        features = tuple(x @ matrix_FxP for x in features)
        return _linear_accuracies(settings, features, sets, "linear_probe_projected")

    def belief_state() -> Estimates:
        assert exact
        return belief_state_determinations(settings, represented()[1], exact)

    def own(name: str) -> Estimates:
        return custom_probe_accuracies(config, represented()[0], sets, name)

    computations = {"belief_state": belief_state} if spans else {}
    if not sets.names:
        return computations
    computations |= {"linear_probe": linear, "linear_probe_projected": projected}
    return computations | {
        name: functools.partial(own, name) for name in functions.sections_in(settings)
    }


def custom_probe_accuracies(
    config: Config, features: tuple[jax.Array, ...], sets: ProbeSets, name: str
) -> Estimates:
    """Return the accuracies of a user's probe, fitted by each draw to the sentences with labels.

    features: train_DxNxF, validation_NxF and test_NxF. Raises ValueError if the probe does not
    return a label for each test sentence.
    """
    on_all = sharding.replicate(builders.make_mesh(config), features)
    train_DxNxF, _, test_MxF = sharding.to_host(on_all)
    _, labels_DxKxN, valid_DxKxN = sets.train
    _, test_labels_KxM, test_valid_KxM = sets.test
    key = builders.purpose_key(config.probe_seed, f"probe/{name}")

    def correct_M(draw: int, k: int, shots: int) -> np.ndarray:
        valid_S = np.asarray(valid_DxKxN[draw, k, :shots])
        predicted_M = functions.call(
            config.probes[name],
            key=jax.random.fold_in(key, draw),
            features_NxF=train_DxNxF[draw, :shots][valid_S],
            labels_N=np.asarray(labels_DxKxN[draw, k, :shots])[valid_S],
            test_features_MxF=test_MxF,
            num_classes=sets.num_classes,
        )
        if np.shape(predicted_M) != test_MxF.shape[:1]:
            raise ValueError(
                f"probes.{name} returns an array of shape {np.shape(predicted_M)}; it must return "
                f"a label for each of the {len(test_MxF)} rows of test_features_MxF"
            )
        return np.asarray(predicted_M) == np.asarray(test_labels_KxM[k])

    return {
        f"{name}/{task}/{shots}": accuracy_estimate(
            jnp.stack([correct_M(draw, k, shots) for draw in range(len(train_DxNxF))]),
            test_valid_KxM[k],
        )
        for k, task in enumerate(sets.names)
        for shots in config.probes.shots
    }


def _linear_accuracies(
    settings: Config, features: tuple[jax.Array, ...], sets: ProbeSets, measure: str
) -> Estimates:
    parts = (sets.train, sets.validation, sets.test)
    correct = _probe_correct(
        *(
            LabelledFeatures(x, labels, valid)
            for x, (_, labels, valid) in zip(features, parts, strict=True)
        ),
        jnp.asarray(settings.l2),
        shots=settings.shots,
        num_classes=sets.num_classes,
        iterations=settings.iterations,
    )
    return {
        f"{measure}/{name}/{shots}": accuracy_estimate(correct_DxKxN[:, k], sets.test[2][k])
        for k, name in enumerate(sets.names)
        for shots, correct_DxKxN in zip(settings.shots, correct, strict=True)
    }


@functools.partial(jax.jit, static_argnames=("pooling", "spans", "mesh", "model"))
def _featurize(
    pooling: str,
    spans: tuple[tuple[int, int], ...],
    mesh: Mesh,
    model: LanguageModel | LookupFeatures,
    source: Any,
    parts: list[Sentences],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]]:
    """Return each part's features_NxF and local_JxNxD, divided over the devices.

    This is one compiled call, which an interrupted run repeats when it resumes. With a trained
    model, `source` holds its parameters. With LookupFeatures, `source` is the language.
    """
    by_part = [_features(pooling, spans, mesh, model, source, sentences) for sentences in parts]
    features, local = zip(*by_part, strict=True)
    return sharding.divide(mesh, (features, local))


def _features(
    pooling: str,
    spans: tuple[tuple[int, int], ...],
    mesh: Mesh,
    model: LanguageModel | LookupFeatures,
    source: Any,
    sentences: Sentences,
) -> tuple[jax.Array, jax.Array | None]:
    """Return features_NxF and means over spans, local_JxNxD or None; draws are leading axes.

    Devices divide the sentences of each slice.
    """

    def representations(tokens_BxT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        if isinstance(model, LookupFeatures):
            log_probs_BxTxV = log_probs_by_word(source, tokens_BxT, lengths_B, model.masking)
            return lookup_features(log_probs_BxTxV, model.kind)
        outputs: Any = model.apply({"params": source}, tokens_BxT, lengths_B)
        return outputs[1]["features_BxMxD"]

    def features(sentences_B: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        tokens_BxT, lengths_B = sharding.shard_examples(mesh, sentences_B)
        features_BxTxD = representations(tokens_BxT, lengths_B)
        local = [span_mean(features_BxTxD, lengths_B, span) for span in spans]
        return pool(features_BxTxD, lengths_B, pooling), local

    leading = sentences.lengths_B.shape
    tokens_NxT = sentences.tokens_BxT.reshape(-1, sentences.tokens_BxT.shape[-1])
    slices = _slices((tokens_NxT, sentences.lengths_B.reshape(-1)), mesh.size)

    def of_all(x_SxBxF: jax.Array) -> jax.Array:
        x_NxF = x_SxBxF.reshape(-1, x_SxBxF.shape[-1])[: len(tokens_NxT)]
        return x_NxF.reshape(*leading, -1)

    features_SxBxF, local = jax.lax.map(features, slices)
    local_JxNxD = jnp.stack([of_all(x) for x in local], axis=-3) if spans else None
    return of_all(features_SxBxF), local_JxNxD


def _slices(sentences_N: Any, num_devices: int) -> Any:
    """Return S slices of B sentences, S x B leading axes; copies of the last one fill the last.

    B is a multiple of num_devices, and about SLICE or less.
    """
    number = len(jax.tree.leaves(sentences_N)[0])
    num_slices = -(-number // SLICE)
    size = -(-number // (num_slices * num_devices)) * num_devices
    ids_SxB = np.minimum(np.arange(num_slices * size), number - 1).reshape(num_slices, size)
    return jax.tree.map(lambda x: x[ids_SxB], sentences_N)


@functools.partial(jax.jit, static_argnames=("shots", "num_classes", "iterations"))
def _probe_correct(
    train: LabelledFeatures,
    validation: LabelledFeatures,
    test: LabelledFeatures,
    l2_L: jax.Array,
    *,
    shots: tuple[int, ...],
    num_classes: int,
    iterations: int,
) -> list[jax.Array]:
    """Return correct_DxKxN for each number of shots; all fits are one compiled call."""

    def fits(shots: int) -> jax.Array:
        def fit(draw: LabelledFeatures) -> jax.Array:
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
