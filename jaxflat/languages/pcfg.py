"""Probabilistic context-free grammars in Chomsky normal form, with exact sampling and conditionals.

Baker, "Trainable grammars for speech recognition" (1979); outside probabilities as derivatives of
the inside ones: Eisner, "Inside-outside and forward-backward algorithms are just backprop" (2016).
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import normalize, random_rows
from jaxflat.languages.derivations import sample_sentence, yield_tables
from jaxflat.languages.emissions import predict_words, word_weights
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import Task


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pcfg:
    """Root A with start_N[A]; A -> B C with rules_NxNxN[A, B, C]; A -> word with emissions_NxV[A].

    For every A the rules and emissions sum to 1 together. Sentences are those of the grammar given
    min_length <= length <= max_length. Latents: a `derivations.Tree`. Tasks:
    `span_<start>_<end>`, the non-terminal above words [start, end), valid where the sentence's
    tree has such a node.
    """

    start_N: Array
    rules_NxNxN: Array
    emissions_NxV: Array
    min_length: int = field(metadata={"static": True})
    max_length: int = field(metadata={"static": True})
    task_spans: tuple[tuple[int, int], ...] = field(metadata={"static": True})

    @property
    def num_words(self) -> int:
        return self.emissions_NxV.shape[1]

    @property
    def num_symbols(self) -> int:
        return self.emissions_NxV.shape[0]

    @property
    def tasks(self) -> dict[str, Task]:
        return {f"span_{s}_{e}": Task(self, (s, e)) for s, e in self.task_spans}

    @partial(jax.jit, static_argnames="batch_size")
    def sample(self, key: Array, batch_size: int) -> Sentences:
        """Exact, without rejection or truncation; sentence b is a function of (key, b) alone."""
        tables = yield_tables(self.rules_NxNxN, self.emissions_NxV, self.max_length)
        one = partial(sample_sentence, tables, self.start_N, self.rules_NxNxN, self.emissions_NxV)
        one = partial(one, self.min_length)
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

        def total(weights_BxTxN: Array) -> Array:
            return self._scaled_probs(weights_BxTxN, lengths_B).sum()

        return predict_words(jax.grad(total)(weights_BxTxN), self.emissions_NxV, lengths_B)

    def true_symbols(self, sentences: Sentences, place: tuple[int, int]) -> tuple[Array, Array]:
        tree, (start, end) = sentences.latents, place
        here_BxM = (tree.start_BxM == start) & (tree.width_BxM == end - start)
        symbols_B = jnp.sum(jnp.where(here_BxM, tree.symbol_BxM, 0), axis=1)
        return symbols_B, jnp.any(here_BxM, axis=1)

    @partial(jax.jit, static_argnames="place")
    def symbol_posterior(self, sentences: Sentences, place: tuple[int, int]) -> Array:
        """p(A above the span | x, the span is a constituent), BxN.

        prop. to dZ / db(A), b(A) = 1 a factor on the chart cell of A above the span. Uniform where
        the sentence ends before the span does.
        """
        weights_BxTxN = word_weights(self.emissions_NxV, sentences.tokens_BxT, None)

        def total(factor_BxN: Array) -> Array:
            return self._scaled_probs(weights_BxTxN, sentences.lengths_B, place, factor_BxN).sum()

        return normalize(jax.grad(total)(jnp.ones_like(weights_BxTxN[:, 0])))

    def _scaled_probs(
        self,
        weights_BxTxN: Array,
        lengths_B: Array,
        span: tuple[int, int] | None = None,
        factor_BxN: Array | None = None,
    ) -> Array:
        """Each sentence's probability times a constant of its own, by the inside recursion.

        `left` holds, for the starts i still open, the cells of widths 1..w-1 that start at i, and
        `right` those that end at i + w, widest first: split k pairs left[k] with right[k]. A cell
        is exp(scale) * weights_N; scales are constants to the derivative, since another choice of
        scale would describe the same cell.
        """

        def close(cells: Array, start_scale: Array, width: int) -> tuple[Array, Array]:
            if span is not None and span[1] - span[0] == width and span[0] < cells.shape[1]:
                cells = cells.at[:, span[0]].multiply(factor_BxN)
            peak = jax.lax.stop_gradient(cells.max(axis=2))
            peak = jnp.where(peak > 0, peak, 1)
            return cells / peak[..., None], start_scale + jnp.log(peak)

        cells, scale = close(weights_BxTxN, jnp.zeros_like(weights_BxTxN[..., 0]), 1)
        left = right = cells[:, :, None]
        left_scale = right_scale = scale[:, :, None]
        roots = [cells[:, 0]]
        for width in range(2, weights_BxTxN.shape[1] + 1):
            left, right = left[:, :-1], right[:, 1:]
            left_scale, right_scale = left_scale[:, :-1], right_scale[:, 1:]
            cells, scale = _combine(self.rules_NxNxN, left, right, left_scale + right_scale)
            cells, scale = close(cells, scale, width)
            left = jnp.concatenate([left, cells[:, :, None]], axis=2)
            right = jnp.concatenate([cells[:, :, None], right], axis=2)
            left_scale = jnp.concatenate([left_scale, scale[:, :, None]], axis=2)
            right_scale = jnp.concatenate([scale[:, :, None], right_scale], axis=2)
            roots.append(cells[:, 0])
        index_Bx1x1 = lengths_B[:, None, None] - 1
        root_BxN = jnp.take_along_axis(jnp.stack(roots, axis=1), index_Bx1x1, axis=1)[:, 0]
        return jnp.matmul(root_BxN, self.start_N, precision="highest")


@jax.checkpoint
def _combine(rules_NxNxN: Array, left: Array, right: Array, scales: Array) -> tuple[Array, Array]:
    """Cells (BxIxN) and their log scales (BxI) from splits (BxIxSxN each, log scales BxIxS).

    Recomputed in the reverse pass: the BxIxNxN products would be most of the memory.
    """
    shift = scales.max(axis=2, keepdims=True)
    left = left * jnp.exp(scales - shift)[..., None]
    pairs = jnp.einsum("bism,bisn->bimn", left, right, precision="highest")
    return jnp.einsum("bimn,amn->bia", pairs, rules_NxNxN, precision="highest"), shift[..., 0]


def random_pcfg(
    seed: int,
    *,
    num_nonterminals: int,
    num_words: int,
    length: int,
    min_length: int,
    emission_probability: float,
    rule_concentration: float,
    emission_concentration: float,
    tasks: tuple[tuple[int, int], ...],
) -> Pcfg:
    """A uniform root and Dirichlet rows; a node is a word with probability `emission_probability`.

    Sentences have min_length..length words; tasks are (start, end) spans.
    """
    if min(num_nonterminals, num_words) < 2:
        raise ValueError(
            f"num_nonterminals and num_words must be >= 2; got {num_nonterminals}, {num_words}"
        )
    if not 1 <= min_length <= length:
        raise ValueError(f"min_length must be in 1..length={length}; got {min_length}")
    if not 0 < emission_probability < 1:
        raise ValueError(
            f"emission_probability must be between 0 and 1; got {emission_probability}"
        )
    if min(rule_concentration, emission_concentration) <= 0:
        raise ValueError(
            "rule_concentration and emission_concentration must be > 0; "
            f"got {rule_concentration}, {emission_concentration}"
        )
    spans = tuple((start, end) for start, end in tasks)
    for start, end in spans:
        if not 0 <= start < end <= length:
            raise ValueError(
                f"tasks must be spans 0 <= start < end <= length={length}; got ({start}, {end})"
            )
    N = num_nonterminals
    rule_key, emission_key = jax.random.split(jax.random.key(seed))
    rules_NxP = random_rows(rule_key, rule_concentration, (N, N * N))
    emissions_NxV = random_rows(emission_key, emission_concentration, (N, num_words))
    return Pcfg(
        start_N=jnp.full(N, 1 / N, jnp.float32),
        rules_NxNxN=(1 - emission_probability) * rules_NxP.reshape(N, N, N),
        emissions_NxV=emission_probability * emissions_NxV,
        min_length=min_length,
        max_length=length,
        task_spans=spans,
    )
