"""The examples of docs/flatness.md run, and their numbers obey the identities of the problem."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat import flatness

PAGE = (Path(__file__).parents[2] / "docs" / "flatness.md").read_text()


@pytest.fixture(scope="module")
def example(float64):
    """Return the variables after all Python blocks of the page, run in order."""
    variables = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        exec(block, variables)
    return variables


def inner(x, y):
    return sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))


def assert_trees_close(x, y):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12), x, y)


@pytest.mark.slow
def test_traces_are_near_that_of_inputs_of_variance_1(example):
    """At uniform predictions tr H = (1 - 1/3) E(|x|^2 + 1) = 10 / 3."""
    for estimate in (example["hessian"], example["fisher"], example["terms"].total()):
        assert abs(estimate.mean - 10 / 3) < 5 * estimate.sem


@pytest.mark.slow
def test_a_mean_loss_has_the_trace_of_the_sum(example):
    np.testing.assert_allclose(example["same"].mean, example["hessian"].mean, rtol=1e-6)


@pytest.mark.slow
def test_logits_are_linear_so_h_is_g(example):
    assert_trees_close(example["h_v"], example["g_v"])
    np.testing.assert_allclose(example["v_h_v"], example["v_g_v"], rtol=1e-6)
    np.testing.assert_allclose(
        example["v_h_v"], inner(example["vector"], example["h_v"]), rtol=1e-6
    )
    h, g = example["extremes"], example["g_extremes"]
    np.testing.assert_allclose(h.largest.values_k, g.largest.values_k, rtol=1e-6)


@pytest.mark.slow
def test_diagonals_add_up_to_traces(example):
    for name, trace in (
        ("h_diagonal", example["terms"].total()),
        ("f_diagonal", example["fisher"]),
    ):
        added = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(example[name].mean))
        np.testing.assert_allclose(added, trace.mean, rtol=1e-6)


@pytest.mark.slow
def test_the_empirical_fisher_matrix_is_positive(example):
    assert inner(example["vector"], example["f_v"]) > 0


@pytest.mark.slow
def test_the_density_bounds_the_largest_eigenvalue(example):
    num_params, estimate = 15, example["mean_square"]
    assert example["extremes"].largest.values_k[0] ** 2 <= num_params * estimate.mean


def test_the_page_names_every_public_function():
    functions = {name for name in flatness.__all__ if name.islower()}
    assert not {name for name in functions if f"`{name}`" not in PAGE}
