"""Networks on zero-sum strings against dense matrices, brute force and closed forms."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.theory import zero_sum


def random_network(seed, length, num_neurons):
    rng = np.random.default_rng(seed)
    weights_MxT = rng.standard_normal((num_neurons, length))
    return zero_sum.Network(weights_MxT, rng.standard_normal(num_neurons))


@pytest.mark.parametrize("length", [4, 6])
def test_all_masked_zero_sum_strings(length):
    found = {tuple(row) for row in zero_sum.masked_strings(length, zero_sum=True)}
    every = product((-1, 0, 1), repeat=length)
    assert found == {z for z in every if z.count(0) == 1 and abs(sum(z)) == 1}
    free = {tuple(row) for row in zero_sum.masked_strings(length, zero_sum=False)}
    assert free == {z for z in product((-1, 0, 1), repeat=length) if z.count(0) == 1}


@pytest.mark.parametrize(("kind", "length"), [("flattest", 4), ("flattest", 6), ("gaussian", 4)])
def test_zero_loss_and_the_trace_of_the_dense_hessian(kind, length):
    rng = np.random.default_rng(1)
    fitted = zero_sum.gaussian(length, zero_sum.neurons_to_fit(length) + 3, rng)
    network = zero_sum.flattest(length) if kind == "flattest" else fitted
    inputs_NxT = zero_sum.masked_strings(length, zero_sum=True)
    targets_N = -inputs_NxT.sum(axis=1)
    np.testing.assert_allclose(network.predict(inputs_NxT), targets_N, atol=1e-8)
    with jax.enable_x64(True):

        def loss(weights_MxT, outputs_M):
            predicted_N = jax.nn.relu(jnp.asarray(inputs_NxT) @ weights_MxT.T) @ outputs_M
            return ((predicted_N - targets_N) ** 2).mean() / 2

        parts = jax.jit(jax.hessian(loss, argnums=(0, 1)))(
            *map(jnp.asarray, vars(network).values())
        )
    size = network.weights_MxT.size
    trace = np.trace(np.reshape(parts[0][0], (size, size))) + np.trace(parts[1][1])
    found = zero_sum.input_traces(network, inputs_NxT)
    np.testing.assert_allclose(found.mean(), trace, rtol=1e-8)
    if kind == "flattest":
        np.testing.assert_allclose(found, 2 * (length - 1) ** 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_no_input_is_below_the_bound(seed):
    network = random_network(seed, 6, 1 + seed % 5)
    inputs_NxT = zero_sum.masked_strings(6, zero_sum=True)
    least_N = zero_sum.least_trace(6) * np.abs(network.predict(inputs_NxT))
    assert (zero_sum.input_traces(network, inputs_NxT) >= least_N * (1 - 1e-12)).all()


@pytest.mark.parametrize("length", [4, 6])
def test_only_multiples_of_one_attain_the_bound(length):
    """Equality needs every w . z to be 0 or one c > 0 where 1.z = 1: then w = c 1 or 0.

    Solves for all w with values 0 and 1 on T independent inputs; keeps those valid on every input.
    """
    inputs_NxT = zero_sum.masked_strings(length, zero_sum=True)
    inputs_NxT = inputs_NxT[inputs_NxT.sum(axis=1) == 1]
    rows = [0]
    for n in range(len(inputs_NxT)):
        if np.linalg.matrix_rank(inputs_NxT[[*rows, n]]) > len(rows):
            rows.append(n)
    assert len(rows) == length
    values_TxW = np.asarray(list(product((0.0, 1.0), repeat=length))).T
    weights_TxW = np.linalg.solve(inputs_NxT[rows], values_TxW)
    products_NxW = inputs_NxT @ weights_TxW
    distance_NxW = np.minimum(np.abs(products_NxW), np.abs(products_NxW - 1))
    kept_TxK = weights_TxW[:, distance_NxW.max(axis=0) < 1e-9]
    np.testing.assert_allclose(kept_TxK, [[0, 1]] * length, atol=1e-9)


def test_the_common_scale_is_the_best_one():
    network = zero_sum.gaussian(6, 80, np.random.default_rng(0))
    inputs_NxT = zero_sum.masked_strings(6, zero_sum=True)

    def trace(scale):
        scaled = zero_sum.Network(scale * network.weights_MxT, network.outputs_M / scale)
        return zero_sum.input_traces(scaled, inputs_NxT).mean()

    assert trace(1.0) < min(trace(0.98), trace(1.02))


@pytest.mark.parametrize("num_neurons", [2, 5, 40])
def test_heads_are_the_shortest_least_squares_solutions(num_neurons):
    """Against numpy's lstsq on the same examples, which the same generator picks again."""
    network = random_network(3, 6, num_neurons)
    found = zero_sum.transfer(network, 6, 5, 30, np.random.default_rng(7))
    strings_NxT = zero_sum.masked_strings(6, zero_sum=False)
    sums_N = strings_NxT.sum(axis=1)
    features_NxM = network.features(strings_NxT)
    chosen_DxE = np.random.default_rng(7).integers(len(strings_NxT), size=(30, 5))
    for d, chosen_E in enumerate(chosen_DxE):
        head_M, *_ = np.linalg.lstsq(features_NxM[chosen_E], sums_N[chosen_E], rcond=1e-6)
        answers_N = features_NxM @ head_M
        assert found.sums_D[d] == (np.abs(answers_N - sums_N) < 1).all()
        right_N = (answers_N > 1e-6) == (sums_N > 0)
        assert found.accuracy_D[d] == pytest.approx(right_N.mean())
        assert found.majority_D[d] == right_N.all()


def test_the_flattest_solution_transfers_just_where_its_features_were_seen():
    """Of all pairs of examples: majority needs one positive sum, sums need one of each sign."""
    strings_NxT = zero_sum.masked_strings(4, zero_sum=False)
    sums_N = strings_NxT.sum(axis=1)

    class Every:
        """A generator that draws every pair of examples once."""

        def integers(self, high, size):
            return np.asarray(list(product(range(high), repeat=size[1])))

    found = zero_sum.transfer(zero_sum.flattest(4), 4, 2, len(sums_N) ** 2, Every())
    pairs_Dx2 = sums_N[Every().integers(len(sums_N), (0, 2))]
    np.testing.assert_array_equal(found.majority_D, (pairs_Dx2 > 0).any(axis=1))
    np.testing.assert_array_equal(found.sums_D, pairs_Dx2.prod(axis=1) < 0)
    assert found.majority_D.mean() == zero_sum.chance_of_majority(2) == 1 - 2.0**-2
    assert found.sums_D.mean() == zero_sum.chance_of_sums(2) == 1 - 2.0**-1
