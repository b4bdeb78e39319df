"""The labelled sentences that probes are trained, tuned and tested on."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxflat import experiment
from jaxflat.config import Config
from jaxflat.flatness import Estimate, ratio_estimate
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import all_labels, posteriors
from jaxflat.text_language import labelled_sentences

GIVEN = "given"  # the labeling of sentences that people labelled


class ProbeSets(NamedTuple):
    """Labelled sentences of K (task, labeling) pairs; `train` has a leading axis of draws.

    Each part is (sentences, labels_KxN, valid_KxN). bayes: the best accuracy, where it is known.
    """

    names: list[str]
    num_classes: int
    train: tuple[Sentences, jax.Array, jax.Array]
    validation: tuple[Sentences, jax.Array, jax.Array]
    test: tuple[Sentences, jax.Array, jax.Array]
    bayes: dict[str, Estimate]


def probe_sets(language: Config, settings: Config, seed: int) -> list[ProbeSets]:
    """Return the language's own tasks together, and each task whose labels are given by itself."""
    made = experiment.make_language(language)
    own = [_sampled_sets(language, settings, seed)] if made.tasks else []
    given = labelled_sentences(language)
    return own + [_given_sets(name, language, settings, seed) for name in given]


@functools.cache
def _sampled_sets(language: Config, settings: Config, seed: int) -> ProbeSets:
    """Return the sentences and labels of all tasks; the test sentences belong to the language."""
    made = experiment.make_language(language)
    pairs = [(name, labeling) for name in made.tasks for labeling in settings.labelings]

    def labelled(key: jax.Array, num_sentences: int) -> tuple[Sentences, jax.Array, jax.Array]:
        sentences = made.sample(key, num_sentences)
        labels = all_labels(made.tasks, sentences, settings.labelings).values()
        labels_KxN, valid_KxN = (jnp.stack(column) for column in zip(*labels, strict=True))
        return sentences, labels_KxN, valid_KxN

    train_keys = jax.random.split(experiment.purpose_key(seed, "probe"), settings.num_draws)
    draws = [labelled(key, max(settings.shots)) for key in train_keys]
    test = labelled(experiment.purpose_key(language.seed, "test"), settings.num_test)
    known = posteriors(made.tasks, test[0])
    return ProbeSets(
        names=[f"{name}.{labeling}" for name, labeling in pairs],
        num_classes=max(task.num_classes for task in made.tasks.values()),
        train=jax.tree.map(lambda *x: jnp.stack(x), *draws),
        validation=labelled(
            experiment.purpose_key(seed, "probe_validation"), settings.num_validation
        ),
        test=test,
        bayes={
            f"{name}.{labeling}": bayes_accuracy(labeling, known[name], valid_N)
            for (name, labeling), valid_N in zip(pairs, test[2], strict=True)
        },
    )


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

    Draws of training sentences are disjoint; those of other seeds come from the same rest.
    """
    found = labelled_sentences(language)[name]
    num_test, num_validation = settings.num_test, settings.num_validation
    order_N = jax.random.permutation(
        experiment.purpose_key(language.seed, "test"), len(found.labels_N)
    )
    validation_key = experiment.purpose_key(seed, "probe_validation")
    rest_N = jax.random.permutation(validation_key, order_N[num_test:])
    pool_N = jax.random.permutation(experiment.purpose_key(seed, "probe"), rest_N[num_validation:])
    num_shots = max(settings.shots)
    draws = [pool_N[d * num_shots : (d + 1) * num_shots] for d in range(settings.num_draws)]

    def rows(ids_N: jax.Array) -> tuple[Sentences, jax.Array, jax.Array]:
        labels_1xN = jnp.asarray(found.labels_N)[ids_N][None]
        sentences = jax.tree.map(lambda x: x[ids_N], found.sentences)
        return sentences, labels_1xN, jnp.ones_like(labels_1xN, dtype=bool)

    parts = [rows(draw) for draw in draws]
    return ProbeSets(
        names=[f"{name}.{GIVEN}"],
        num_classes=found.num_classes,
        train=jax.tree.map(lambda *x: jnp.stack(x), *parts),
        validation=rows(rest_N[:num_validation]),
        test=rows(order_N[:num_test]),
        bayes={},
    )
