"""Probabilistic context-free grammars in Chomsky normal form, with exact sampling and conditionals.

Outside probabilities are derivatives of the inside ones: Eisner, "Inside-outside and
forward-backward algorithms are just backprop" (2016).
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import normalize
from jaxflat.languages.emissions import predict_words, word_weights
from jaxflat.languages.grammars import chart, levelled
from jaxflat.languages.grammars.branching import Tables, sample_levelled
from jaxflat.languages.grammars.chart import Factors
from jaxflat.languages.grammars.derivations import YieldTables, sample_sentence
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import Task

OFFICIAL_LENGTHS = range(5, 32)  # the sentences that the paper's code labels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pcfg:
    """Root A with start_N[A]; A -> B C with rules_NxNxN[A, B, C]; A -> word with emissions_NxV[A].

    For every A the rules and emissions sum to 1 together. Sentences are those of the grammar given
    min_length <= length <= max_length. `levels` as in `Grammar`. With `tables` to sample by, roots
    are of level 0 and the levels are used; without, the chart is. Latents: a `derivations.Tree`.
    Tasks: `span_<start>_<end>`, the non-terminal above words [start, end), valid where the
    sentence's tree has such a node; `root`, place (), the one above the whole sentence.
    """

    start_N: Array
    rules_NxNxN: Array
    emissions_NxV: Array
    levels: tuple[int, ...] = field(metadata={"static": True})
    min_length: int = field(metadata={"static": True})
    max_length: int = field(metadata={"static": True})
    task_places: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    tables: Tables | YieldTables

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
        """Exact, without rejection or truncation; sentence b is a function of (key, b) alone."""
        if isinstance(self.tables, Tables):
            sizes = (self.levels, self.num_words, self.max_length)
            return Sentences(*sample_levelled(self.tables, *sizes, key, batch_size))
        dtype = self.tables.words_SxN.dtype
        rules_NxNxN, emissions_NxV = (
            x.astype(dtype) for x in (self.rules_NxNxN, self.emissions_NxV)
        )
        one = partial(sample_sentence, self.tables, rules_NxNxN, emissions_NxV)
        return Sentences(*jax.vmap(one)(jax.random.split(key, batch_size)))

    @jax.jit
    def conditional_log_probs(
        self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None = None
    ) -> Array:
        """log p(x_t = v | unmasked x_s, s != t, and the length), BxTxV nats; uniform past the end.

        p(v | x_-t) prop. to sum_A O_t(A) P(A -> v), where O_t(A) = dZ / dl_t(A), the derivative of
        the sentence's probability by its leaf weights l_t(A) = P(A -> x_t), is free of x_t.
        """
        weights_BxTxN = word_weights(self.emissions_NxV, tokens_BxT, masked_BxT)
        outside_BxTxN = jax.grad(self._total)(weights_BxTxN, lengths_B, factors={})
        return predict_words(outside_BxTxN, self.emissions_NxV, lengths_B)

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
        """p(A above the place | x, there is one), BxN each, prop. to inside * outside.

        That is the derivative of the sentence's probability by the logarithm of the inside one:
        one reverse pass finds those of all places. Uniform where there cannot be any, or float32
        cannot hold how improbable one is.
        """
        weights_BxTxN = word_weights(self.emissions_NxV, sentences.tokens_BxT, None)
        ones_BxN = jnp.ones_like(weights_BxTxN[:, 0])
        total = jax.grad(self._total, argnums=2)
        products = total(weights_BxTxN, sentences.lengths_B, dict.fromkeys(places, ones_BxN))
        return [normalize(products[place]) for place in places]

    def official_symbols(self, sentences: Sentences, place: tuple[int, ...]) -> tuple[Array, Array]:
        """argmax_A P(A yields the place's words), without what stands around, as the code of Liu
        et al. (2023) labels: all A at a span, at the root those that may be one, whatever their
        prior. Valid for 5 to 31 words, where some A yields them.

        In float64, since words that are no constituent have probabilities that float32 cannot
        hold; so not within a function that is compiled in float32.
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
        if isinstance(self.tables, Tables):
            return levelled.inside(self.levels, self.rules_NxNxN, weights_BxTxN, lengths_B)
        return chart.inside(self.rules_NxNxN, weights_BxTxN, lengths_B, factors={})

    def _total(self, weights_BxTxN: Array, lengths_B: Array, factors: Factors) -> Array:
        """The sentences' probabilities, up to a factor of each one's own, added up."""
        tables = self.rules_NxNxN, weights_BxTxN, lengths_B
        if isinstance(self.tables, Tables):
            roots_BxK = levelled.roots_inside(self.levels, *tables, factors)
        else:
            roots_BxK = chart.inside(*tables, factors)
        start_K = self.start_N[: roots_BxK.shape[1]]
        return jnp.matmul(roots_BxK, start_K, precision="highest").sum()


def _in_float64(table: Array) -> Array:
    return table.astype(jnp.float64) if table.dtype == jnp.float32 else table


def _widths(lengths_B: Array, place: tuple[int, ...]) -> Array:
    return jnp.full_like(lengths_B, place[1] - place[0]) if place else lengths_B
