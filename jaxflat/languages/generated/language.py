"""The language that an autoregressive model generates; enumeration gives exact conditionals.

With R the V kept tokens and the stop symbol, and q the model's softmax restricted to R,

    P(x_1 .. x_n) = prod_t q(x_t | x_<t) * [n < max_length] q(stop | x_1 .. x_n).

Before min_length words q also excludes the stop symbol; after max_length words it is certain.

The score of a word v is log p(x_t = v | the visible words), up to a term without v. Symbols are the
words 0..V-1 and V, which stops the sentence and fills it to the end.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxflat.languages.categorical import draw
from jaxflat.languages.prefixes import is_prefix
from jaxflat.languages.sentences import Sentences, is_word

CHUNK = 2**21  # most logits in memory together
CACHE_BYTES = 2**29  # most bytes of the keys and values of sentences that are sampled together
_GROUPS = 8  # groups of sentences, so that a mesh can split them over its devices
_SIZES = 16  # most numbers of words to read for a candidate that a program is compiled for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """Sentences of min_length to max_length words that a teacher, a causal model, generates.

    params, kept_V (int32): the teacher's parameters, and its ids of the words 0..V-1.
    tasks: {name: Task}.
    model: `next_logits(ids_BxS, cache, start, token_ids)` of this flax module returns (logits of
    token_ids, cache). empty_cache(model, batch_size, length, dtype) makes its cache.
    first_token, stop_token: the ids of the token before the first word, and of the stop symbol.
    max_candidates: the most completions of a sentence that the oracle enumerates.
    """

    params: Any
    kept_V: Array
    tasks: dict[str, Any]
    model: Any = field(metadata={"static": True})
    empty_cache: Callable[..., Any] = field(metadata={"static": True})
    first_token: int = field(metadata={"static": True})
    stop_token: int = field(metadata={"static": True})
    min_length: int = field(metadata={"static": True})
    max_length: int = field(metadata={"static": True})
    max_candidates: int = field(metadata={"static": True})

    def __post_init__(self) -> None:
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(
                f"min_length must be in 1..max_length={self.max_length}; got {self.min_length}"
            )

    @property
    def num_words(self) -> int:
        return self.kept_V.shape[0]

    @property
    def ids_R(self) -> Array:
        """Return the teacher's ids of the R = V + 1 symbols: the words, then the stop symbol."""
        return jnp.append(self.kept_V, jnp.asarray(self.stop_token, self.kept_V.dtype))

    @partial(jax.jit, static_argnames="batch_size")
    def sample(self, key: Array, batch_size: int) -> Sentences:
        """Sample sentences; b is a function of (key, b) up to rounding of the teacher's logits.

        Slices of equal size, whose caches take at most CACHE_BYTES, follow each other. Slice n has
        the sentences s N + n: a mesh that splits the batch splits every slice.
        """
        keys_B, together = jax.random.split(key, batch_size), self.sentences_together()
        if batch_size <= together:
            return self._sample_slice(keys_B)
        groups = gcd(together, _GROUPS)
        num_slices = -(-batch_size // together)
        size = groups * -(-batch_size // (num_slices * groups))
        keys_P = jnp.pad(keys_B, (0, num_slices * size - batch_size), mode="edge")
        slices = jax.lax.map(self._sample_slice, keys_P.reshape(size, num_slices).T)
        return jax.tree.map(
            lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:batch_size], slices
        )

    def sentences_together(self) -> int:
        """Return how many sentences have caches of CACHE_BYTES together, at least 1.

        From _GROUPS on it is a multiple of _GROUPS.
        """
        dtype = jax.tree.leaves(self.params)[0].dtype
        make = partial(self.empty_cache, self.model, 1, self.max_length, dtype)
        leaves = jax.tree.leaves(jax.eval_shape(make))
        most = CACHE_BYTES // sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return max(1, most if most < _GROUPS else most - most % _GROUPS)

    def _sample_slice(self, keys_B: Array) -> Sentences:
        """Sample a sentence with each key; the caches of all are in memory together."""
        batch_size, dtype = len(keys_B), jax.tree.leaves(self.params)[0].dtype
        uniforms_BxT = jax.vmap(lambda k: jax.random.uniform(k, (self.max_length,), dtype))(keys_B)

        def step(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
            ids_B, stopped_B, cache = carry
            t, uniforms_B = inputs
            logits_Bx1xR, cache = self.logits(ids_B[:, None], cache, t)
            cumulative_BxR = jnp.cumsum(jax.nn.softmax(logits_Bx1xR[:, 0]), axis=1)
            symbols_B = jnp.where(stopped_B, self.num_words, draw(uniforms_B, cumulative_BxR))
            return (self.ids_R[symbols_B], symbols_B == self.num_words, cache), symbols_B

        first_B = jnp.full(batch_size, self.first_token, self.kept_V.dtype)
        cache = self.empty_cache(self.model, batch_size, self.max_length, dtype)
        carry = first_B, jnp.zeros(batch_size, bool), cache
        positions_T = jnp.arange(self.max_length, dtype=jnp.int32)
        _, symbols_TxB = jax.lax.scan(step, carry, (positions_T, uniforms_BxT.T))
        lengths_B = jnp.sum(symbols_TxB < self.num_words, axis=0, dtype=jnp.int32)
        return Sentences(symbols_TxB.T, lengths_B, None)

    @jax.jit
    def log_prob(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log P(x_1 .. x_n), B nats, of sentences of T <= max_length positions.

        With less than min_length words it is hugely negative, but finite.
        """

        def one(sentence: tuple[Array, Array]) -> Array:
            symbols_U, length = sentence
            ids_1xP = self.inputs(symbols_U[None])
            log_q_P = _log_q(self.logits(ids_1xP)[0][0], symbols_U[: ids_1xP.shape[1]])
            return jnp.where(jnp.arange(len(log_q_P), dtype=jnp.int32) <= length, log_q_P, 0).sum()

        symbols_BxU = self.symbols(tokens_BxT, lengths_B)
        num_parallel = max(1, CHUNK // (symbols_BxU.shape[1] * len(self.ids_R)))
        return jax.lax.map(one, (symbols_BxU, lengths_B), batch_size=num_parallel)

    @jax.jit
    def next_log_probs(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p(next symbol | the words before), BxSxR nats: log q of each symbol.

        After max_length words the stop symbol is certain. Uniform beyond the stop symbol.
        """
        symbols_BxU = self.symbols(tokens_BxT, lengths_B)
        logits_BxPxR, _ = self.logits(self.inputs(symbols_BxU))
        S, P = symbols_BxU.shape[1], logits_BxPxR.shape[1]
        lowest = jnp.finfo(logits_BxPxR.dtype).min
        scores_BxSxR = jnp.pad(logits_BxPxR, ((0, 0), (0, S - P), (0, 0)), constant_values=lowest)
        scores_BxSxR = scores_BxSxR.at[:, P:, self.num_words].set(0)
        return _log_probs(scores_BxSxR, is_prefix(lengths_B, S))

    def conditional_log_probs(
        self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None = None
    ) -> Array:
        """Return log p(x_t = v | unmasked x_s, s != t, and the length), BxTxV nats.

        p(v | x_-t) prop. to q(v | x_<t) prod_{s>t} q(x_s | x_<t, v, x_t+1 .. x_s-1), where x_n+1
        is the stop symbol if n < max_length. With masked words it is prop. to the sum over all
        words that can be there. Uniform past the end. Raises ValueError if a sentence's m masked
        words, and one more, have more than max_candidates completions. Also raises ValueError if
        masked_BxT is given and it or lengths_B is traced.
        """
        T = tokens_BxT.shape[1]
        if masked_BxT is None:
            positions_T = jnp.arange(T, dtype=jnp.int32)
            positions_BxT = jnp.broadcast_to(positions_T[None], tokens_BxT.shape)
            return self.conditional_at(tokens_BxT, lengths_B, positions_BxT)
        if isinstance(masked_BxT, Tracer) or isinstance(lengths_B, Tracer):
            raise ValueError(
                "masked_BxT and lengths_B must be concrete: they say what to enumerate"
            )
        hidden_BxT = np.asarray(masked_BxT) & np.asarray(is_word(lengths_B, T))
        m = int(np.minimum(hidden_BxT.sum(axis=1) + 1, lengths_B).max())
        if self.num_words**m > self.max_candidates:
            raise ValueError(
                f"V={self.num_words} words at m={m} positions, the masked ones and one more, "
                f"have V^m completions: more than max_candidates={self.max_candidates}"
            )
        scores = [
            _completion_scores(self, tokens_BxT[b], int(lengths_B[b]), np.flatnonzero(hidden_T))
            for b, hidden_T in enumerate(hidden_BxT)
        ]
        scores_BxTxV = jnp.stack(scores)
        return _log_probs(scores_BxTxV, is_word(lengths_B, T))

    @jax.jit
    def conditional_at(self, tokens_BxT: Array, lengths_B: Array, positions_BxM: Array) -> Array:
        """Return log p(x_t = v | x_s, s != t, and the length) at t in positions_BxM, BxMxV nats.

        The cost is V times the number of words from t on, summed over these positions.
        """
        symbols_BxU = self.symbols(tokens_BxT, lengths_B)
        scores_BxMxV = _candidate_scores(self, symbols_BxU, lengths_B, positions_BxM)
        return _log_probs(scores_BxMxV, positions_BxM < lengths_B[:, None])

    def symbols(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return symbols_BxU int32, U = T + 1: the words, then the stop symbol V to the end."""
        V, words_BxT = self.num_words, is_word(lengths_B, tokens_BxT.shape[1])
        symbols_BxT = jnp.where(words_BxT, jnp.clip(tokens_BxT, 0, V - 1), V)
        return jnp.pad(symbols_BxT, ((0, 0), (0, 1)), constant_values=V)

    def inputs(self, symbols_BxU: Array) -> Array:
        """Return ids_BxP: the first token, then the symbols that another symbol may follow."""
        ids_BxU = jnp.pad(
            self.ids_R[symbols_BxU[:, :-1]], ((0, 0), (1, 0)), constant_values=self.first_token
        )
        return ids_BxU[:, : self.max_length]

    def logits(
        self, ids_BxS: Array, cache: Any = None, start: int | Array = 0
    ) -> tuple[Array, Any]:
        """Return (logits_BxSxR, cache) of q from position start on; position t follows t words."""
        with jax.default_matmul_precision("highest"):  # the same language for all callers
            inputs = ids_BxS, cache, start, self.ids_R
            logits_BxSxR, cache = self.model.apply(
                {"params": self.params}, *inputs, method="next_logits"
            )
        num_words_S = start + jnp.arange(ids_BxS.shape[1], dtype=jnp.int32)
        is_stop_R = jnp.arange(len(self.ids_R), dtype=jnp.int32) == self.num_words
        excluded_SxR = (num_words_S < self.min_length)[:, None] & is_stop_R[None]
        lowest = jnp.finfo(logits_BxSxR.dtype).min
        return jnp.where(excluded_SxR[None], lowest, logits_BxSxR), cache


def _log_probs(scores_BxMxV: Array, words_BxM: Array) -> Array:
    """Normalise to nats, floored at the smallest normal number; uniform where `words` is False."""
    floor = jnp.finfo(scores_BxMxV.dtype).tiny
    scores_BxMxV = jnp.where(words_BxM[..., None], scores_BxMxV, 0)
    return jnp.maximum(jax.nn.log_softmax(scores_BxMxV), jnp.log(floor))


def _log_q(logits_SxR: Array, symbols_S: Array) -> Array:
    """Return log q_S of these symbols, in nats, without an array of all log-probabilities."""
    chosen_S = jnp.take_along_axis(logits_SxR, symbols_S[:, None], axis=1)[:, 0]
    return chosen_S - jax.nn.logsumexp(logits_SxR, axis=1)


def _candidate_scores(
    language: Generated, symbols_BxU: Array, lengths_B: Array, positions_BxM: Array
) -> Array:
    """Return scores_BxMxV of all words at each of the positions, given all other words.

    The B * M questions are split into groups. Each group is sorted by the number of words to read
    for a candidate, so that questions answered together need about as many.
    """
    (B, M), U = positions_BxM.shape, symbols_BxU.shape[1]
    C = gcd(B, _GROUPS)  # groups, each of B / C sentences and Q = B / C * M questions
    last_B = jnp.minimum(lengths_B, language.max_length - 1)
    num_read_BxM = jnp.maximum(last_B[:, None] - positions_BxM, 0)
    num_read_CxQ, positions_CxQ = (x.reshape(C, -1) for x in (num_read_BxM, positions_BxM))
    symbols_CxGxU = symbols_BxU.reshape(C, B // C, U)
    order_CxQ = jnp.argsort(num_read_CxQ, axis=1)

    def answer(questions_C: Array) -> Array:
        def of_group(x_CxQ: Array) -> Array:
            return jnp.take_along_axis(x_CxQ, questions_C[:, None], axis=1)[:, 0]

        sentences_Cx1x1 = (questions_C // M)[:, None, None]
        symbols_CxU = jnp.take_along_axis(symbols_CxGxU, sentences_Cx1x1, axis=1)[:, 0]
        return _scores(language, symbols_CxU, of_group(positions_CxQ), of_group(num_read_CxQ))

    scores_CxQxV = jax.lax.map(answer, order_CxQ.T).swapaxes(0, 1)
    back_CxQ = jnp.argsort(order_CxQ, axis=1)
    scores_CxQxV = jnp.take_along_axis(scores_CxQxV, back_CxQ[..., None], axis=1)
    return scores_CxQxV.reshape(B, M, language.num_words)


def _scores(
    language: Generated, symbols_CxU: Array, positions_C: Array, num_read_C: Array
) -> Array:
    """Return scores_CxV at one position of each of C sentences: log q of v and of the words after.

    The model reads a sentence once. All candidates then share its cache of the words before t.
    """
    logits_CxPxR, cache = language.logits(language.inputs(symbols_CxU))
    prior_CxR = jnp.take_along_axis(logits_CxPxR, positions_C[:, None, None], axis=1)[:, 0]
    prior_CxV = prior_CxR[:, : language.num_words]
    cache_of_one = jax.tree.map(lambda x: x[:, :, None], cache)

    def following(size: int) -> Array:
        """Return log q of the next `size` symbols after t, given candidate v at t, CxV."""

        def one(word: Array, cache: Any, symbols_U: Array, t: Array, num_read: Array) -> Array:
            offsets_S = jnp.arange(size, dtype=jnp.int32)
            read_S = jnp.where(offsets_S == 0, word, symbols_U.at[t + offsets_S].get(mode="clip"))
            next_S = symbols_U.at[t + offsets_S + 1].get(mode="clip")
            logits_1xSxR, _ = language.logits(language.ids_R[read_S][None], cache, t + 1)
            return jnp.where(offsets_S < num_read, _log_q(logits_1xSxR[0], next_S), 0).sum()

        def some(words_K: Array) -> Array:
            of_words = jax.vmap(one, in_axes=(0, None, None, None, None))
            of_groups = jax.vmap(of_words, in_axes=(None, 1, 0, 0, 0))
            return of_groups(words_K, cache_of_one, symbols_CxU, positions_C, num_read_C)

        C, V = prior_CxV.shape
        num_chunks = -(-V * C * size * len(language.ids_R) // CHUNK)
        words_NxK = jnp.arange(num_chunks * -(-V // num_chunks), dtype=jnp.int32) % V
        log_q_NxCxK = jax.lax.map(some, words_NxK.reshape(num_chunks, -1))
        return log_q_NxCxK.swapaxes(0, 1).reshape(C, -1)[:, :V]

    most = min(symbols_CxU.shape[1], language.max_length) - 1
    step = -(-most // _SIZES) or 1
    sizes = range(step, most + step, step)
    branches = [lambda: jnp.zeros_like(prior_CxV), *(lambda s=s: following(s) for s in sizes)]
    return prior_CxV + jax.lax.switch(-(-num_read_C.max() // step), branches)


def _completion_scores(
    language: Generated, tokens_T: Array, length: int, hidden_M: np.ndarray
) -> Array:
    """Return scores_TxV of a sentence whose words at the positions hidden_M are hidden.

    Row t is the log of the sum of P(sentence) over all words at t and at hidden_M. Rows past the
    end are zero. One sum gives the rows of all hidden words; every other word needs its own sum.
    """
    V, hidden = language.num_words, tuple(hidden_M.tolist())
    seen = [t for t in range(length) if t not in hidden]
    sums = [tuple(sorted((*hidden, t))) for t in seen]
    if hidden:
        sums = [hidden, *sums]
    rows: dict[int, Array] = {}
    for unseen in sums:
        m = len(unseen)
        words_NxM = np.indices((V,) * m, np.int32).reshape(m, -1).T
        completions_NxT = jnp.tile(jnp.asarray(tokens_T)[None], (V**m, 1))
        completions_NxT = completions_NxT.at[:, np.array(unseen)].set(words_NxM)
        lengths_N = jnp.full(V**m, length, jnp.int32)
        log_probs = language.log_prob(completions_NxT, lengths_N).reshape((V,) * m)
        for axis, t in enumerate(unseen):
            if t not in rows:
                others = tuple(a for a in range(m) if a != axis)
                rows[t] = jax.nn.logsumexp(log_probs, axis=others)
    nothing_V = jnp.zeros_like(rows[0])
    return jnp.stack([rows.get(t, nothing_V) for t in range(len(tokens_T))])
