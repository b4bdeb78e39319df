"""The language that an autoregressive model generates, its conditionals exact by enumeration.

With R the V kept tokens and the stop symbol, and q the model's softmax restricted to R,

    P(x_1 .. x_n) = prod_t q(x_t | x_<t) * [n < max_length] q(stop | x_1 .. x_n).

Before min_length words q leaves the stop symbol out as well; after max_length words it is certain.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxflat.languages.categorical import draw
from jaxflat.languages.generated.candidates import (
    CHUNK,
    candidate_scores,
    completion_scores,
    picked,
)
from jaxflat.languages.masking import is_word
from jaxflat.languages.sentences import Sentences


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """Sentences of min_length to max_length words of a teacher; words are the tokens kept_V.

    params, kept_V (int32): the teacher's parameters and its ids of the words 0..V-1.
    tasks: {name: Task}, made elsewhere.
    model: `apply({"params": params}, ids_BxS, cache, start, token_ids)` returns (logits of
    token_ids, cache). empty_cache(model, batch_size, length, dtype) makes its cache.
    first_token, stop_token: ids of the token fed before the first word, and of the stop symbol.
    max_candidates: how many completions of a sentence may be enumerated.
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
        """The teacher's ids of the R = V + 1 symbols: the words, then the stop symbol."""
        return jnp.append(self.kept_V, jnp.asarray(self.stop_token, self.kept_V.dtype))

    @partial(jax.jit, static_argnames="batch_size")
    def sample(self, key: Array, batch_size: int) -> Sentences:
        """Sentence b is a function of (key, b), up to the rounding of the teacher's logits."""
        dtype = jax.tree.leaves(self.params)[0].dtype
        keys_B = jax.random.split(key, batch_size)
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
        """log P(x_1 .. x_n), B nats; hugely negative, but finite, for less than min_length words.

        T is at most max_length.
        """

        def one(sentence: tuple[Array, Array]) -> Array:
            symbols_U, length = sentence
            ids_1xP = self.inputs(symbols_U[None])
            log_q_P = picked(self.logits(ids_1xP)[0][0], symbols_U[: ids_1xP.shape[1]])
            return jnp.where(jnp.arange(len(log_q_P), dtype=jnp.int32) <= length, log_q_P, 0).sum()

        symbols_BxU = self.symbols(tokens_BxT, lengths_B)
        at_once = max(1, CHUNK // (symbols_BxU.shape[1] * len(self.ids_R)))
        return jax.lax.map(one, (symbols_BxU, lengths_B), batch_size=at_once)

    def conditional_log_probs(
        self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None = None
    ) -> Array:
        """log p(x_t = v | unmasked x_s, s != t, and the length), BxTxV nats; uniform past the end.

        p(v | x_-t) prop. to q(v | x_<t) prod_{s>t} q(x_s | x_<t, v, x_t+1 .. x_s-1), where x_n+1
        is the stop symbol if n < max_length; with masked words, to its sum over what they can be.
        Raises ValueError where a sentence's m masked words, and one more, have more completions
        than max_candidates, and where masked_BxT (or lengths_B beside it) is traced.
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
            completion_scores(self, tokens_BxT[b], int(lengths_B[b]), np.flatnonzero(hidden_T))
            for b, hidden_T in enumerate(hidden_BxT)
        ]
        scores_BxTxV = jnp.stack(scores)
        return _log_probs(scores_BxTxV, is_word(lengths_B, T))

    @jax.jit
    def conditional_at(self, tokens_BxT: Array, lengths_B: Array, positions_BxM: Array) -> Array:
        """log p(x_t = v | x_s, s != t, and the length) at t in positions_BxM only, BxMxV nats.

        The cost is V times the number of words from t on, summed over the positions asked for.
        """
        symbols_BxU = self.symbols(tokens_BxT, lengths_B)
        scores_BxMxV = candidate_scores(self, symbols_BxU, lengths_B, positions_BxM)
        return _log_probs(scores_BxMxV, positions_BxM < lengths_B[:, None])

    def symbols(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """symbols_BxU int32, U = T + 1: the words 0..V-1, then V, the stop symbol, to the end."""
        V, words_BxT = self.num_words, is_word(lengths_B, tokens_BxT.shape[1])
        symbols_BxT = jnp.where(words_BxT, jnp.clip(tokens_BxT, 0, V - 1), V)
        return jnp.pad(symbols_BxT, ((0, 0), (0, 1)), constant_values=V)

    def inputs(self, symbols_BxU: Array) -> Array:
        """ids_BxP: the first token and the symbols that another one may follow."""
        ids_BxU = jnp.pad(
            self.ids_R[symbols_BxU[:, :-1]], ((0, 0), (1, 0)), constant_values=self.first_token
        )
        return ids_BxU[:, : self.max_length]

    def logits(
        self, ids_BxS: Array, cache: Any = None, start: int | Array = 0
    ) -> tuple[Array, Any]:
        """(logits_BxSxR, cache) of q at the positions from start on; position t follows t words."""
        with jax.default_matmul_precision("highest"):  # one language, whoever asks for it
            logits_BxSxR, cache = self.model.apply(
                {"params": self.params}, ids_BxS, cache, start, self.ids_R
            )
        num_words_S = start + jnp.arange(ids_BxS.shape[1], dtype=jnp.int32)
        is_stop_R = jnp.arange(len(self.ids_R), dtype=jnp.int32) == self.num_words
        excluded_SxR = (num_words_S < self.min_length)[:, None] & is_stop_R[None]
        lowest = jnp.finfo(logits_BxSxR.dtype).min
        return jnp.where(excluded_SxR[None], lowest, logits_BxSxR), cache


def _log_probs(scores_BxMxV: Array, words_BxM: Array) -> Array:
    """Normalise to nats, floored at the smallest normal number; uniform where there is no word."""
    floor = jnp.finfo(scores_BxMxV.dtype).tiny
    scores_BxMxV = jnp.where(words_BxM[..., None], scores_BxMxV, 0)
    return jnp.maximum(jax.nn.log_softmax(scores_BxMxV), jnp.log(floor))
