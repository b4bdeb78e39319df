"""Downstream tasks: classify a sentence by the hidden symbol at one place."""

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

    The language provides `num_symbols`, `true_symbols(sentences, place)` and
    `symbol_posteriors(sentences, places)`. It may provide `every_sentence_has(place)`. For
    `prefix_posterior` it provides `prefix_posteriors(sentences, places)`.
    """

    language: Any
    place: tuple[int, ...] = field(metadata={"static": True})

    @property
    def num_classes(self) -> int:
        return self.language.num_symbols

    @property
    def span(self) -> tuple[int, int]:
        """Return (start, end) of the words below the symbol, from 0; a root has all words."""
        if len(self.place) == 1:
            return self.place[0] - 1, self.place[0]
        start, stop = self.place or (0, self.language.max_length)
        return start, stop

    @property
    def labelings(self) -> tuple[str, ...]:
        """Return the possible labelings: 'official' only if the language has `official_symbols`."""
        return LABELINGS if hasattr(self.language, "official_symbols") else LABELINGS[:2]

    def labels(
        self, sentences: Sentences, labeling: str = "latent", posterior_BxC: Array | None = None
    ) -> tuple[Array, Array]:
        """Return (labels_B int32, valid_B bool); invalid if the sentence has no symbol here.

        'latent': the symbol that generated the sentence. 'map': the most probable symbol given the
        words. 'official': the label of the paper's code. The last two are functions of the words,
        so their Bayes accuracy is 1. posterior_BxC: the result of `posterior`, if already known.
        Raises ValueError on a labeling that is not one of `labelings`.
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

    def labels_every_sentence(self, labeling: str = "latent") -> bool:
        """Return whether every sentence has a label; False if that is not known.

        It is known of latent and map labels, if the language has `every_sentence_has`.
        """
        if labeling == "official" or not hasattr(self.language, "every_sentence_has"):
            return False
        return self.language.every_sentence_has(self.place)

    def posterior(self, sentences: Sentences) -> Array:
        """Return probs_BxC of the latent label, given the words and that the place has a symbol.

        The mean of its maximum over valid sentences is the Bayes accuracy of latent labels.
        """
        return self.language.symbol_posteriors(sentences, (self.place,))[0]

    def prefix_posterior(self, sentences: Sentences) -> Array:
        """Return probs_BxTxC: p(the place has symbol c | x_0 .. x_t).

        They sum to p(the place has a symbol | x_0 .. x_t). Zeros before the last word of the place
        and past the end.
        """
        return self.language.prefix_posteriors(sentences, (self.place,))[0]


def posteriors(tasks: Mapping[str, Task], sentences: Sentences) -> dict[str, Array]:
    """Return the `posterior` of each of a language's tasks, in one pass over the sentences."""
    if not tasks:
        return {}
    language = next(iter(tasks.values())).language
    return dict(zip(tasks, language.symbol_posteriors(sentences, _places(tasks)), strict=True))


def prefix_posteriors(tasks: Mapping[str, Task], sentences: Sentences) -> dict[str, Array]:
    """Return the `prefix_posterior` of each of a language's tasks, in one pass."""
    if not tasks:
        return {}
    language = next(iter(tasks.values())).language
    return dict(zip(tasks, language.prefix_posteriors(sentences, _places(tasks)), strict=True))


def _places(tasks: Mapping[str, Task]) -> tuple[tuple[int, ...], ...]:
    return tuple(task.place for task in tasks.values())


def all_labels(
    tasks: Mapping[str, Task],
    sentences: Sentences,
    labelings: Sequence[str],
    known: Mapping[str, Array] | None = None,
) -> dict[str, tuple[Array, Array]]:
    """Return the `labels` of each of a language's tasks in each labeling, by `<task>.<labeling>`.

    known: the result of `posteriors`, if already computed.
    """
    if known is None:
        known = posteriors(tasks, sentences) if "map" in labelings else {}
    return {
        f"{name}.{labeling}": task.labels(sentences, labeling, known.get(name))
        for name, task in tasks.items()
        for labeling in labelings
    }
