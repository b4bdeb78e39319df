"""A trace in terms: what each parameter leaf, or each layer of a stacked leaf, adds to each sample.

One probe or draw gives every leaf its own unbiased term, so any grouping or weighting of the
leaves is again a mean over samples and has an exact standard error, correlations included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, Over, ratio_estimate

PyTree = Any


def path_name(path: tuple) -> str:
    """A leaf's path as a string, e.g. 'layer_0/attention/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_products(
    left: PyTree, right: PyTree, stacked: Callable[[str], bool] | None = None
) -> PyTree:
    """Inner product of each pair of leaves: scalars, or one per index of axis 0 for stacked leaves.

    Elementwise rather than as a matmul, whose precision would be an accelerator's choice.
    """

    def product(path: tuple, x: jax.Array, y: jax.Array) -> jax.Array:
        first_axis = 1 if stacked is not None and stacked(path_name(path)) else 0
        return jnp.sum(x * y, axis=tuple(range(first_axis, x.ndim)))

    return jax.tree_util.tree_map_with_path(product, left, right)


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
        """The trace of the whole matrix."""
        return self.weighted(jax.tree.map(lambda _: 1.0, self.terms))

    def weighted(self, factors: PyTree) -> Estimate:
        """sum_l factors_l tr_l; `factors` like the parameters, each a scalar or, if stacked, (L,).

        With the factor by which a function-preserving embedding in a larger model multiplies each
        block, this is the trace of the large model, without running it.
        """

        def weigh(term: jax.Array, factor: Any) -> jax.Array:
            factor = jnp.broadcast_to(jnp.asarray(factor, term.dtype), term.shape)
            return (term * factor).reshape(term.shape[0], -1).sum(axis=1)

        return self._estimate(jax.tree.leaves(jax.tree.map(weigh, self.terms, factors)))

    def by_block(self, block_of: Callable[[str], str]) -> dict[str, Estimate]:
        """The trace of each block, where `block_of(path)` names the block a leaf belongs to.

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
    def concatenate(cls, parts: Sequence["TraceTerms"]) -> "TraceTerms":
        """All samples of several independent collections of the same parameters."""
        terms = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[p.terms for p in parts])
        weights_n = jnp.concatenate([part.weights_n for part in parts])
        return cls(terms, weights_n, parts[0].over)

    def _estimate(self, terms: list[jax.Array]) -> Estimate:
        return ratio_estimate(sum(terms[1:], start=terms[0]), self.weights_n, self.over)
