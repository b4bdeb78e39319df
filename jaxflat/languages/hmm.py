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

    def _weights(self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None) -> Array:
        """Return P(x_t | state) at words, and 1 past the end, where tokens carry no information."""
        weights_BxTxK = word_weights(self.emissions_KxV, tokens_BxT, masked_BxT)
        words_BxT = is_word(lengths_B, tokens_BxT.shape[1])
        return jnp.where(words_BxT[..., None], weights_BxTxK, 1)

    def _messages(self, weights_BxTxK: Array) -> Array:
        """Return r_t(k) beta_t(k) prop. to p(state t = k | x_-t), BxTxK, not normalised."""

        def forward(predicted_BxK: Array, weights_BxK: Array) -> tuple[Array, Array]:
            filtered_BxK = normalize(predicted_BxK * weights_BxK)
            following = jnp.matmul(filtered_BxK, self.transitions_KxK, precision="highest")
            return following, predicted_BxK

        def backward(beta_BxK: Array, weights_BxK: Array) -> tuple[Array, Array]:
            seen_BxK = normalize(beta_BxK * weights_BxK)
            previous = jnp.matmul(seen_BxK, self.transitions_KxK.T, precision="highest")
            return previous, beta_BxK

        weights_TxBxK = jnp.swapaxes(weights_BxTxK, 0, 1)
        ones_BxK = jnp.ones_like(weights_TxBxK[0])
        _, predicted_TxBxK = jax.lax.scan(forward, ones_BxK * self.start_K[None], weights_TxBxK)
        _, beta_TxBxK = jax.lax.scan(backward, ones_BxK, weights_TxBxK, reverse=True)
        return jnp.swapaxes(predicted_TxBxK * beta_TxBxK, 0, 1)


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
