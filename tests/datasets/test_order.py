"""The order of examples: each once per epoch, a function of (seed, step), and random."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxflat.datasets.order import example_ids

SIZES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**70)


@given(SEEDS, SIZES, st.integers(0, 2**40))
def test_every_epoch_visits_every_example_once(seed, num_examples, epoch):
    ids = example_ids(seed, epoch, num_examples, num_examples)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.arange(num_examples))


@given(SEEDS, SIZES, st.integers(1, 400), st.integers(0, 50))
def test_visits_do_not_depend_on_how_they_are_batched(seed, num_examples, batch_size, step):
    ids = example_ids(seed, step, batch_size, num_examples)
    first = step * batch_size
    one_by_one = [example_ids(seed, first + i, 1, num_examples)[0] for i in (0, batch_size - 1)]
    assert one_by_one == [ids[0], ids[-1]]
    together = example_ids(seed, 0, first + batch_size, num_examples)
    np.testing.assert_array_equal(together[first:], ids)


@given(SEEDS, st.integers(20, 3000), st.integers(0, 1000))
def test_epochs_and_seeds_have_orders_of_their_own(seed, num_examples, epoch):
    ids = example_ids(seed, epoch, num_examples, num_examples)
    assert (ids != example_ids(seed, epoch + 1, num_examples, num_examples)).any()
    assert (ids != example_ids(seed + 1, epoch, num_examples, num_examples)).any()


@pytest.mark.parametrize(
    ("num_examples", "over"),
    [(2, "seeds"), (3, "seeds"), (4, "seeds"), (4, "epochs"), (5, "epochs"), (6, "epochs")],
)
def test_all_orders_of_few_examples_are_equally_likely(num_examples, over):
    orders = {p: i for i, p in enumerate(itertools.permutations(range(num_examples)))}
    num_draws = 40 * len(orders)
    if over == "epochs":
        drawn = example_ids(7, 0, num_draws * num_examples, num_examples)
        drawn = drawn.reshape(num_draws, num_examples)
    else:
        drawn = [example_ids(s, 0, num_examples, num_examples) for s in range(num_draws)]
    counts = np.bincount([orders[tuple(map(int, ids))] for ids in drawn], minlength=len(orders))
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("num_examples", [16, 97, 1000])
def test_every_example_is_equally_likely_at_every_place(num_examples):
    ids_ExN = example_ids(3, 0, 200 * num_examples, num_examples).reshape(200, num_examples)
    for place in (0, num_examples // 2, num_examples - 1):
        counts = np.bincount(ids_ExN[:, place] * 16 // num_examples, minlength=16)
        expected = np.bincount(np.arange(num_examples) * 16 // num_examples) * 200 / num_examples
        assert chisquare(counts, expected).pvalue > 1e-4


def test_neighbours_do_not_stay_together():
    ids = example_ids(0, 0, 100_000, 100_000)
    assert (np.abs(np.diff(ids)) == 1).sum() < 20  # 2 are expected
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.02


def test_far_visits_of_large_data_sets_stay_in_range():
    ids = example_ids(5, 2**40, 4096, 10**12 + 39)
    assert len(set(ids.tolist())) == 4096
    assert 0 <= ids.min() < ids.max() < 10**12 + 39


@pytest.mark.parametrize(
    "arguments", [(0, 0, 0, 5), (0, 0, 5, 0), (-1, 0, 5, 5), (0, -1, 5, 5), (0, 2**62, 5, 5)]
)
def test_what_has_no_meaning_is_refused(arguments):
    with pytest.raises(ValueError, match=r"must be >= 1|past 2\^63"):
        example_ids(*arguments)
