"""Which positions hold words, and which of them a masked language model has to guess."""

import jax
import jax.numpy as jnp
from jax import Array

MASKED_SHARE, MOST_MASKED = 0.15, 5


def mask_id(num_words: int) -> int:
    """The token of a hidden word; words are 0..V-1 and pad is V."""
    return num_words + 1


def is_word(lengths_B: Array, T: int) -> Array:
    """words_BxT: whether the position comes before the end of its sentence."""
    return jnp.arange(T, dtype=lengths_B.dtype)[None] < lengths_B[:, None]


def mask_one(key: Array, tokens_BxT: Array, lengths_B: Array, mask_id: int) -> tuple[Array, Array]:
    """(inputs_BxT, positions_Bx1): one masked word per sentence, uniform over its words."""
    positions_Bx1 = jax.random.randint(key, (len(tokens_BxT), 1), 0, lengths_B[:, None], jnp.int32)
    positions_T = jnp.arange(tokens_BxT.shape[1], dtype=positions_Bx1.dtype)
    masked_BxT = positions_T[None] == positions_Bx1
    return jnp.where(masked_BxT, mask_id, tokens_BxT), positions_Bx1


def mask_share(
    key: Array, tokens_BxT: Array, lengths_B: Array, mask_id: int
) -> tuple[Array, Array, Array]:
    """(inputs_BxT, positions_BxM, chosen_BxM): 15% of each sentence's words, 1 to M = 5 of them.

    Which ones is uniform. Every chosen word becomes the mask (none stays, none becomes another
    word: the exact conditionals could not tell those from the rest). Where chosen_BxM is False
    the position repeats the first one.
    """
    T = tokens_BxT.shape[1]
    words_BxT = is_word(lengths_B, T)
    ranks_BxT = jnp.where(words_BxT, jax.random.uniform(key, tokens_BxT.shape), 2)
    order_BxM = jnp.argsort(ranks_BxT, axis=1)[:, :MOST_MASKED].astype(jnp.int32)
    share_B = jnp.round(MASKED_SHARE * lengths_B.astype(jnp.float32)).astype(jnp.int32)
    number_Bx1 = jnp.clip(share_B, 1, MOST_MASKED)[:, None]
    chosen_BxM = jnp.arange(order_BxM.shape[1], dtype=jnp.int32)[None] < number_Bx1
    positions_BxM = jnp.where(chosen_BxM, order_BxM, order_BxM[:, :1])
    masked_BxT = jnp.any(
        jnp.arange(T, dtype=jnp.int32)[None, None] == positions_BxM[..., None], axis=1
    )
    return jnp.where(masked_BxT, mask_id, tokens_BxT), positions_BxM, chosen_BxM


def mask_each(tokens_BxT: Array, lengths_B: Array, mask_id: int) -> Array:
    """inputs_BxTxT: in row t word t is masked; rows past the end are the bare sentence."""
    T = tokens_BxT.shape[1]
    masked_BxTxT = jnp.eye(T, dtype=bool)[None] & is_word(lengths_B, T)[..., None]
    return jnp.where(masked_BxTxT, mask_id, tokens_BxT[:, None])
