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

    With masking "causal" a belief is read at the last word of its task's span; a root has none. If
    the language is a chain of states, beliefs about the present state are read at every word, too.
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
        return [(probs, tasks[name].labels(sentences)[1]) for name, probs in known.items()]
    local, num_prefixes, beliefs = _local(tasks), _num_prefixes(tasks), []
    for name, probs_NxTxC in prefix_posteriors(local, sentences).items():
        _, valid_N = local[name].labels(sentences)
        beliefs.append((probs_NxTxC[:, local[name].span[1] - 1], valid_N))
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
    """Return the most words after which a chain of states has a present state; else 0."""
    languages = [task.language for task in tasks.values()]
    chain = languages and hasattr(languages[0], "state_beliefs")
    return languages[0].max_length if chain else 0
