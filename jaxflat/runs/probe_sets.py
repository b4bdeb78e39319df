"""The labelled sentences that probes are trained, tuned and tested on."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.config import Config
from jaxflat.flatness import Estimate, ratio_estimate
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import all_labels, posteriors
from jaxflat.runs import experiment
from jaxflat.runs.languages import kind_of, make_language

GIVEN = "given"  # the labeling of sentences that people labelled


Part = tuple[Sentences, jax.Array, jax.Array]
"""(sentences, labels_KxN, valid_KxN)"""


class Known(NamedTuple):
    """What the words tell of J tasks' symbols, beside the sentences of a ProbeSets.

    Each part is (probs_JxNxC, valid_JxN), with a leading axis of draws in `train`. spans: the words
    (from, up to) that each symbol is about.
    """

    names: list[str]
    spans: tuple[tuple[int, int], ...]
    train: tuple[jax.Array, jax.Array]
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


class ProbeSets(NamedTuple):
    """Labelled sentences of K (task, labeling) pairs; `train` has a leading axis of draws.

    finetune: like `train`, for fine-tuning; None without it. bayes, known: the Bayes accuracy and
    the posteriors; empty and None for labels that people gave.
    """

    names: list[str]
    num_classes: int
    train: Part
    finetune: Part | None
    validation: Part
    test: Part
    bayes: dict[str, Estimate]
    known: Known | None


def probe_sets(language: Config, settings: Config, seed: int) -> list[ProbeSets]:
    """Return the language's own tasks together, and each task whose labels are given by itself."""
    made = make_language(language)
    own = [_sampled_sets(language, settings, seed)] if made.tasks else []
    given = kind_of(language).labelled_sentences(language)
    return own + [_given_sets(name, language, settings, seed) for name in given]


@functools.cache
def _sampled_sets(language: Config, settings: Config, seed: int) -> ProbeSets:
    """Return the sentences and labels of all tasks; the test sentences belong to the language."""
    made = make_language(language)
    tasks, chosen = made.tasks, settings.finetune
    num_classes = max(task.num_classes for task in tasks.values())

    def labelled(key: jax.Array, num_sentences: int) -> tuple[Part, tuple[jax.Array, jax.Array]]:
        sentences = made.sample(key, num_sentences)
        known = posteriors(tasks, sentences)
        labels = all_labels(tasks, sentences, settings.labelings, known).values()
        labels_KxN, valid_KxN = (jnp.stack(column) for column in zip(*labels, strict=True))
        part = (sentences, labels_KxN, valid_KxN)
        return part, (
            jnp.stack([_widened(probs_NxC, num_classes) for probs_NxC in known.values()]),
            jnp.stack([task.labels(sentences)[1] for task in tasks.values()]),
        )

    def draws(num_draws: int, shots: int) -> tuple[Part, tuple[jax.Array, jax.Array]]:
        keys = jax.random.split(experiment.purpose_key(seed, "probe"), num_draws)
        return jax.tree.map(lambda *x: jnp.stack(x), *[labelled(key, shots) for key in keys])

    train, known_train = draws(settings.num_draws, max(settings.shots))
    validation, known_validation = labelled(
        experiment.purpose_key(seed, "probe_validation"), settings.num_validation
    )
    test, known_test = labelled(experiment.purpose_key(language.seed, "test"), settings.num_test)
    spans = tuple(task.span for task in tasks.values())
    pairs = [(name, labeling) for name in tasks for labeling in settings.labelings]
    posterior_of = dict(zip(tasks, known_test[0], strict=True))
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
        known=Known(list(tasks), spans, known_train, known_validation, known_test),
    )


def _widened(probs_NxC: jax.Array, num_classes: int) -> jax.Array:
    return jnp.pad(probs_NxC, ((0, 0), (0, num_classes - probs_NxC.shape[1])))


def bayes_accuracy(labeling: str, posterior_NxC: jax.Array, valid_N: jax.Array) -> Estimate:
    """Return the best accuracy any function of the words can have: E[max_c p(c | x)] for latents.

    The other labels are functions of the words: their ceiling is 1.
    """
    best_N = posterior_NxC.max(1) if labeling == "latent" else jnp.ones(len(valid_N))
    weights_N = valid_N.astype(best_N.dtype)
    return ratio_estimate(best_N * weights_N, weights_N, over="sentences")


@functools.cache
def _given_sets(name: str, language: Config, settings: Config, seed: int) -> ProbeSets:
    """Return a keyed split: test sentences belong to the language, the rest is the seed's.

    Draws of training sentences are disjoint. Other seeds draw from the same rest.
    """
    found = kind_of(language).labelled_sentences(language)[name]
    num_test, num_validation = settings.num_test, settings.num_validation
    order_N = jax.random.permutation(
        experiment.purpose_key(language.seed, "test"), len(found.labels_N)
    )
    validation_key = experiment.purpose_key(seed, "probe_validation")
    rest_N = jax.random.permutation(validation_key, order_N[num_test:])
    pool_N = jax.random.permutation(experiment.purpose_key(seed, "probe"), rest_N[num_validation:])

    def rows(ids_N: jax.Array) -> Part:
        labels_1xN = jnp.asarray(found.labels_N)[ids_N][None]
        sentences = jax.tree.map(lambda x: x[ids_N], found.sentences)
        return sentences, labels_1xN, jnp.ones_like(labels_1xN, dtype=bool)

    def draws(num_draws: int, shots: int) -> Part:
        parts = [rows(pool_N[d * shots : (d + 1) * shots]) for d in range(num_draws)]
        return jax.tree.map(lambda *x: jnp.stack(x), *parts)

    chosen = settings.finetune
    return ProbeSets(
        names=[f"{name}.{GIVEN}"],
        num_classes=found.num_classes,
        train=draws(settings.num_draws, max(settings.shots)),
        finetune=draws(chosen.num_draws, chosen.shots) if chosen.shots else None,
        validation=rows(rest_N[:num_validation]),
        test=rows(order_N[:num_test]),
        bayes={},
        known=None,
    )
