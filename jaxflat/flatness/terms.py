"""Collect samples of a trace by parameter leaf; group and weight them; decide when to stop.

One probe or draw gives every leaf its own unbiased term. Any grouping or weighting of the leaves is
therefore again a mean over samples, with an exact standard error, correlations included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, Over, ratio_estimate
from jaxflat.flatness.trees import PyTree, path_name

SampleFn = Callable[[jax.Array], PyTree]  # index of the draw -> its terms, summed over predictions
Sampler = Callable[[jax.Array, PyTree], tuple[SampleFn, jax.Array]]
"""(index, microbatch) -> (sample_fn, weight), after all work that the draws share."""

MIN_SAMPLES = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TraceTerms:
    """Samples of the trace of every parameter leaf, as sums over predictions.

    terms: pytree like the parameters; each leaf has shape (n,), or (n, L) if it stacks L layers.
    weights_n: the number of predictions (total weight) behind each sample.
    """

    terms: PyTree
    weights_n: jax.Array
    over: Over = field(metadata={"static": True})

    def total(self) -> Estimate:
        """Return the trace of the whole matrix."""
        return self.weighted(jax.tree.map(lambda _: 1.0, self.terms))

    def weighted(self, factors: PyTree) -> Estimate:
        """Return sum_l factors_l tr_l; `factors` like the parameters, scalars or (L,) if stacked.

        A function-preserving embedding in a larger model multiplies the trace of each block by a
        known factor. With these factors the sum is the larger model's trace, without running it.
        """

        def weigh(term: jax.Array, factor: Any) -> jax.Array:
            factor = jnp.broadcast_to(jnp.asarray(factor, term.dtype), term.shape)
            return (term * factor).reshape(term.shape[0], -1).sum(axis=1)

        return self._estimate(jax.tree.leaves(jax.tree.map(weigh, self.terms, factors)))

    def by_block(self, block_of: Callable[[str], str]) -> dict[str, Estimate]:
        """Return the trace of each block; `block_of(path)` names the block of a leaf.

        Layer i of a stacked leaf has the path 'path/i'.
        """
        blocks: dict[str, list[jax.Array]] = {}
        for path, term in jax.tree_util.tree_leaves_with_path(self.terms):
            name = path_name(path)
            layers = (
                {name: term} if term.ndim == 1 else {f"{name}/{i}": t for i, t in enumerate(term.T)}
            )
            for layer_name, term_n in layers.items():
                blocks.setdefault(block_of(layer_name), []).append(term_n)
        return {block: self._estimate(terms) for block, terms in blocks.items()}

    @classmethod
    def concatenate(cls, parts: Sequence[TraceTerms]) -> TraceTerms:
        """Return all samples of several independent collections of the same parameters."""
        terms = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[p.terms for p in parts])
        weights_n = jnp.concatenate([part.weights_n for part in parts])
        return cls(terms, weights_n, parts[0].over)

    def _estimate(self, terms: list[jax.Array]) -> Estimate:
        return ratio_estimate(sum(terms[1:], start=terms[0]), self.weights_n, self.over)


def leaf_products(
    left: PyTree, right: PyTree, stacked: Callable[[str], bool] | None = None
) -> PyTree:
    """Return each leaf's inner product: a scalar, or for stacked leaves one per index of axis 0.

    It multiplies elementwise: the precision of a matrix product depends on the accelerator.
    """

    def product(path: tuple, x: jax.Array, y: jax.Array) -> jax.Array:
        first_axis = 1 if stacked is not None and stacked(path_name(path)) else 0
        return jnp.sum(x * y, axis=tuple(range(first_axis, x.ndim)))

    return jax.tree_util.tree_map_with_path(product, left, right)


def collect_terms(
    sampler: Sampler, batches: PyTree, num_draws: int, draws_per_pass: int, over: Over
) -> TraceTerms:
    """Return the samples of `num_draws` draws in each of the M microbatches.

    Raises ValueError if the error is to cover sentences and there is only one microbatch.
    """
    num_microbatches = jax.tree.leaves(batches)[0].shape[0]
    if over not in ("probes", "probes+sentences"):
        raise ValueError(f"over must be 'probes' or 'probes+sentences', not {over!r}")
    if over == "probes+sentences" and num_microbatches < 2:
        raise ValueError("over='probes+sentences' needs at least 2 microbatches; or over='probes'")

    def microbatch(index_and_batch: tuple[jax.Array, PyTree]) -> tuple[PyTree, jax.Array]:
        sample_fn, weight = sampler(*index_and_batch)
        # lax.map is faster without a batch_size than with a batch_size of 1.
        batch_size = draws_per_pass if draws_per_pass > 1 else None
        return jax.lax.map(sample_fn, jnp.arange(num_draws), batch_size=batch_size), weight

    terms_MxK, weights_M = jax.lax.map(microbatch, (jnp.arange(num_microbatches), batches))
    if over == "probes+sentences":
        return TraceTerms(jax.tree.map(lambda x: x.mean(axis=1), terms_MxK), weights_M, over)
    terms_K = jax.tree.map(lambda x: x.sum(axis=0), terms_MxK)
    return TraceTerms(terms_K, jnp.full(num_draws, weights_M.sum()), over)


def sample_until(
    draw_round: Callable[[int], TraceTerms],
    relative_error: float,
    max_rounds: int,
    min_samples: int = MIN_SAMPLES,
) -> TraceTerms:
    """Draw rounds until the total's 95% interval is narrow enough; return all samples.

    `draw_round(i)` returns the samples of round i. Rounds have the same number of samples and are
    independent in everything that the error covers. The interval is checked after 1, 2, 4, ...
    rounds. Sampling stops at the first check with at least `min_samples` samples and
    t(0.975, n - 1) SEM <= relative_error |mean|, and in any case after `max_rounds`.

    Sampling may stop early because the first samples happen to agree. The coverage of the interval
    is then slightly below 95%: only slightly, because checks are few, fixed beforehand, and need
    many samples.
    The returned estimate shows whether the interval is narrow enough.
    """
    rounds: list[TraceTerms] = []
    next_check = 1
    while True:
        rounds += [draw_round(i) for i in range(len(rounds), min(next_check, max_rounds))]
        terms = TraceTerms.concatenate(rounds)
        total = terms.total()
        half_width = (total.interval()[1] - total.mean).item()
        precise = half_width <= relative_error * abs(total.mean.item())
        precise &= total.num_samples >= min_samples
        if precise or len(rounds) >= max_rounds or not math.isfinite(total.mean.item()):
            return terms
        next_check *= 2
