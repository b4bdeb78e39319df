"""Alias tables: their exact probabilities by integer arithmetic, and draws from them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxflat.languages.categorical import alias_table, draw_alias

SIZES = [1, 2, 3, 200, 1000]


def table_counts(table_RxM: np.ndarray, size: int) -> np.ndarray:
    """Count exactly how many of the 2^32 values of a draw's bits have each outcome, RxC."""
    M = table_RxM.shape[1]
    m = M.bit_length() - 1
    table_RxM = table_RxM.astype(np.int64)
    keep_RxM, alias_RxM = table_RxM >> m, table_RxM & (M - 1)
    assert alias_RxM.max() < size
    counts_RxM = keep_RxM.copy()
    for counts_M, keep_M, alias_M in zip(counts_RxM, keep_RxM, alias_RxM, strict=True):
        np.add.at(counts_M, alias_M, 2 ** (32 - m) - keep_M)
    assert (counts_RxM.sum(axis=1) == 2**32).all()
    assert (counts_RxM[:, size:] == 0).all()
    return counts_RxM[:, :size]


def weights_of(name: str, size: int) -> np.ndarray:
    """Return three rows of weights."""
    rng = np.random.default_rng(size)
    uniform, powers = rng.random((3, size)), 10 ** rng.uniform(-30, 0, (3, size))
    zeros = np.where(rng.random((3, size)) < 0.7, 0, uniform)
    zeros[:, rng.integers(size)] = 1e-30
    peaked = np.where(np.arange(size) == size // 2, 1.0, 1e-30 * uniform)
    return {
        "uniform": uniform,
        "powers": powers,
        "zeros": zeros,
        "peaked": peaked,
        "equal": np.full((3, size), 0.1),
        "large": 1e300 * zeros,
    }[name]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["uniform", "powers", "zeros", "peaked", "equal", "large"])
def test_probabilities_are_the_weights(name, size):
    weights_RxC = weights_of(name, size)
    table_RxM = alias_table(weights_RxC)
    assert table_RxM.dtype == np.uint32
    assert table_RxM.shape == (3, {1: 2, 2: 2, 3: 4, 200: 256, 1000: 1024}[size])
    counts_RxC = table_counts(table_RxM, size)
    probs_RxC = weights_RxC / weights_RxC.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(counts_RxC / 2**32, probs_RxC, rtol=0, atol=2**-30)
    assert (counts_RxC[weights_RxC == 0] == 0).all()


def test_a_row_of_zeros_stays_within_the_outcomes():
    table_RxM = alias_table(np.stack([np.zeros(5), np.arange(5.0)]))
    counts_RxC = table_counts(table_RxM, 5)
    np.testing.assert_allclose(counts_RxC[1] / 2**32, np.arange(5) / 10, rtol=0, atol=2**-30)


def test_random_weights():
    """Each column rounds by 2^-33 at most, or by 2^-32 if it is almost full."""
    sizes = set()
    weight = st.one_of(
        st.just(0.0), st.floats(1e-30, 1), st.integers(-30, 0).map(lambda e: 10.0**e)
    )

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.lists(weight, min_size=1, max_size=70).filter(any))
    def check(weights):
        weights_1xC = np.array([weights])
        table_1xM = alias_table(weights_1xC)
        counts_C = table_counts(table_1xM, len(weights))[0]
        assert (counts_C[weights_1xC[0] == 0] == 0).all()
        M = table_1xM.shape[1]
        columns_C = 1 + np.bincount(table_1xM[0] & (M - 1), minlength=len(weights))
        errors_C = np.abs(counts_C / 2**32 - weights_1xC[0] / weights_1xC.sum())
        assert (errors_C <= 2**-32 * columns_C + 1e-15).all()
        sizes.add(M)

    check()
    assert len(sizes) > 4


def test_every_bit_pattern_near_a_border_draws_what_the_table_says():
    """Draws use the first and last bits of each column, and the bits on both sides of its share."""
    weights_RxC = np.random.default_rng(0).dirichlet(np.ones(5), 3)
    table_RxM = alias_table(weights_RxC)
    for row, table_M in enumerate(table_RxM.astype(np.int64).tolist()):
        for column, entry in enumerate(table_M):
            keep, alias, first = entry >> 3, entry & 7, column << 29
            low = [x for x in (0, keep - 1, keep, 2**29 - 1) if 0 <= x < 2**29]
            bits = np.array([first + x for x in low], np.uint32)
            drawn = draw_alias(bits, jax.numpy.asarray(table_RxM), np.full(len(low), row, np.int32))
            assert drawn.dtype == np.int32
            assert drawn.tolist() == [column if x < keep else alias for x in low]


@pytest.mark.parametrize("size", [3, 200])
def test_draws_have_the_probabilities_of_their_rows(size):
    weights_RxC = weights_of("uniform", size) * (np.arange(size) % 5 > 0)
    table_RxM = jax.numpy.asarray(alias_table(weights_RxC))
    bits_RxB = jax.random.bits(jax.random.key(size), (3, 200_000), np.uint32)
    rows_RxB = jax.numpy.broadcast_to(np.arange(3, dtype=np.int32)[:, None], bits_RxB.shape)
    drawn_RxB = np.asarray(jax.jit(draw_alias)(bits_RxB, table_RxM, rows_RxB))
    for drawn_B, weights_C in zip(drawn_RxB, weights_RxC, strict=True):
        counts_C = np.bincount(drawn_B, minlength=size)
        positive_C = weights_C > 0
        assert counts_C[~positive_C].sum() == 0
        expected_C = weights_C[positive_C] / weights_C.sum() * len(drawn_B)
        assert chisquare(counts_C[positive_C], expected_C).pvalue > 1e-3
