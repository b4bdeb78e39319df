"""The variance of a difference over seeds splits into the parts of seeds and of examples."""

import numpy as np
import pytest

from jaxflat.analysis.statistics.hierarchical import error_of_mean, split_difference
from jaxflat.analysis.statistics.intervals import paired_t_interval


def test_the_parts_are_recovered_on_average():
    """Var_seeds = 4, errors 1 and 2, so examples add 1 + 4 and the total is 9."""
    random = np.random.default_rng(0)
    seeds = random.normal(3, 2, (4000, 5))
    first = random.normal(0, 1, seeds.shape)
    second = seeds + random.normal(0, 2, seeds.shape)
    found = [split_difference(a, b, [1] * 5, [2] * 5) for a, b in zip(first, second, strict=True)]
    assert {one.examples for one in found} == {5.0}
    assert np.mean([one.total for one in found]) == pytest.approx(9, rel=0.05)


@pytest.mark.parametrize(("scale", "mostly_examples"), [(0.01, False), (1.0, True)])
def test_the_share_of_examples(scale, mostly_examples):
    first, second = np.random.default_rng(1).normal(size=(2, 5))
    split = split_difference(first, second, [scale] * 5, [scale] * 5)
    assert split.share is not None
    assert (split.share > 0.5) == mostly_examples
    assert split.difference == paired_t_interval(first, second)


def test_the_seeds_part_is_never_negative():
    split = split_difference([0.0, 0.0], [1.0, 1.1], [5.0] * 2, [5.0] * 2)
    assert (split.seeds, split.share) == (0.0, 1.0)


def test_with_one_seed_there_is_nothing_to_split():
    split = split_difference([0.0], [1.0], [0.1], [0.1])
    assert (split.total, split.seeds, split.share) == (None, None, None)


def test_a_mean_over_tasks_errs_at_most_as_the_tasks_do_together():
    random = np.random.default_rng(2)
    shared = random.normal(size=50_000)
    tasks = np.stack([0.3 * shared, 0.5 * shared])
    assert tasks.mean(0).std() == pytest.approx(error_of_mean(tasks.std(1).tolist()))
