"""The language of strings with equal numbers of pluses and minuses, in any order.

It is a Dyck language without nesting. All strings of one length are equally likely, so counting
gives the exact conditionals.
"""

from dataclasses import dataclass, field
from functools import cache, partial
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxflat.languages.prefixes import chain_rule, from_word, is_prefix
from jaxflat.languages.sentences import Sentences, is_word, log_probs
from jaxflat.languages.tasks import Task


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefixSum(Task):
    """The sum of the first t words, with place = (t,). Class c has c pluses, so the sum 2c - t.

    Valid if the sentence has t words. The words determine the sum, so both labelings are the same.
    """

    @property
    def num_classes(self) -> int:
        return self.place[0] + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ZeroSum:
    """Equal numbers of words 0 (minus) and 1 (plus); even lengths, uniform in [min_length, length].

    No array leaves and no latents. Tasks: `sum_<t>` is the sum of the first t words.
    """

    length: int = field(metadata={"static": True})
    min_length: int = field(metadata={"static": True})
    task_positions: tuple[int, ...] = field(metadata={"static": True})

    @property
    def num_words(self) -> int:
        return 2

    @property
    def max_length(self) -> int:
        return self.length

    @property
    def tasks(self) -> dict[str, Task]:
        return {f"sum_{t}": PrefixSum(self, (t,)) for t in self.task_positions}

    @partial(jax.jit, static_argnames="batch_size")
    def sample(self, key: Array, batch_size: int) -> Sentences:
        """Sample sentences; sentence b is a function of (key, b) alone."""
        positions_T = jnp.arange(self.length, dtype=jnp.int32)

        def sentence(key: Array) -> tuple[Array, Array]:
            length_key, order_key = jax.random.split(key)
            low, high = self.min_length // 2, self.length // 2
            length = 2 * jax.random.randint(length_key, (), low, high + 1, jnp.int32)
            inside_T = positions_T < length
            # The pluses are the first half of the positions in a random order.
            order_T = jnp.where(inside_T, jax.random.permutation(order_key, positions_T), -1)
            before_TxT = (order_T[None] < order_T[:, None]) & inside_T[None]
            plus_T = jnp.sum(before_TxT, axis=1, dtype=jnp.int32) < length // 2
            return jnp.where(inside_T, plus_T.astype(jnp.int32), self.num_words), length

        tokens_BxT, lengths_B = jax.vmap(sentence)(jax.random.split(key, batch_size))
        return Sentences(tokens_BxT, lengths_B, latents=None)

    @jax.jit
    def conditional_log_probs(
        self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None = None
    ) -> Array:
        """Return log p(x_t = v | unmasked x_s, s != t, and the length), BxTx2 nats.

        p(x_t = plus) = r / m, where m words are unseen, x_t among them, and r pluses are missing
        to n / 2. Of the C(m, r) completions, C(m - 1, r - 1) have a plus at t. Uniform past the end
        and for a sentence without completion.
        """
        inside_BxT = is_word(lengths_B, tokens_BxT.shape[1])
        seen_BxT = inside_BxT if masked_BxT is None else inside_BxT & ~masked_BxT
        dtype = jnp.result_type(float)
        seen_BxT, lengths_Bx1 = seen_BxT.astype(dtype), lengths_B[:, None].astype(dtype)
        plus_BxT = jnp.where(tokens_BxT == 1, seen_BxT, 0)
        unseen_BxT = lengths_Bx1 - seen_BxT.sum(axis=1, keepdims=True) + seen_BxT
        missing_BxT = lengths_Bx1 / 2 - plus_BxT.sum(axis=1, keepdims=True) + plus_BxT
        numbers_BxTx2 = jnp.stack([unseen_BxT - missing_BxT, missing_BxT], axis=2)
        possible_BxT = inside_BxT & (numbers_BxTx2.min(axis=2) >= 0)
        return log_probs(numbers_BxTx2, possible_BxT)

    @jax.jit
    def next_log_probs(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p(next symbol | x_0 .. x_s-1), BxSx3 nats, by `_next_symbols`.

        Uniform also after words that begin no sentence.
        """
        pluses_BxS = self._pluses(tokens_BxT, lengths_B)
        S = pluses_BxS.shape[1]
        p_SxSx3 = jnp.asarray(_next_symbols(self.min_length, self.length), jnp.result_type(float))
        weights_BxSx3 = p_SxSx3[jnp.arange(S, dtype=jnp.int32)[None], pluses_BxS]
        return log_probs(weights_BxSx3, is_prefix(lengths_B, S))

    @jax.jit
    def log_prob(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p of the sentences, their lengths included, B nats."""
        return chain_rule(self.next_log_probs(tokens_BxT, lengths_B), tokens_BxT, lengths_B)

    def every_sentence_has(self, place: tuple[int, ...]) -> bool:
        return place[0] <= self.min_length

    def true_symbols(self, sentences: Sentences, place: tuple[int, ...]) -> tuple[Array, Array]:
        sums_B = jnp.sum(sentences.tokens_BxT[:, : place[0]] == 1, axis=1, dtype=jnp.int32)
        valid_B = sentences.lengths_B >= place[0]
        return jnp.where(valid_B, sums_B, 0), valid_B

    def symbol_posteriors(
        self, sentences: Sentences, places: tuple[tuple[int, ...], ...]
    ) -> list[Array]:
        """Return the one-hot sum, BxC each; uniform if the sentence is too short."""

        def one_hot(place: tuple[int, ...]) -> Array:
            sums_B, valid_B = self.true_symbols(sentences, place)
            num_classes = place[0] + 1
            one_hot_BxC = jax.nn.one_hot(sums_B, num_classes)
            return jnp.where(valid_B[:, None], one_hot_BxC, 1 / num_classes)

        return [one_hot(place) for place in places]

    @partial(jax.jit, static_argnames="places")
    def prefix_posteriors(
        self, sentences: Sentences, places: tuple[tuple[int, ...], ...]
    ) -> list[Array]:
        """Return the one-hot sum from the t-th word on, BxTxC each; zeros elsewhere."""
        T = sentences.tokens_BxT.shape[1]
        return [
            from_word(jnp.repeat(probs_BxC[:, None], T, axis=1), t - 1, sentences.lengths_B)
            for probs_BxC, (t,) in zip(
                self.symbol_posteriors(sentences, places), places, strict=True
            )
        ]

    def _pluses(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return the number of pluses in x_0 .. x_s-1, BxS."""
        plus_BxT = (tokens_BxT == 1) & is_word(lengths_B, tokens_BxT.shape[1])
        return jnp.pad(jnp.cumsum(plus_BxT, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


@cache
def _next_symbols(min_length: int, max_length: int) -> np.ndarray:
    """Return p(minus, plus, stop | s words, c of them pluses), SxSx3; zeros if they begin nothing.

    F(s, c) is the probability that a sentence begins with s given words. It is E(s, c), that they
    are the sentence, plus F(s + 1, c) + F(s + 1, c + 1). Length n has C(n, n / 2) sentences, so
    E(n, n / 2) = 1 / C(n, n / 2), up to the number of lengths, which cancels.
    """
    S = max_length + 1
    stops_SxS, begins = np.zeros((S, S)), np.zeros((S + 1, S + 1))
    for n in range(min_length, S, 2):
        stops_SxS[n, n // 2] = 1 / comb(n, n // 2)
    for s in reversed(range(S)):
        begins[s, :S] = stops_SxS[s] + begins[s + 1, :S] + begins[s + 1, 1:]
    weights_SxSx3 = np.stack([begins[1:, :S], begins[1:, 1:], stops_SxS], axis=2)
    return weights_SxSx3 / np.maximum(begins[:S, :S, None], np.finfo(float).tiny)


def random_dyck(seed: int, *, length: int, min_length: int, tasks: tuple[int, ...]) -> ZeroSum:
    """Return the language of zero-sum strings; nothing in it is random, so the seed is unused.

    tasks are numbers of words of a prefix. Raises ValueError on bad lengths or tasks.
    """
    del seed
    if not 2 <= min_length <= length:
        raise ValueError(f"min_length must be in 2..length={length}; got {min_length}")
    if length % 2 or min_length % 2:
        raise ValueError(f"length and min_length must be even; got {length}, {min_length}")
    for position in tasks:
        if not 1 <= position <= length:
            raise ValueError(f"tasks must be positions in 1..length={length}; got {position}")
    return ZeroSum(length=length, min_length=min_length, task_positions=tuple(tasks))
