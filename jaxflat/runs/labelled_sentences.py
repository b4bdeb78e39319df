"""Draw sentences until enough of them have a label in every task."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxflat.config import Config
from jaxflat.languages.sentences import Sentences
from jaxflat.runs import builders
from jaxflat.runs.languages import language_kind, make_language

MOST_SENTENCES = 64  # most sentences drawn, on average, for one with a label
SAMPLE = 4096  # sentences that estimate the share of labelled ones
SMALLEST_BATCH = 1024  # of further sentences

LabelKind = tuple[str, str]
"""(task, "latent" or "official"). A sentence with a latent label has a map label, too."""


def label_kinds(tasks: Sequence[str], settings: Config) -> list[LabelKind]:
    """Return the kinds of label that the probes use; belief states use those of latent labels."""
    labelings = dict.fromkeys(map(_validity, settings.labelings))
    if settings.belief_state:
        labelings |= {"latent": None}
    return [(task, labeling) for task in tasks for labeling in labelings]


def kind_of(task: str, labeling: str) -> LabelKind:
    """Return the kind of a task's labeling."""
    return task, _validity(labeling)


class Drawn(NamedTuple):
    """Sentences, and rows_KxN: which of them are the first N with a label of each of K kinds."""

    sentences: Sentences
    rows_KxN: np.ndarray

    def of(self, k: int) -> Sentences:
        """Return the N sentences with a label of kind k."""
        return jax.tree.map(lambda x: x[self.rows_KxN[k]], self.sentences)


def draw_labelled(
    language: Any, key: jax.Array, num_sentences: int, kinds: Sequence[LabelKind]
) -> Drawn:
    """Return the first N = num_sentences sentences with a label of each kind.

    The first batch has N sentences and the given key. Further batches are drawn only if a kind
    lacks labels, and of every batch only the sentences that a kind uses are kept. Raises
    ValueError if a kind still lacks labels after 2 * MOST_SENTENCES batches.
    """
    counts_Kx1, num_drawn = np.zeros((len(kinds), 1), int), 0
    kept: list[Sentences] = []
    used: list[np.ndarray] = []
    for number in range(2 * MOST_SENTENCES):
        # fold_in(key, i) is split(key, N)[i], the key of sentence i, if i < N <= num_drawn.
        batch_key = jax.random.fold_in(key, num_drawn) if number else key
        batch_size = max(num_sentences, SMALLEST_BATCH) if number else num_sentences
        sentences, num_drawn = language.sample(batch_key, batch_size), num_drawn + batch_size
        valid_KxB = _valid(language, sentences, kinds)
        used_KxB = valid_KxB & (counts_Kx1 + valid_KxB.cumsum(1) <= num_sentences)
        counts_Kx1 = counts_Kx1 + used_KxB.sum(1, keepdims=True)
        kept_M = np.flatnonzero(used_KxB.any(0))
        kept.append(jax.tree.map(lambda x, rows_M=kept_M: x[rows_M], sentences))
        used.append(used_KxB[:, kept_M])
        if counts_Kx1.min(initial=num_sentences) == num_sentences:
            together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
            rows = [np.flatnonzero(used_M) for used_M in np.concatenate(used, axis=1)]
            return Drawn(together, np.stack(rows))
    task, labeling = kinds[int(counts_Kx1.argmin())]
    raise ValueError(
        f"task {task}: {counts_Kx1.min()} of {num_drawn:,} sentences have a label ({labeling}), "
        f"and probes need {num_sentences:,}; remove this task"
    )


def partly_labelled(section: Config, settings: Config) -> list[LabelKind]:
    """Return the kinds of label that the probes use and a sentence may lack."""
    if not language_kind(section).has_tasks:
        return []
    tasks = make_language(section).tasks
    kinds = label_kinds(list(tasks), settings)
    return [(name, of) for name, of in kinds if not tasks[name].labels_every_sentence(of)]


@functools.cache
def _shares(section: Config, kinds: tuple[LabelKind, ...]) -> dict[LabelKind, float]:
    """Return the share of labelled sentences of each kind, estimated from SAMPLE sentences."""
    if not kinds:
        return {}
    language = make_language(section)
    key = builders.purpose_key(section.seed, "labelled_shares")
    valid_KxB = _valid(language, language.sample(key, SAMPLE), kinds)
    return dict(zip(kinds, valid_KxB.mean(1).tolist(), strict=True))


def check_shares(config: Config) -> None:
    """Raise ValueError if a task has too few labelled sentences to be probed."""
    section = config.language
    kinds = tuple(partly_labelled(section, config.probes))
    for (task, labeling), share in _shares(section, kinds).items():
        if share * MOST_SENTENCES < 1:
            key = f"language.{section.name}.tasks"
            unless = " or 'official' from probes.labelings" if labeling == "official" else ""
            raise ValueError(
                f"{key}: {share:.2%} of {SAMPLE:,} sentences have a label of task {task} "
                f"({labeling}), and probes need 1 in {MOST_SENTENCES}; remove this task{unless}"
            )


def _validity(labeling: str) -> str:
    return "official" if labeling == "official" else "latent"


def _valid(language: Any, sentences: Sentences, kinds: Sequence[LabelKind]) -> np.ndarray:
    """Return valid_KxB, whether each sentence has a label of each kind."""
    labels = [language.tasks[task].labels(sentences, labeling) for task, labeling in kinds]
    return np.stack([np.asarray(valid_B, bool) for _, valid_B in labels])
