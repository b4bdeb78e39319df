"""Languages of probabilistic context-free grammars: exact sampling and exact conditionals.

Outside probabilities are derivatives of the inside ones: Eisner, "Inside-outside and
forward-backward algorithms are just backprop" (2016).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import normalize
from jaxflat.languages.grammars import prefix_oracle
from jaxflat.languages.grammars.derivations import (
    LevelTables,
    YieldTables,
    level_tables,
    sample_level_by_level,
    sample_node_by_node,
    yield_tables,
)
from jaxflat.languages.grammars.forward import PrefixTables, prefix_tables
from jaxflat.languages.grammars.grammar import (
    Grammar,
    random_levelled_grammar,
    random_recursive_grammar,
)
from jaxflat.languages.grammars.grammar_file import read_grammar
from jaxflat.languages.grammars.inside import (
    Factors,
    chart_inside,
    levelled_inside,
    levelled_roots_inside,
)
from jaxflat.languages.sentences import Sentences, predict_words, word_weights
from jaxflat.languages.tasks import Task

OFFICIAL_LENGTHS = range(5, 32)  # numbers of words of the sentences that the paper's code labels
Places = Sequence[Sequence[int]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pcfg:
    """A grammar's distribution of sentences, conditional on min_length <= length <= max_length.

    The root is A with probability start_N[A]. A -> B C has probability rules_NxNxN[A, B, C], and
    A -> word has emissions_NxV[A, word]. For every A, its rules and emissions together sum to 1.
    `levels` are as in `Grammar`. With LevelTables all roots are in level 0 and inference uses
    the levels; otherwise it uses the chart of all spans. Latents are a `Tree`.
    Tasks: `span_<start>_<end>` is the non-terminal above words [start, end), valid if the
    sentence's tree has such a node. `root`, with place (), is the root.
    """

    start_N: Array
    rules_NxNxN: Array
    emissions_NxV: Array
    levels: tuple[int, ...] = field(metadata={"static": True})
    min_length: int = field(metadata={"static": True})
    max_length: int = field(metadata={"static": True})
    task_places: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    tables: LevelTables | YieldTables

    @property
    def num_words(self) -> int:
        return self.emissions_NxV.shape[1]

    @property
    def num_symbols(self) -> int:
        return self.emissions_NxV.shape[0]

    @property
    def tasks(self) -> dict[str, Task]:
        return {
            "_".join(["span", *map(str, p)]) if p else "root": Task(self, p)
            for p in self.task_places
        }

    @partial(jax.jit, static_argnames="batch_size")
    def sample(self, key: Array, batch_size: int) -> Sentences:
        """Sample without rejection or truncation; sentence b is a function of (key, b) alone."""
        if isinstance(self.tables, LevelTables):
            sizes = (self.levels, self.num_words, self.max_length)
            return Sentences(*sample_level_by_level(self.tables, *sizes, key, batch_size))
        dtype = self.tables.words_SxN.dtype
        rules_NxNxN, emissions_NxV = (
            x.astype(dtype) for x in (self.rules_NxNxN, self.emissions_NxV)
        )
        one = partial(sample_node_by_node, self.tables, rules_NxNxN, emissions_NxV)
        return Sentences(*jax.vmap(one)(jax.random.split(key, batch_size)))

    @jax.jit
    def conditional_log_probs(
        self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None = None
    ) -> Array:
        """Return log p(x_t = v | unmasked x_s, s != t, and the length), BxTxV nats.

        p(v | x_-t) prop. to sum_A O_t(A) P(A -> v). O_t(A) = dZ / dl_t(A) is the derivative
        of the sentence's probability by its leaf weights l_t(A) = P(A -> x_t). O_t does not depend
        on x_t. Uniform past the end.
        """
        weights_BxTxN = word_weights(self.emissions_NxV, tokens_BxT, masked_BxT)
        outside_BxTxN = jax.grad(self._total)(weights_BxTxN, lengths_B, factors={})
        return predict_words(outside_BxTxN, self.emissions_NxV, lengths_B)

    @jax.jit
    def log_prob(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p(sentence), its length included, B nats; -inf if it is impossible."""
        return prefix_oracle.log_prob(self._prefix_tables(), tokens_BxT, lengths_B)

    @jax.jit
    def next_log_probs(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p(next word or stop | words 0..s-1), BxSxU nats, for s from 0 to T.

        Stop is symbol V. Uniform after the end. Each probability is at least the smallest normal
        number.
        """
        return prefix_oracle.next_log_probs(self._prefix_tables(), tokens_BxT, lengths_B)

    def every_sentence_has(self, place: tuple[int, ...]) -> bool:
        """Return whether the place is the root or a word, in sentences of every length."""
        if not place:
            return True
        start, end = place
        return end <= self.min_length and end - start in (1, self.max_length)

    def true_symbols(self, sentences: Sentences, place: tuple[int, ...]) -> tuple[Array, Array]:
        tree, start = sentences.latents, place[0] if place else 0
        width_B = _widths(sentences.lengths_B, place)
        here_BxM = (tree.start_BxM == start) & (tree.width_BxM == width_B[:, None])
        symbols_B = jnp.max(jnp.where(here_BxM, tree.symbol_BxM, 0), axis=1)
        return symbols_B, jnp.any(here_BxM, axis=1)

    @partial(jax.jit, static_argnames="places")
    def symbol_posteriors(
        self, sentences: Sentences, places: tuple[tuple[int, ...], ...]
    ) -> list[Array]:
        """Return p(A above the place | x, the tree has such a node), BxN for each place.

        It is prop. to inside * outside: the derivative of the sentence's probability by the
        logarithm of the inside probability. So one reverse pass computes all places. Uniform if no
        tree has such a node, or if its probability is too small for float32.
        """
        weights_BxTxN = word_weights(self.emissions_NxV, sentences.tokens_BxT, None)
        ones_BxN = jnp.ones_like(weights_BxTxN[:, 0])
        total = jax.grad(self._total, argnums=2)
        products = total(weights_BxTxN, sentences.lengths_B, dict.fromkeys(places, ones_BxN))
        return [normalize(products[place]) for place in places]

    @partial(jax.jit, static_argnames="places")
    def prefix_posteriors(
        self, sentences: Sentences, places: tuple[tuple[int, ...], ...]
    ) -> list[Array]:
        """Return p(the tree has A above the place | words 0..t), BxTxN for each place.

        Its sum over A is the probability that the place is a constituent. 0 before the last word of
        the place and after the end. The root, (), is there from the first word on.
        """
        tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
        return prefix_oracle.prefix_posteriors(self._prefix_tables(), tokens_BxT, lengths_B, places)

    def official_symbols(self, sentences: Sentences, place: tuple[int, ...]) -> tuple[Array, Array]:
        """Return the labels of the code of Liu et al. (2023): argmax_A P(A yields the words there).

        They ignore all words outside the place. At a span A is any symbol, at the root any possible
        root, without its prior. Valid for sentences of 5 to 31 words if some A yields the words.
        Computed in float64, because words that form no constituent have probabilities too small
        for float32. So a function that is compiled in float32 cannot call it.
        """
        with jax.enable_x64(True):
            precise = jax.tree.map(_in_float64, self)
            return precise._official_symbols(sentences.tokens_BxT, sentences.lengths_B, place)

    @partial(jax.jit, static_argnames="place")
    def _official_symbols(
        self, tokens_BxT: Array, lengths_B: Array, place: tuple[int, ...]
    ) -> tuple[Array, Array]:
        weights_BxTxN = word_weights(self.emissions_NxV, tokens_BxT, None)
        weights_BxWxN = weights_BxTxN[:, slice(*place)] if place else weights_BxTxN
        inside_BxN = self._inside(weights_BxWxN, _widths(lengths_B, place))
        if not place:
            inside_BxN = jnp.where(self.start_N[None] > 0, inside_BxN, 0)
        labelled_B = (lengths_B >= OFFICIAL_LENGTHS.start) & (lengths_B < OFFICIAL_LENGTHS.stop)
        fits_B = lengths_B >= (place[1] if place else 0)
        valid_B = labelled_B & fits_B & (inside_BxN.max(axis=1) > 0)
        return jnp.where(valid_B, jnp.argmax(inside_BxN, axis=1), 0).astype(jnp.int32), valid_B

    def _inside(self, weights_BxTxN: Array, lengths_B: Array) -> Array:
        if isinstance(self.tables, LevelTables):
            return levelled_inside(self.levels, self.rules_NxNxN, weights_BxTxN, lengths_B)
        return chart_inside(self.rules_NxNxN, weights_BxTxN, lengths_B, factors={})

    def _prefix_tables(self) -> PrefixTables:
        levelled = isinstance(self.tables, LevelTables)
        levels = self.levels if levelled else (self.num_symbols,)
        limits = range(self.min_length, self.max_length + 1)
        grammar = self.start_N, self.rules_NxNxN, self.emissions_NxV
        return prefix_tables(levels, *grammar, limits)

    def _total(self, weights_BxTxN: Array, lengths_B: Array, factors: Factors) -> Array:
        """Return the sum of the sentences' probabilities, each up to a constant factor."""
        tables = self.rules_NxNxN, weights_BxTxN, lengths_B
        if isinstance(self.tables, LevelTables):
            roots_BxK = levelled_roots_inside(self.levels, *tables, factors)
        else:
            roots_BxK = chart_inside(*tables, factors)
        start_K = self.start_N[: roots_BxK.shape[1]]
        return jnp.matmul(roots_BxK, start_K, precision="highest").sum()


def _in_float64(table: Array) -> Array:
    return table.astype(jnp.float64) if table.dtype == jnp.float32 else table


def _widths(lengths_B: Array, place: tuple[int, ...]) -> Array:
    return jnp.full_like(lengths_B, place[1] - place[0]) if place else lengths_B


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
    roots_in_level_0 = not grammar.start_N[grammar.levels[0] :].any()
    # Sampling level by level draws all nodes of a full binary tree: with many levels, too many.
    deep = 2 ** (len(grammar.levels) - 1) > 16 * length
    levelled = len(grammar.levels) > 1 and roots_in_level_0 and not deep
    return Pcfg(
        start_N=jnp.asarray(grammar.start_N, jnp.float32),
        rules_NxNxN=jnp.asarray(grammar.rules_NxNxN, jnp.float32),
        emissions_NxV=jnp.asarray(grammar.emissions_NxV, jnp.float32),
        levels=grammar.levels,
        min_length=min_length,
        max_length=length,
        task_places=places,
        tables=(level_tables if levelled else yield_tables)(grammar, min_length, length),
    )


def random_pcfg(
    seed: int,
    *,
    level_sizes: Sequence[int],
    num_words: int,
    emission_probability: float | Sequence[float],
    rule_concentration: float,
    emission_concentration: float,
    length: int,
    min_length: int,
    tasks: Places,
) -> Pcfg:
    """Return the language of a `random_levelled_grammar`, with the bounds of `make_pcfg`."""
    grammar = random_levelled_grammar(
        seed,
        level_sizes=level_sizes,
        num_words=num_words,
        emission_probability=emission_probability,
        rule_concentration=rule_concentration,
        emission_concentration=emission_concentration,
    )
    return make_pcfg(grammar, length=length, min_length=min_length, tasks=tasks)


def random_recursive_pcfg(
    seed: int,
    *,
    num_nonterminals: int,
    num_words: int,
    emission_probability: float,
    rule_concentration: float,
    emission_concentration: float,
    length: int,
    min_length: int,
    tasks: Places,
) -> Pcfg:
    """Return the language of a `random_recursive_grammar`, with the bounds of `make_pcfg`."""
    grammar = random_recursive_grammar(
        seed,
        num_nonterminals=num_nonterminals,
        num_words=num_words,
        emission_probability=emission_probability,
        rule_concentration=rule_concentration,
        emission_concentration=emission_concentration,
    )
    return make_pcfg(grammar, length=length, min_length=min_length, tasks=tasks)


def pcfg_from_file(seed: int, *, path: str, length: int, min_length: int, tasks: Places) -> Pcfg:
    """Return the language of the grammar in a file, with the bounds of `make_pcfg`.

    The seed has no effect: it is what every constructor of a language takes first.
    """
    return make_pcfg(read_grammar(path), length=length, min_length=min_length, tasks=tasks)
