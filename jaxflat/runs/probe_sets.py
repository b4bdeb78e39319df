"""The labelled sentences on which probes are trained, tuned and tested."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.config import Config
from jaxflat.flatness import Estimate, ratio_estimate
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import Task, posteriors
from jaxflat.runs import builders
from jaxflat.runs.exact_posteriors import Belief, ExactPosteriors, Posteriors, exact_beliefs
from jaxflat.runs.labelled_sentences import Drawn, LabelKind, draw_labelled, kind_of, label_kinds
from jaxflat.runs.languages import language_kind, make_language

GIVEN = "given"  # the labeling of sentences labelled by people


class Parts(NamedTuple):
    """The draws for training and for fine-tuning, the validation and the test sentences."""

    train: list[Any]
    finetune: list[Any]
    validation: Any
    test: Any

    def of(self, k: int) -> "Parts":
        """Return the sentences with a label of kind k, where each part is Drawn."""
        train, finetune = ([drawn.of(k) for drawn in draws] for draws in self[:2])
        return Parts(train, finetune, self.validation.of(k), self.test.of(k))


LabelledSet = tuple[Sentences, Any, Any]
"""(sentences, labels_KxN, valid_KxN); K = 0: no arrays"""


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

    @property
    def title(self) -> str:
        """Return the first name: of the labels, or of the posteriors if there are no labels."""
        return (self.names or (self.exact.names if self.exact else []))[0]


def probe_sets(language: Config, settings: Config, seed: int) -> list[ProbeSets]:
    """Return the ProbeSets of all tasks with hidden symbols, and one of each human-labelled task.

    Every sentence has all labels of its ProbeSets. So tasks that exist in different sentences are
    in different ProbeSets.
    """
    kind = language_kind(language)
    sampled = _sampled_sets(language, settings, seed) if kind.has_tasks else ()
    given = kind.labelled_sentences(language)
    return [*sampled, *(_given_sets(name, language, settings, seed) for name in given)]


@functools.cache
def _sampled_sets(language: Config, settings: Config, seed: int) -> tuple[ProbeSets, ...]:
    """Return one ProbeSets for all kinds whose labelled sentences are the same."""
    sampler, chosen = make_language(language), settings.finetune
    kinds = label_kinds(list(sampler.tasks), settings)
    if not kinds:
        return ()
    draw = functools.partial(draw_labelled, sampler, kinds=kinds)
    key = builders.purpose_key(seed, "probe")

    def draws(num_draws: int, shots: int) -> list[Drawn]:
        return [draw(k, shots) for k in jax.random.split(key, num_draws)]

    parts = Parts(
        train=draws(settings.num_draws, max(settings.shots)),
        finetune=draws(chosen.num_draws, chosen.shots) if chosen.shots else [],
        validation=draw(builders.purpose_key(seed, "probe_validation"), settings.num_validation),
        test=draw(builders.purpose_key(seed, "probe_test"), settings.num_test),
    )
    all_drawn = [*parts.train, *parts.finetune, parts.validation, parts.test]
    groups: dict[bytes, list[LabelKind]] = {}
    for k, kind in enumerate(kinds):
        rows = b"".join(drawn.rows_KxN[k].tobytes() for drawn in all_drawn)
        groups.setdefault(rows, []).append(kind)
    return tuple(
        _sets_at(
            group,
            sampler.tasks,
            settings,
            language.masking,
            parts.of(kinds.index(group[0])),
        )
        for group in groups.values()
    )


def _sets_at(
    kinds: Sequence[LabelKind],
    all_tasks: Mapping[str, Task],
    settings: Config,
    masking: str,
    parts: Parts,
) -> ProbeSets:
    """Return the ProbeSets of sentences that have a label of each of these kinds."""
    tasks = {name: all_tasks[name] for name, _ in kinds}
    labelings = settings.labelings
    pairs = [(name, of) for name in tasks for of in labelings if kind_of(name, of) in kinds]
    latent = {name: task for name, task in tasks.items() if kind_of(name, "latent") in kinds}
    believed = latent if settings.belief_state else {}
    num_classes = max(task.num_classes for task in tasks.values())

    def labelled(
        sentences: Sentences,
    ) -> tuple[LabelledSet, dict[str, jax.Array], list[Belief]]:
        known = posteriors(latent, sentences)
        found = [tasks[name].labels(sentences, of, known.get(name)) for name, of in pairs]
        part = (sentences, _rows([x for x, _ in found]), _rows([x for _, x in found]))
        return part, known, exact_beliefs(believed, sentences, known, masking)

    def rows_of(beliefs: list[Belief]) -> Posteriors:
        probs = [_widened(belief.probs_NxC, num_classes) for belief in beliefs]
        return _rows(probs), _rows([belief.valid_N for belief in beliefs])

    def draws(part: list[Sentences]) -> tuple[LabelledSet, Posteriors]:
        drawn = [labelled(sentences) for sentences in part]
        sets = [(sentences, rows_of(beliefs)) for sentences, _, beliefs in drawn]
        return jax.tree.map(lambda *x: jnp.stack(x), *sets)

    train, exact_train = draws(parts.train)
    validation, _, validation_beliefs = labelled(parts.validation)
    test, known, beliefs = labelled(parts.test)
    names, num_test = [f"{name}.{of}" for name, of in pairs], len(test[0].lengths_B)
    best = [known[name].max(1) if of == "latent" else jnp.ones(num_test) for name, of in pairs]
    return ProbeSets(
        names=names,
        num_classes=num_classes,
        train=train,
        finetune=draws(parts.finetune)[0] if parts.finetune else None,
        validation=validation,
        test=test,
        bayes=dict(zip(names, map(bayes_accuracy, best), strict=True)),
        exact=ExactPosteriors(
            [belief.name for belief in beliefs],
            tuple(belief.span for belief in beliefs),
            exact_train,
            rows_of(validation_beliefs),
            rows_of(beliefs),
        ),
    )


def _rows(parts: list[jax.Array]) -> jax.Array | None:
    """Return the parts as the rows of one array, None if there is no part."""
    return jnp.stack(parts) if parts else None


def _widened(probs_NxC: jax.Array, num_classes: int) -> jax.Array:
    return jnp.pad(probs_NxC, ((0, 0), (0, num_classes - probs_NxC.shape[1])))


def bayes_accuracy(best_N: jax.Array) -> Estimate:
    """Return the best accuracy of any function of the words: E[max_c p(c | x)] for latent labels.

    best_N: max_c p(c | x); 1 for other labels, which are functions of the words.
    """
    return ratio_estimate(best_N, jnp.ones_like(best_N), over="sentences")


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
