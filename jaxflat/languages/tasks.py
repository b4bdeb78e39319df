"""Downstream tasks: name the hidden symbol at one place of a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.sentences import Sentences

LABELINGS = ("latent", "map", "official")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Task:
    """Classify the hidden symbol at `place`: (position,) of a state, (start, end) of a span.

    The language answers for it with `num_symbols`, `true_symbols(sentences, place)` and
    `symbol_posteriors(sentences, places)`.
    """

    language: Any
    place: tuple[int, ...] = field(metadata={"static": True})

    @property
    def num_classes(self) -> int:
        return self.language.num_symbols

    @property
    def span(self) -> tuple[int, int]:
        """The words (from, up to) that the symbol is about, from 0; all of them for a root."""
        if len(self.place) == 1:
            return self.place[0] - 1, self.place[0]
        start, stop = self.place or (0, self.language.max_length)
        return start, stop

    @property
    def labelings(self) -> tuple[str, ...]:
        """The labelings there are: 'official' where the language has `official_symbols`."""
        return LABELINGS if hasattr(self.language, "official_symbols") else LABELINGS[:2]

    def labels(
        self, sentences: Sentences, labeling: str = "latent", posterior_BxC: Array | None = None
    ) -> tuple[Array, Array]:
        """(labels_B int32, valid_B bool); invalid where the sentence has no symbol at this place.

        'latent': the symbol that made the sentence. 'map': the most probable one given the words,
        'official': as the paper's code labels. The last two are functions of the words: their Bayes
        accuracy is 1. posterior_BxC: that of `posterior`, where it is known already. Raises
        ValueError where there is no such labeling.
        """
        if labeling not in self.labelings:
            choices = ", ".join(self.labelings)
            raise ValueError(f"labeling must be one of {choices}; got {labeling!r}")
        if labeling == "official":
            return self.language.official_symbols(sentences, self.place)
        labels_B, valid_B = self.language.true_symbols(sentences, self.place)
        if labeling == "map":
            if posterior_BxC is None:
                posterior_BxC = self.posterior(sentences)
            labels_B = jnp.argmax(posterior_BxC, axis=1).astype(jnp.int32)
        return labels_B, valid_B

    def posterior(self, sentences: Sentences) -> Array:
        """probs_BxC of the latent label given the words (and that there is one at this place).

        The mean of its maximum over valid sentences is the latent Bayes accuracy.
        """
        return self.language.symbol_posteriors(sentences, (self.place,))[0]


def posteriors(tasks: Mapping[str, Task], sentences: Sentences) -> dict[str, Array]:
    """The `posterior` of each of a language's tasks, by name, for little more than that of one."""
    if not tasks:
        return {}
    language = next(iter(tasks.values())).language
    places = tuple(task.place for task in tasks.values())
    return dict(zip(tasks, language.symbol_posteriors(sentences, places), strict=True))


def all_labels(
    tasks: Mapping[str, Task],
    sentences: Sentences,
    labelings: Sequence[str],
    known: Mapping[str, Array] | None = None,
) -> dict[str, tuple[Array, Array]]:
    """The `labels` of each of a language's tasks in each labeling, by `<task>.<labeling>`.

    known: the `posteriors`, where they are there already.
    """
    if known is None:
        known = posteriors(tasks, sentences) if "map" in labelings else {}
    return {
        f"{name}.{labeling}": task.labels(sentences, labeling, known.get(name))
        for name, task in tasks.items()
        for labeling in labelings
    }
