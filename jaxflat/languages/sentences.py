"""What a language hands out: a batch of padded sentences with the hidden causes that made them."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sentences:
    """A batch of sentences.

    tokens_BxT: int32 words 0..V-1, then pad = V from position lengths_B on.
    lengths_B: int32 number of words.
    latents: the language's own hidden variables (states, tree nodes), a pytree with leading axis B.
    """

    tokens_BxT: jax.Array
    lengths_B: jax.Array
    latents: Any
