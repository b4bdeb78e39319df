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

Place = tuple[str, str]
"""(task, "latent" or "official"): where a sentence has a label. 'map' has labels where latent has.
"""


def label_places(tasks: Sequence[str], settings: Config) -> list[Place]:
    """Return the places whose labels the probes use; belief states use those of latent labels."""
    labelings = dict.fromkeys(map(_validity, settings.labelings))
    if settings.belief_state:
        labelings |= {"latent": None}
    return [(task, labeling) for task in tasks for labeling in labelings]


def place_of(task: str, labeling: str) -> Place:
    """Return the place of a task's labeling."""
    return task, _validity(labeling)


class Drawn(NamedTuple):
    """Sentences, and rows_PxN: which of them are the first N with a label at each of P places."""

    sentences: Sentences
    rows_PxN: np.ndarray

    def at(self, p: int) -> Sentences:
        """Return the N sentences with a label at place p."""
        return jax.tree.map(lambda x: x[self.rows_PxN[p]], self.sentences)


def draw_labelled(
    language: Any, key: jax.Array, num_sentences: int, places: Sequence[Place]
) -> Drawn:
    """Return the first N = num_sentences sentences with a label at each place.

    The first batch has N sentences and the given key. Further batches are drawn only if a place
    lacks labels, and of every batch only the sentences that a place uses are kept. Raises
    ValueError if a place still lacks labels after 2 * MOST_SENTENCES batches.
    """
    counts_Px1, num_drawn = np.zeros((len(places), 1), int), 0
    kept: list[Sentences] = []
    used: list[np.ndarray] = []
    for number in range(2 * MOST_SENTENCES):
        # fold_in(key, i) is split(key, N)[i], the key of sentence i, if i < N <= num_drawn.
        batch_key = jax.random.fold_in(key, num_drawn) if number else key
        batch_size = max(num_sentences, SMALLEST_BATCH) if number else num_sentences
        sentences, num_drawn = language.sample(batch_key, batch_size), num_drawn + batch_size
        valid_PxB = _valid(language, sentences, places)
        used_PxB = valid_PxB & (counts_Px1 + valid_PxB.cumsum(1) <= num_sentences)
        counts_Px1 = counts_Px1 + used_PxB.sum(1, keepdims=True)
        kept_M = np.flatnonzero(used_PxB.any(0))
        kept.append(jax.tree.map(lambda x, rows_M=kept_M: x[rows_M], sentences))
        used.append(used_PxB[:, kept_M])
        if counts_Px1.min(initial=num_sentences) == num_sentences:
            together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
            rows = [np.flatnonzero(used_M) for used_M in np.concatenate(used, axis=1)]
            return Drawn(together, np.stack(rows))
    task, labeling = places[int(counts_Px1.argmin())]
    raise ValueError(
        f"task {task}: {counts_Px1.min()} of {num_drawn:,} sentences have a label ({labeling}), "
        f"and probes need {num_sentences:,}; remove this task"
    )


def partly_labelled(section: Config, settings: Config) -> list[Place]:
    """Return the places that the probes use and where a sentence may have no label."""
    if not language_kind(section).has_tasks:
        return []
    tasks = make_language(section).tasks
    places = label_places(list(tasks), settings)
    return [(name, of) for name, of in places if not tasks[name].labels_every_sentence(of)]


@functools.cache
def _shares(section: Config, places: tuple[Place, ...]) -> dict[Place, float]:
    """Return the share of labelled sentences at each place, estimated from SAMPLE sentences."""
    if not places:
        return {}
    language = make_language(section)
    key = builders.purpose_key(section.seed, "labelled_shares")
    valid_PxB = _valid(language, language.sample(key, SAMPLE), places)
    return dict(zip(places, valid_PxB.mean(1).tolist(), strict=True))


def check_shares(config: Config) -> None:
    """Raise ValueError if a task has too few labelled sentences to be probed."""
    section = config.language
    places = tuple(partly_labelled(section, config.probes))
    for (task, labeling), share in _shares(section, places).items():
        if share * MOST_SENTENCES < 1:
            key = f"language.{section.name}.tasks"
            unless = " or 'official' from probes.labelings" if labeling == "official" else ""
            raise ValueError(
                f"{key}: {share:.2%} of {SAMPLE:,} sentences have a label of task {task} "
                f"({labeling}), and probes need 1 in {MOST_SENTENCES}; remove this task{unless}"
            )


def _validity(labeling: str) -> str:
    return "official" if labeling == "official" else "latent"


def _valid(language: Any, sentences: Sentences, places: Sequence[Place]) -> np.ndarray:
    """Return valid_PxB, whether each sentence has a label at each place."""
    labels = [language.tasks[task].labels(sentences, labeling) for task, labeling in places]
    return np.stack([np.asarray(valid_B, bool) for _, valid_B in labels])
