"""Other parameters, sentences or keys of the same shapes do not recompile."""

import logging

import jax
import numpy as np
import pytest

from jaxflat import config
from jaxflat.flatness import MEASURES, Problem
from tests.support import softmax_table


def is_stacked(path):
    return path == "table"


def problem_of(seed):
    return Problem(
        softmax_table.loss_fn,
        softmax_table.log_probs_fn,
        softmax_table.make_params(seed),
        lambda i: softmax_table.make_batches(6, 4, 2 * seed + i),
        jax.random.key(seed),
        num_examples=100 + seed,
        groupings=(str,),
        stacked=is_stacked,
        toward=softmax_table.make_params(10 + seed),
    )


@pytest.fixture
def settings():
    """Cheap settings; traces take both rounds, because they never reach the precision."""
    chosen = config.base().flatness
    chosen.update({"num_probes": 2, "relative_error": 1e-9, "max_rounds": 2})
    chosen.eigenvalues.update({"num_largest": 2, "num_steps": 4})
    chosen.density.num_steps = 3
    chosen.learning_coefficient.update({"num_chains": 2, "num_draws": 8})
    chosen.slices.update({"num_directions": 2, "num_points": 3})
    return chosen


def measure_all(seed, settings):
    """All numbers of all measures of one checkpoint."""
    measured = [measure(problem_of(seed), settings) for measure in MEASURES.values()]
    leaves = jax.tree.leaves([(one.estimates, one.curves) for one in measured])
    return [np.asarray(leaf) for leaf in leaves]


@pytest.mark.slow
def test_a_second_checkpoint_compiles_nothing(settings, caplog):
    def compiled():
        messages = [record.getMessage() for record in caplog.records]
        return [m for m in messages if m.startswith("Finished XLA compilation")]

    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        first = measure_all(0, settings)
        assert len(compiled()) > len(MEASURES)
        caplog.clear()
        second = measure_all(1, settings)
        assert not compiled()
    assert sum((a != b).any() for a, b in zip(first, second, strict=True)) > len(MEASURES)
