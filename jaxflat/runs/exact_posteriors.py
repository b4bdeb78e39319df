"""Exact posteriors of hidden symbols, and the words whose representations are to predict them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import Task, prefix_posteriors

Posteriors = tuple[Any, Any]
"""(probs_JxNxC, valid_JxN); J = 0: no arrays"""


class ExactPosteriors(NamedTuple):
    """J exact posteriors of hidden symbols, given the words of the sentences of a ProbeSets.

    `train` has a leading axis of draws. spans: the half-open range of words (start, end) whose
    representations are to predict each posterior. Posteriors of one name share one regression.
    """

    names: list[str]
    spans: tuple[tuple[int, int], ...]
    train: Posteriors
    validation: Posteriors
    test: Posteriors


PRESENT_STATE = "present_state"
"""The name of beliefs about the state that emitted the last word, at every prefix."""


def places_of_beliefs(
    tasks: Mapping[str, Task], masking: str
) -> tuple[list[str], tuple[tuple[int, int], ...]]:
    """Return the names and spans of an ExactPosteriors.

    With masking "causal" a belief is read at the last word of its task's span; a root has none.
    Beliefs about the present state of a chain are read at every word, too. They need sentences that
    were not chosen for their labels, so every sentence must have a label of each of the tasks.
    """
    if masking != "causal":
        return list(tasks), tuple(task.span for task in tasks.values())
    local, num_prefixes = _local(tasks), _num_prefixes(tasks)
    ends = [*(task.span[1] for task in local.values()), *range(1, num_prefixes + 1)]
    return [*local, *[PRESENT_STATE] * num_prefixes], tuple((end - 1, end) for end in ends)


def exact_beliefs(
    tasks: Mapping[str, Task], sentences: Sentences, known: Mapping[str, jax.Array], masking: str
) -> list[tuple[jax.Array, jax.Array]]:
    """Return (probs_NxC, valid_N) at each place of `places_of_beliefs`.

    known: the posteriors given all words. With masking "causal" they are given the words up to the
    place.
    """
    if masking != "causal":
        return [(known[name], task.labels(sentences)[1]) for name, task in tasks.items()]
    local, num_prefixes, beliefs = _local(tasks), _num_prefixes(tasks), []
    for name, probs_NxTxC in prefix_posteriors(local, sentences).items():
        end = local[name].span[1]
        beliefs.append((probs_NxTxC[:, end - 1], sentences.lengths_B >= end))
    if num_prefixes:
        language = next(iter(tasks.values())).language
        probs_NxTxK = language.state_beliefs(sentences.tokens_BxT, sentences.lengths_B)
        within = [sentences.lengths_B > t for t in range(num_prefixes)]
        beliefs += [(probs_NxTxK[:, t], valid_N) for t, valid_N in enumerate(within)]
    return beliefs


def _local(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Return the tasks whose symbol generates given words; a root generates all of them."""
    return {name: task for name, task in tasks.items() if task.place}


def _num_prefixes(tasks: Mapping[str, Task]) -> int:
    """Return after how many words, at most, the present state is asked for; 0 if it is not."""
    for task in tasks.values():
        chain = hasattr(task.language, "state_beliefs")
        if not chain or not task.labels_every_sentence():
            return 0
    return max((task.language.max_length for task in tasks.values()), default=0)
