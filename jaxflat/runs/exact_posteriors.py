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


class Belief(NamedTuple):
    """An exact posterior of the sentences of one part, and the words that are to predict it."""

    name: str
    span: tuple[int, int]
    probs_NxC: jax.Array
    valid_N: jax.Array


PRESENT_STATE = "present_state"
"""The name of beliefs about the state that emitted the last word, at every prefix."""


def exact_beliefs(
    tasks: Mapping[str, Task], sentences: Sentences, known: Mapping[str, jax.Array], masking: str
) -> list[Belief]:
    """Return the beliefs of tasks, in the same order for all sentences.

    known: the tasks' posteriors given all words. With masking "causal" they are given the words up
    to the last one of a task's span, and read there; a root has none. Beliefs about the present
    state of a chain are read at every word, too. They need sentences that were not chosen for their
    labels, so every sentence must have a label of each of the tasks.
    """
    if masking != "causal":
        return [
            Belief(name, task.span, known[name], task.labels(sentences)[1])
            for name, task in tasks.items()
        ]
    local, lengths_N = _local(tasks), sentences.lengths_B
    beliefs = []
    for name, probs_NxTxC in prefix_posteriors(local, sentences).items():
        _, end = local[name].span
        probs_NxC = probs_NxTxC[:, end - 1]
        beliefs.append(Belief(name, (end - 1, end), probs_NxC, lengths_N >= end))
    if num_prefixes := _num_prefixes(tasks):
        language = next(iter(tasks.values())).language
        probs_NxTxK = language.state_beliefs(sentences.tokens_BxT, lengths_N)
        for t in range(num_prefixes):
            beliefs.append(Belief(PRESENT_STATE, (t, t + 1), probs_NxTxK[:, t], lengths_N > t))
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
