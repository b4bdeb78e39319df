"""Languages from random grammars and grammar files, with bounds on the sentence length."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

from jaxflat.languages.grammars.branching import branching_tables
from jaxflat.languages.grammars.derivations import yield_tables
from jaxflat.languages.grammars.grammar import (
    Grammar,
    random_levelled_grammar,
    random_recursive_grammar,
)
from jaxflat.languages.grammars.grammar_file import read_grammar
from jaxflat.languages.grammars.pcfg import Pcfg

Places = Sequence[Sequence[int]]


def make_pcfg(grammar: Grammar, *, length: int, min_length: int, tasks: Places) -> Pcfg:
    """Return the language of a grammar's sentences of min_length..length words.

    Each task is a span (start, end), or () for the whole sentence. Raises ValueError on invalid
    bounds or spans, and if the grammar has no sentence of such a length.
    """
    if not 1 <= min_length <= length:
        raise ValueError(f"min_length must be in 1..length={length}; got {min_length}")
    places = tuple(tuple(place) for place in tasks)
    for place in places:
        if place and not (len(place) == 2 and 0 <= place[0] < place[1] <= length):
            raise ValueError(
                f"tasks must be () or spans 0 <= start < end <= length={length}; got {place}"
            )
    roots_are_on_top = not grammar.start_N[grammar.levels[0] :].any()
    # Levelled sampling draws all nodes of a full binary tree: with many levels, too many.
    deep = 2 ** (len(grammar.levels) - 1) > 16 * length
    levelled = len(grammar.levels) > 1 and roots_are_on_top and not deep
    return Pcfg(
        start_N=jnp.asarray(grammar.start_N, jnp.float32),
        rules_NxNxN=jnp.asarray(grammar.rules_NxNxN, jnp.float32),
        emissions_NxV=jnp.asarray(grammar.emissions_NxV, jnp.float32),
        levels=grammar.levels,
        min_length=min_length,
        max_length=length,
        task_places=places,
        tables=(branching_tables if levelled else yield_tables)(grammar, min_length, length),
    )


def pcfg_of(
    make_grammar: Callable[..., Grammar],
    seed: int,
    *,
    length: int,
    min_length: int,
    tasks: Places,
    **settings: Any,
) -> Pcfg:
    """Return the language of make_grammar(seed, **settings) with the bounds of `make_pcfg`."""
    grammar = make_grammar(seed, **settings)
    return make_pcfg(grammar, length=length, min_length=min_length, tasks=tasks)


random_pcfg = partial(pcfg_of, random_levelled_grammar)
random_recursive_pcfg = partial(pcfg_of, random_recursive_grammar)
pcfg_from_file = partial(pcfg_of, lambda seed, path: read_grammar(path))
