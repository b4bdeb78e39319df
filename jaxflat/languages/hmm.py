"""Hidden Markov models, with exact conditionals by the forward-backward algorithm.

Rabiner, "A tutorial on hidden Markov models and selected applications in speech recognition"
(1989). The forward and backward messages are normalised at every position.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import draw, normalize, random_rows
from jaxflat.languages.prefixes import chain_rule, from_word, predict_symbols
from jaxflat.languages.sentences import Sentences, is_word, predict_words, word_weights
from jaxflat.languages.tasks import Task


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hmm:
    """A chain of K hidden states that emit V words; lengths are uniform in [min_length, length].

    Latents are states_BxT, -1 past the end. Tasks: `state_<t>` is the t-th state, from 1.
    """

    start_K: Array
    transitions_KxK: Array
    emissions_KxV: Array
    length: int = field(metadata={"static": True})
    min_length: int = field(metadata={"static": True})
    task_positions: tuple[int, ...] = field(metadata={"static": True})

    @property
    def num_words(self) -> int:
        return self.emissions_KxV.shape[1]

    @property
    def num_symbols(self) -> int:
        return self.emissions_KxV.shape[0]

    @property
    def max_length(self) -> int:
        return self.length

    @property
    def tasks(self) -> dict[str, Task]:
        return {f"state_{t}": Task(self, (t,)) for t in self.task_positions}

    @partial(jax.jit, static_argnames="batch_size")
    def sample(self, key: Array, batch_size: int) -> Sentences:
        """Sample sentences; sentence b is a function of (key, b) alone."""
        next_state_KxK = jnp.cumsum(self.transitions_KxK, axis=1)
        words_KxV = jnp.cumsum(self.emissions_KxV, axis=1)

        def step(state: Array, uniform: Array) -> tuple[Array, Array]:
            return draw(uniform, next_state_KxK[state]), state

        def sentence(key: Array) -> tuple[Array, Array, Array]:
            length_key, state_key, word_key = jax.random.split(key, 3)
            length = jax.random.randint(length_key, (), self.min_length, self.length + 1, jnp.int32)
            uniforms = jax.random.uniform(state_key, (self.length + 1,), self.start_K.dtype)
            first = draw(uniforms[0], jnp.cumsum(self.start_K))
            _, states_T = jax.lax.scan(step, first, uniforms[1:])
            uniforms_T = jax.random.uniform(word_key, (self.length,), self.start_K.dtype)
            words_T = draw(uniforms_T, words_KxV[states_T])
            inside_T = jnp.arange(self.length, dtype=jnp.int32) < length
            tokens_T = jnp.where(inside_T, words_T, self.num_words)
            return tokens_T, length, jnp.where(inside_T, states_T, -1)

        return Sentences(*jax.vmap(sentence)(jax.random.split(key, batch_size)))

    @jax.jit
    def conditional_log_probs(
        self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None = None
    ) -> Array:
        """Return log p(x_t = v | unmasked x_s, s != t, and the length), BxTxV nats.

        p(v | x_-t) prop. to sum_k r_t(k) B_kv beta_t(k), r_t(k) = sum_j alpha_{t-1}(j) A_jk.
        Uniform past the end.
        """
        weights_BxTxK = self._weights(tokens_BxT, lengths_B, masked_BxT)
        outside_BxTxK = self._messages(weights_BxTxK)
        return predict_words(outside_BxTxK, self.emissions_KxV, lengths_B)

    @jax.jit
    def next_log_probs(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p(next symbol | x_0 .. x_s-1), BxSxU nats.

        A word v has p(v) prop. to sum_k r_s(k) B_kv, r_s(k) = sum_j alpha_{s-1}(j) A_jk.
        """
        predicted_BxSxK = self._predicted(self._weights(tokens_BxT, lengths_B, None))
        words_BxSxV = jnp.matmul(predicted_BxSxK, self.emissions_KxV, precision="highest")
        return predict_symbols(words_BxSxV, lengths_B, self.min_length, self.length)

    @jax.jit
    def log_prob(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p of the sentences, their lengths included, B nats."""
        return chain_rule(self.next_log_probs(tokens_BxT, lengths_B), tokens_BxT, lengths_B)

    @jax.jit
    def state_beliefs(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return p(state at t | x_0 .. x_t) = alpha_t, BxTxK; zeros past the end."""
        weights_BxTxK = self._weights(tokens_BxT, lengths_B, None)
        beliefs_BxTxK = normalize(self._predicted(weights_BxTxK)[:, :-1] * weights_BxTxK)
        words_BxT = is_word(lengths_B, tokens_BxT.shape[1])
        return jnp.where(words_BxT[..., None], beliefs_BxTxK, 0)

    def every_sentence_has(self, place: tuple[int, ...]) -> bool:
        return place[0] <= self.min_length

    def true_symbols(self, sentences: Sentences, place: tuple[int, ...]) -> tuple[Array, Array]:
        states_B = sentences.latents[:, place[0] - 1]
        valid_B = sentences.lengths_B >= place[0]
        return jnp.where(valid_B, states_B, 0), valid_B

    @partial(jax.jit, static_argnames="places")
    def symbol_posteriors(
        self, sentences: Sentences, places: tuple[tuple[int, ...], ...]
    ) -> list[Array]:
        """Return p(state at t | x), BxK each, prop. to alpha_t beta_t = r_t B_{x_t} beta_t."""
        weights_BxTxK = self._weights(sentences.tokens_BxT, sentences.lengths_B, None)
        products_BxTxK = self._messages(weights_BxTxK) * weights_BxTxK
        return [normalize(products_BxTxK[:, position - 1]) for (position,) in places]

    @partial(jax.jit, static_argnames="places")
    def prefix_posteriors(
        self, sentences: Sentences, places: tuple[tuple[int, ...], ...]
    ) -> list[Array]:
        """Return p(state at position p | x_0 .. x_t), t >= p, BxTxK each; zeros elsewhere.

        It is prop. to alpha_p beta_pt, with beta_tt = 1 and beta_pt = A (B_{x_p+1} beta_{p+1, t}).
        """
        tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
        weights_BxTxK = self._weights(tokens_BxT, lengths_B, None)
        beliefs_BxTxK = self.state_beliefs(tokens_BxT, lengths_B)
        positions = [place[0] - 1 for place in places]
        posteriors: dict[int, Array] = {}
        ones_Bx1xK = jnp.ones_like(weights_BxTxK[:, :1])
        beta_BxNxK = ones_Bx1xK  # of position p, for the N prefixes t = p .. T - 1
        T = tokens_BxT.shape[1]
        for p in reversed(range(min(positions, default=T), T)):
            if p in positions:
                probs_BxNxK = normalize(beliefs_BxTxK[:, p, None] * beta_BxNxK)
                probs_BxTxK = jnp.pad(probs_BxNxK, ((0, 0), (p, 0), (0, 0)))
                posteriors[p] = from_word(probs_BxTxK, p, lengths_B)
            seen_BxNxK = normalize(beta_BxNxK * weights_BxTxK[:, p, None])
            before_BxNxK = jnp.matmul(seen_BxNxK, self.transitions_KxK.T, precision="highest")
            beta_BxNxK = jnp.concatenate([ones_Bx1xK, before_BxNxK], axis=1)
        return [posteriors[p] for p in positions]

    def _weights(self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None) -> Array:
        """Return P(x_t | state) at words, and 1 past the end, where tokens carry no information."""
        weights_BxTxK = word_weights(self.emissions_KxV, tokens_BxT, masked_BxT)
        words_BxT = is_word(lengths_B, tokens_BxT.shape[1])
        return jnp.where(words_BxT[..., None], weights_BxTxK, 1)

    def _predicted(self, weights_BxTxK: Array) -> Array:
        """Return r_s(k) = p(state k after s words | x_0 .. x_s-1), BxSxK, S = T + 1."""

        def forward(predicted_BxK: Array, weights_BxK: Array) -> tuple[Array, Array]:
            filtered_BxK = normalize(predicted_BxK * weights_BxK)
            following = jnp.matmul(filtered_BxK, self.transitions_KxK, precision="highest")
            return following, following

        weights_TxBxK = jnp.swapaxes(weights_BxTxK, 0, 1)
        start_BxK = jnp.ones_like(weights_TxBxK[0]) * self.start_K[None]
        _, following_TxBxK = jax.lax.scan(forward, start_BxK, weights_TxBxK)
        return jnp.swapaxes(jnp.concatenate([start_BxK[None], following_TxBxK]), 0, 1)

    def _messages(self, weights_BxTxK: Array) -> Array:
        """Return r_t(k) beta_t(k) prop. to p(state t = k | x_-t), BxTxK, not normalised."""

        def backward(beta_BxK: Array, weights_BxK: Array) -> tuple[Array, Array]:
            seen_BxK = normalize(beta_BxK * weights_BxK)
            previous = jnp.matmul(seen_BxK, self.transitions_KxK.T, precision="highest")
            return previous, beta_BxK

        weights_TxBxK = jnp.swapaxes(weights_BxTxK, 0, 1)
        ones_BxK = jnp.ones_like(weights_TxBxK[0])
        _, beta_TxBxK = jax.lax.scan(backward, ones_BxK, weights_TxBxK, reverse=True)
        return self._predicted(weights_BxTxK)[:, :-1] * jnp.swapaxes(beta_TxBxK, 0, 1)


def random_hmm(
    seed: int,
    *,
    num_states: int,
    num_words: int,
    length: int,
    min_length: int,
    transition_concentration: float,
    emission_concentration: float,
    tasks: tuple[int, ...],
) -> Hmm:
    """Return an HMM with a uniform start and Dirichlet transition and emission rows.

    tasks are positions from 1. Raises ValueError on bad sizes, lengths, concentrations or tasks.
    """
    if min(num_states, num_words) < 2:
        raise ValueError(f"num_states and num_words must be >= 2; got {num_states}, {num_words}")
    if not 1 <= min_length <= length:
        raise ValueError(f"min_length must be in 1..length={length}; got {min_length}")
    if min(transition_concentration, emission_concentration) <= 0:
        raise ValueError(
            "transition_concentration and emission_concentration must be > 0; "
            f"got {transition_concentration}, {emission_concentration}"
        )
    for position in tasks:
        if not 1 <= position <= length:
            raise ValueError(f"tasks must be positions in 1..length={length}; got {position}")
    transition_key, emission_key = jax.random.split(jax.random.key(seed))
    return Hmm(
        start_K=jnp.full(num_states, 1 / num_states, jnp.float32),
        transitions_KxK=random_rows(
            transition_key, transition_concentration, (num_states, num_states)
        ),
        emissions_KxV=random_rows(emission_key, emission_concentration, (num_states, num_words)),
        length=length,
        min_length=min_length,
        task_positions=tuple(tasks),
    )
