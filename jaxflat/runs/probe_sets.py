"""The labelled sentences on which probes are trained, tuned and tested."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.config import Config
from jaxflat.flatness import Estimate, ratio_estimate
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import all_labels, posteriors
from jaxflat.runs import builders
from jaxflat.runs.languages import language_kind, make_language

GIVEN = "given"  # the labeling of sentences labelled by people


LabelledSet = tuple[Sentences, jax.Array, jax.Array]
"""(sentences, labels_KxN, valid_KxN)"""


class ExactPosteriors(NamedTuple):
    """Exact posteriors of J tasks' hidden symbols, given the sentences of a ProbeSets.

    Each part is (probs_JxNxC, valid_JxN), with a leading axis of draws in `train`. spans: the
    half-open range of words (start, end) that each symbol generates.
    """

    names: list[str]
    spans: tuple[tuple[int, int], ...]
    train: tuple[jax.Array, jax.Array]
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


class ProbeSets(NamedTuple):
    """Labelled sentences of K (task, labeling) pairs; `train` has a leading axis of draws.

    finetune: like `train`, draws for fine-tuning, or None if it is not requested. bayes, exact: the
    best possible accuracies and the posteriors, empty or None for labels given by people.
    """

    names: list[str]
    num_classes: int
    train: LabelledSet
    finetune: LabelledSet | None
    validation: LabelledSet
    test: LabelledSet
    bayes: dict[str, Estimate]
    exact: ExactPosteriors | None


def probe_sets(language: Config, settings: Config, seed: int) -> list[ProbeSets]:
    """Return a ProbeSets of all tasks with hidden symbols, and one of each human-labelled task."""
    tasks = make_language(language).tasks
    sampled = [_sampled_sets(language, settings, seed)] if tasks else []
    given = language_kind(language).labelled_sentences(language)
    return sampled + [_given_sets(name, language, settings, seed) for name in given]


@functools.cache
def _sampled_sets(language: Config, settings: Config, seed: int) -> ProbeSets:
    """Return the sentences and labels of all tasks."""
    sampler = make_language(language)
    tasks, chosen = sampler.tasks, settings.finetune
    num_classes = max(task.num_classes for task in tasks.values())

    def labelled(
        key: jax.Array, num_sentences: int
    ) -> tuple[LabelledSet, tuple[jax.Array, jax.Array]]:
        sentences = sampler.sample(key, num_sentences)
        exact = posteriors(tasks, sentences)
        labels = all_labels(tasks, sentences, settings.labelings, exact).values()
        labels_KxN, valid_KxN = (jnp.stack(column) for column in zip(*labels, strict=True))
        part = (sentences, labels_KxN, valid_KxN)
        return part, (
            jnp.stack([_widened(probs_NxC, num_classes) for probs_NxC in exact.values()]),
            jnp.stack([task.labels(sentences)[1] for task in tasks.values()]),
        )

    def draws(num_draws: int, shots: int) -> tuple[LabelledSet, tuple[jax.Array, jax.Array]]:
        keys = jax.random.split(builders.purpose_key(seed, "probe"), num_draws)
        return jax.tree.map(lambda *x: jnp.stack(x), *[labelled(key, shots) for key in keys])

    train, exact_train = draws(settings.num_draws, max(settings.shots))
    validation, exact_validation = labelled(
        builders.purpose_key(seed, "probe_validation"), settings.num_validation
    )
    test, exact_test = labelled(builders.purpose_key(seed, "probe_test"), settings.num_test)
    spans = tuple(task.span for task in tasks.values())
    pairs = [(name, labeling) for name in tasks for labeling in settings.labelings]
    posterior_of = dict(zip(tasks, exact_test[0], strict=True))
    return ProbeSets(
        names=[f"{name}.{labeling}" for name, labeling in pairs],
        num_classes=num_classes,
        train=train,
        finetune=draws(chosen.num_draws, chosen.shots)[0] if chosen.shots else None,
        validation=validation,
        test=test,
        bayes={
            f"{name}.{labeling}": bayes_accuracy(labeling, posterior_of[name], valid_N)
            for (name, labeling), valid_N in zip(pairs, test[2], strict=True)
        },
        exact=ExactPosteriors(list(tasks), spans, exact_train, exact_validation, exact_test),
    )


def _widened(probs_NxC: jax.Array, num_classes: int) -> jax.Array:
    return jnp.pad(probs_NxC, ((0, 0), (0, num_classes - probs_NxC.shape[1])))


def bayes_accuracy(labeling: str, posterior_NxC: jax.Array, valid_N: jax.Array) -> Estimate:
    """Return the best accuracy of any function of the words: E[max_c p(c | x)] for latent labels.

    The other labels are functions of the words, so their ceiling is 1.
    """
    best_N = posterior_NxC.max(1) if labeling == "latent" else jnp.ones(len(valid_N))
    weights_N = valid_N.astype(best_N.dtype)
    return ratio_estimate(best_N * weights_N, weights_N, over="sentences")


@functools.cache
def _given_sets(name: str, language: Config, settings: Config, seed: int) -> ProbeSets:
    """Return a random split of the labelled sentences.

    Parts are disjoint within a seed; parts of different seeds may overlap.
    """
    labelled = language_kind(language).labelled_sentences(language)[name]
    num_test, num_validation = settings.num_test, settings.num_validation
    order_N = jax.random.permutation(
        builders.purpose_key(seed, "probe_test"), len(labelled.labels_N)
    )
    validation_key = builders.purpose_key(seed, "probe_validation")
    rest_N = jax.random.permutation(validation_key, order_N[num_test:])
    pool_N = jax.random.permutation(builders.purpose_key(seed, "probe"), rest_N[num_validation:])

    def rows(ids_N: jax.Array) -> LabelledSet:
        labels_1xN = jnp.asarray(labelled.labels_N)[ids_N][None]
        sentences = jax.tree.map(lambda x: x[ids_N], labelled.sentences)
        return sentences, labels_1xN, jnp.ones_like(labels_1xN, dtype=bool)

    def draws(num_draws: int, shots: int) -> LabelledSet:
        parts = [rows(pool_N[d * shots : (d + 1) * shots]) for d in range(num_draws)]
        return jax.tree.map(lambda *x: jnp.stack(x), *parts)

    chosen = settings.finetune
    return ProbeSets(
        names=[f"{name}.{GIVEN}"],
        num_classes=labelled.num_classes,
        train=draws(settings.num_draws, max(settings.shots)),
        finetune=draws(chosen.num_draws, chosen.shots) if chosen.shots else None,
        validation=rows(rest_N[:num_validation]),
        test=rows(order_N[:num_test]),
        bayes={},
        exact=None,
    )
