"""The language of balanced binary trees: a PCFG of known tree shape, inference linear in T.

Inference is upward-downward message passing; Pearl, "Reverend Bayes on inference engines" (1982).
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import draw, normalize, random_rows
from jaxflat.languages.prefixes import chain_rule, from_word, predict_symbols
from jaxflat.languages.sentences import Sentences, predict_words, word_weights
from jaxflat.languages.tasks import Task


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BalancedTree:
    """Sentences of 2^L words, emitted by the leaves of a full binary tree of hidden states.

    The root is k with probability start_K[k]. rules_LxKxKxK[l, a, b, c] = P(a -> b c) at level l.
    Latents are states_BxM of the M = 2^(L+1) - 1 nodes, level by level from the root. Tasks:
    `span_<start>_<end>` is the state of the node above words [start, end).
    """

    start_K: Array
    rules_LxKxKxK: Array
    emissions_KxV: Array
    task_spans: tuple[tuple[int, int], ...] = field(metadata={"static": True})

    @property
    def num_words(self) -> int:
        return self.emissions_KxV.shape[1]

    @property
    def num_symbols(self) -> int:
        return self.emissions_KxV.shape[0]

    @property
    def depth(self) -> int:
        return self.rules_LxKxKxK.shape[0]

    @property
    def max_length(self) -> int:
        return 2**self.depth

    @property
    def tasks(self) -> dict[str, Task]:
        return {f"span_{s}_{e}": Task(self, (s, e)) for s, e in self.task_spans}

    @partial(jax.jit, static_argnames="batch_size")
    def sample(self, key: Array, batch_size: int) -> Sentences:
        """Sample sentences; sentence b is a function of (key, b) alone."""
        K, dtype = self.num_symbols, self.start_K.dtype
        pairs_LxKxP = jnp.cumsum(self.rules_LxKxKxK.reshape(self.depth, K, K * K), axis=2)
        words_KxV = jnp.cumsum(self.emissions_KxV, axis=1)

        def sentence(key: Array) -> tuple[Array, Array]:
            node_key, word_key = jax.random.split(key)
            uniforms_T = jax.random.uniform(node_key, (self.max_length,), dtype)
            levels = [draw(uniforms_T[:1], jnp.cumsum(self.start_K)[None])]
            for level, pairs_KxP in enumerate(pairs_LxKxP):
                uniforms = uniforms_T[2**level : 2 ** (level + 1)]
                pair = draw(uniforms, pairs_KxP[levels[-1]])
                levels.append(jnp.stack([pair // K, pair % K], axis=1).ravel())
            uniforms_T = jax.random.uniform(word_key, (self.max_length,), dtype)
            return draw(uniforms_T, words_KxV[levels[-1]]), jnp.concatenate(levels)

        tokens_BxT, states_BxM = jax.vmap(sentence)(jax.random.split(key, batch_size))
        return Sentences(tokens_BxT, jnp.full(batch_size, self.max_length, jnp.int32), states_BxM)

    @jax.jit
    def conditional_log_probs(
        self, tokens_BxT: Array, lengths_B: Array, masked_BxT: Array | None = None
    ) -> Array:
        """Return log p(x_t = v | unmasked x_s, s != t), BxTxV nats."""
        weights_BxTxK = word_weights(self.emissions_KxV, tokens_BxT, masked_BxT)
        insides = self._inside(weights_BxTxK)
        return predict_words(self._outside(insides, insides)[-1], self.emissions_KxV, lengths_B)

    @jax.jit
    def next_log_probs(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p(next symbol | x_0 .. x_s-1), BxSxU nats.

        p(v) is prop. to sum_k O_s(k) B_kv, with outside probabilities of the words left of a node:
        O_left(b) = sum_ac O(a) P(a -> b c) and O_right(c) = sum_ab O(a) P(a -> b c) I_left(b).
        """
        insides = self._inside(word_weights(self.emissions_KxV, tokens_BxT, None))
        unseen = jax.tree.map(jnp.ones_like, insides)
        outside_BxTxK = self._outside(insides, unseen)[-1]
        words_BxTxV = jnp.matmul(outside_BxTxK, self.emissions_KxV, precision="highest")
        # After the last word a sentence stops, so any words will do.
        words_BxSxV = jnp.pad(words_BxTxV, ((0, 0), (0, 1), (0, 0)), mode="edge")
        return predict_symbols(words_BxSxV, lengths_B, self.max_length, self.max_length)

    @jax.jit
    def log_prob(self, tokens_BxT: Array, lengths_B: Array) -> Array:
        """Return log p of the sentences, B nats."""
        return chain_rule(self.next_log_probs(tokens_BxT, lengths_B), tokens_BxT, lengths_B)

    def every_sentence_has(self, place: tuple[int, int]) -> bool:
        return True

    def true_symbols(self, sentences: Sentences, place: tuple[int, int]) -> tuple[Array, Array]:
        level, index = _node(self.depth, place)
        states_B = sentences.latents[:, 2**level - 1 + index]
        return states_B, jnp.ones_like(states_B, dtype=bool)

    @partial(jax.jit, static_argnames="places")
    def symbol_posteriors(
        self, sentences: Sentences, places: tuple[tuple[int, int], ...]
    ) -> list[Array]:
        """Return p(state of the node | x), BxK each, prop. to inside * outside."""
        weights_BxTxK = word_weights(self.emissions_KxV, sentences.tokens_BxT, None)
        return self._posteriors(weights_BxTxK, places)

    @partial(jax.jit, static_argnames="places")
    def prefix_posteriors(
        self, sentences: Sentences, places: tuple[tuple[int, int], ...]
    ) -> list[Array]:
        """Return p(state of the node | x_0 .. x_t), BxTxK each; zeros before its last word.

        These are the posteriors of a sentence whose words after t are masked.
        """
        tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
        positions_1xT = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None]

        def after(t: Array) -> list[Array]:
            masked_BxT = jnp.broadcast_to(positions_1xT > t, tokens_BxT.shape)
            weights_BxTxK = word_weights(self.emissions_KxV, tokens_BxT, masked_BxT)
            return self._posteriors(weights_BxTxK, places)

        probs = [jnp.swapaxes(x, 0, 1) for x in jax.lax.map(after, positions_1xT[0])]
        return [
            from_word(probs_BxTxK, end - 1, lengths_B)
            for probs_BxTxK, (_, end) in zip(probs, places, strict=True)
        ]

    def _posteriors(self, weights_BxTxK: Array, places: tuple[tuple[int, int], ...]) -> list[Array]:
        insides = self._inside(weights_BxTxK)
        outsides = self._outside(insides, insides)
        nodes = [_node(self.depth, place) for place in places]
        return [normalize(insides[level][:, i] * outsides[level][:, i]) for level, i in nodes]

    def _inside(self, weights_BxTxK: Array) -> list[Array]:
        """Return P(words below the node | its state) by level, Bx2^lxK up to a factor."""
        levels = [weights_BxTxK]
        for rules_KxKxK in self.rules_LxKxKxK[::-1]:
            left, right = levels[0][:, 0::2], levels[0][:, 1::2]
            pairs = left[..., :, None] * right[..., None, :]
            above = jnp.einsum("bimn,amn->bia", pairs, rules_KxKxK, precision="highest")
            levels.insert(0, normalize(above))
        return levels

    def _outside(self, insides: list[Array], rights: list[Array]) -> list[Array]:
        """Return P(state, words not below the node) by level, Bx2^lxK up to a factor.

        rights: the inside probabilities of right children; ones if their words are not seen.
        """
        levels = [jnp.ones_like(insides[0]) * self.start_K[None, None]]
        of_levels = zip(self.rules_LxKxKxK, insides[1:], rights[1:], strict=True)
        for rules_KxKxK, below, right_below in of_levels:
            K, (left, right) = len(rules_KxKxK), (below[:, 0::2], right_below[:, 1::2])
            pairs = jnp.matmul(levels[-1], rules_KxKxK.reshape(K, K * K), precision="highest")
            pairs = pairs.reshape(*left.shape, K)
            to_left = jnp.sum(pairs * right[..., None, :], axis=3)
            to_right = jnp.sum(pairs * left[..., :, None], axis=2)
            levels.append(normalize(jnp.stack([to_left, to_right], axis=2).reshape(below.shape)))
        return levels


def _node(depth: int, span: tuple[int, int]) -> tuple[int, int]:
    """Return (level, index in the level) of the node above words [start, end)."""
    start, end = span
    for level in range(depth + 1):
        width = 2 ** (depth - level)
        if end - start == width and start % width == 0 and 0 <= start < 2**depth:
            return level, start // width
    raise ValueError(
        f"tasks must be spans of nodes, [i * 2^j, (i + 1) * 2^j) within 0..{2**depth}; "
        f"got ({start}, {end})"
    )


def random_balanced_tree(
    seed: int,
    *,
    depth: int,
    num_states: int,
    num_words: int,
    rule_concentration: float,
    emission_concentration: float,
    tasks: tuple[tuple[int, int], ...],
) -> BalancedTree:
    """Return a tree of 2^depth words with a uniform root and Dirichlet rule and emission rows.

    tasks are (start, end). Raises ValueError on bad sizes, concentrations or tasks.
    """
    if depth < 1:
        raise ValueError(f"depth must be >= 1 (sentences have 2^depth words); got {depth}")
    if min(num_states, num_words) < 2:
        raise ValueError(f"num_states and num_words must be >= 2; got {num_states}, {num_words}")
    if min(rule_concentration, emission_concentration) <= 0:
        raise ValueError(
            "rule_concentration and emission_concentration must be > 0; "
            f"got {rule_concentration}, {emission_concentration}"
        )
    spans = tuple((start, end) for start, end in tasks)
    for span in spans:
        _node(depth, span)
    K = num_states
    rule_key, emission_key = jax.random.split(jax.random.key(seed))
    return BalancedTree(
        start_K=jnp.full(K, 1 / K, jnp.float32),
        rules_LxKxKxK=random_rows(rule_key, rule_concentration, (depth, K, K * K)).reshape(
            depth, K, K, K
        ),
        emissions_KxV=random_rows(emission_key, emission_concentration, (K, num_words)),
        task_spans=spans,
    )
