"""The order of a data set's examples: (seed, step) determines each batch, without state.

Every epoch visits every example once, in another order. The order is a keyed permutation, computed
only at the places of the batch, so nothing is shuffled or stored. It is a generalised Feistel
network with cycle walking: Black & Rogaway, "Ciphers with arbitrary finite domains" (2002). The
network permutes pairs (a number below A, a number below B), with A * B barely above the number of
examples.
"""

import math

import numpy as np

NUM_ROUNDS = 16  # with fewer, orders of few examples are not equally likely


def example_ids(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Return ids_B int64 of the batch of a step: places step * B .. step * B + B - 1 of all visits.

    Visit g has place g % N of epoch g // N. Raises ValueError on sizes below 1, on a negative seed
    or step, and beyond 2^63 visits.
    """
    if min(batch_size, num_examples) < 1 or min(seed, step) < 0:
        raise ValueError(
            "batch_size and num_examples must be >= 1, seed and step >= 0; "
            f"got {batch_size}, {num_examples}, {seed}, {step}"
        )
    if (step + 1) * batch_size > 2**63:
        raise ValueError(f"step {step} of batch_size {batch_size} is past 2^63 visits")
    visits_B = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
    epochs_B, places_B = np.divmod(visits_B, np.uint64(num_examples))
    keys_B = _mix(_mix(epochs_B) + np.uint64(seed % 2**64))
    return _permute(places_B, keys_B, num_examples).astype(np.int64)


def _permute(places_B: np.ndarray, keys_B: np.ndarray, num_examples: int) -> np.ndarray:
    """Permute 0..N-1 by each place's key: walk the cycle until the image is below N."""
    images_B = places_B.copy()
    outside_I = np.arange(len(places_B))
    while len(outside_I):
        images_B[outside_I] = _encipher(images_B[outside_I], keys_B[outside_I], num_examples)
        outside_I = outside_I[images_B[outside_I] >= num_examples]
    return images_B


def _encipher(values_B: np.ndarray, keys_B: np.ndarray, num_examples: int) -> np.ndarray:
    """Apply a keyed permutation of 0..A*B-1, with A = ceil(sqrt(N)), B = ceil(N / A)."""
    A = math.isqrt(num_examples - 1) + 1
    A, B = np.uint64(A), np.uint64(-(-num_examples // A))
    left_B, right_B = np.divmod(values_B, B)
    for turn in range(0, NUM_ROUNDS, 2):
        left_B = (left_B + _noise(right_B, keys_B, turn) % A) % A
        right_B = (right_B + _noise(left_B, keys_B, turn + 1) % B) % B
    return left_B * B + right_B


def _noise(values_B: np.ndarray, keys_B: np.ndarray, turn: int) -> np.ndarray:
    return _mix(keys_B ^ _mix(values_B * np.uint64(NUM_ROUNDS) + np.uint64(turn)))


def _mix(values_B: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's step, a bijection of 64-bit words that flips half of the bits."""
    values_B = values_B + np.uint64(0x9E3779B97F4A7C15)
    values_B = (values_B ^ (values_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values_B = (values_B ^ (values_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values_B ^ (values_B >> np.uint64(31))
