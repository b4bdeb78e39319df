"""Windows of a real text as a language, whose exact conditionals are not known."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.sentences import Sentences


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextWindows:
    """Windows of T words; a sentence is one of the N training windows, uniform and independent.

    held_out_HxT: windows of other documents. documents_HxT: the document of each of their words,
    numbered from 0. It has no `conditional_log_probs`, and no hidden symbols that define tasks.
    """

    training_NxT: Array
    held_out_HxT: Array
    documents_HxT: Array
    num_words: int = field(metadata={"static": True})
    tasks = property(lambda self: {})
    max_length = property(lambda self: self.training_NxT.shape[1])

    @partial(jax.jit, static_argnames="batch_size")
    def sample(self, key: Array, batch_size: int) -> Sentences:
        """Return training windows drawn with replacement; window b depends on (key, b) alone."""
        num_windows = len(self.training_NxT)
        rows_B = jax.vmap(lambda k: jax.random.randint(k, (), 0, num_windows, jnp.int32))(
            jax.random.split(key, batch_size)
        )
        lengths_B = jnp.full(batch_size, self.max_length, jnp.int32)
        return Sentences(self.training_NxT[rows_B], lengths_B, latents=None)
