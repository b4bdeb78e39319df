"""Networks that fill in the masked symbol of a zero-sum string: traces, solutions, transfer.

Sentences are uniform over the zero-sum strings of {+1, -1}^T; one symbol is masked (0). The model
f(z) = sum_i a_i relu(w_i . z) has the loss E (f(z) - y)^2 / 2, y = -1.z, the masked symbol. If f =
y on all sentences, the Hessian's trace is the mean over z of

    sum_i relu(w_i . z)^2 + (T - 1) a_i^2 [w_i . z > 0]
      >= 2 sqrt(T - 1) sum_i |a_i| relu(w_i . z) >= 2 sqrt(T - 1) |f(z)| = 2 sqrt(T - 1).

Only networks whose every active neuron is a positive multiple of 1 or of -1 attain it. Proof: for
an active neuron w . z is one number c > 0, and all active neurons have f's sign. So w . z is 0 or c
on all z of sum 1 (or 0 or -c on all). Exchanging + or - with the mask changes w . z by the
difference of two entries of w, and exchanging + with - by twice a difference. Both changes are 0, c
or -c, so every difference is 0 (T >= 4: both signs remain). "1" is the vector of ones.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

ZERO = 1e-6  # an output up to this counts as 0


@dataclass(frozen=True)
class Network:
    """f(z) = sum_i a_i relu(w_i . z), weights_MxT and outputs_M."""

    weights_MxT: np.ndarray
    outputs_M: np.ndarray

    def features(self, inputs_NxT: np.ndarray) -> np.ndarray:
        """Return relu(w_i . z), NxM."""
        return np.maximum(inputs_NxT @ self.weights_MxT.T, 0)

    def predict(self, inputs_NxT: np.ndarray) -> np.ndarray:
        """Return f(z), N."""
        return self.features(inputs_NxT) @ self.outputs_M


def masked_strings(length: int, zero_sum: bool) -> np.ndarray:
    """Return strings of +1 and -1 with one symbol masked (0), NxT: all, or only zero sums."""
    strings = np.asarray(list(product((-1.0, 1.0), repeat=length)))
    if zero_sum:
        strings = strings[strings.sum(axis=1) == 0]
    masked = strings[:, None] * (1 - np.eye(length))[None]
    return np.unique(masked.reshape(-1, length), axis=0)


def input_traces(network: Network, inputs_NxT: np.ndarray) -> np.ndarray:
    """Return |grad f(z)|^2 of each input, N; the mean is the trace of the Hessian at zero loss."""
    active_NxM = (inputs_NxT @ network.weights_MxT.T > 0).astype(float)
    squares_N = (network.features(inputs_NxT) ** 2).sum(axis=1)
    return squares_N + (inputs_NxT**2).sum(axis=1) * (active_NxM @ network.outputs_M**2)


def least_trace(length: int) -> float:
    """Return 2 sqrt(T - 1), the least trace at zero loss."""
    return 2 * (length - 1) ** 0.5


def relative_trace(network: Network, length: int) -> float:
    """Return the trace of the Hessian over the least trace at zero loss."""
    inputs_NxT = masked_strings(length, zero_sum=True)
    return float(input_traces(network, inputs_NxT).mean() / least_trace(length))


def loss(network: Network, length: int) -> float:
    """Return E (f(z) - y)^2 / 2."""
    inputs_NxT = masked_strings(length, zero_sum=True)
    return float(((network.predict(inputs_NxT) + inputs_NxT.sum(axis=1)) ** 2).mean() / 2)


def flattest(length: int) -> Network:
    """Return two neurons, w = +-(T - 1)^(1/4) and a = -+(T - 1)^(-1/4), of least trace."""
    scale = (length - 1) ** 0.25
    signs = np.asarray([1.0, -1.0])
    return Network(signs[:, None] * np.full((2, length), scale), -signs / scale)


def neurons_to_fit(length: int) -> int:
    """Return how many generic neurons give every input its target.

    T numbers determine the odd part of f, sum_i a_i w_i . z / 2. One number for each pair z, -z
    determines the even part, sum_i a_i |w_i . z| / 2.
    """
    return length + len(masked_strings(length, zero_sum=True)) // 2


def gaussian(length: int, num_neurons: int, rng: np.random.Generator) -> Network:
    """Return a network of standard normal w, the shortest a of zero loss, scaled to least trace.

    Multiplying w and dividing a by c preserves the function; the trace is c^2 A + B / c^2.
    """
    inputs_NxT = masked_strings(length, zero_sum=True)
    half_NxT = inputs_NxT[: len(inputs_NxT) // 2]  # sorted, so -z is in the other half
    weights_MxT = rng.standard_normal((num_neurons, length))
    even_NxM, odd_TxM = np.abs(half_NxT @ weights_MxT.T), weights_MxT.T
    conditions = np.concatenate([even_NxM, odd_TxM])
    right = np.concatenate([np.zeros(len(half_NxT)), np.full(length, -2.0)])
    outputs_M = conditions.T @ np.linalg.solve(conditions @ conditions.T, right)
    network = Network(weights_MxT, outputs_M)
    features_trace = (network.features(inputs_NxT) ** 2).sum(axis=1).mean()
    outputs_trace = input_traces(network, inputs_NxT).mean() - features_trace
    scale = (outputs_trace / features_trace) ** 0.25
    return Network(scale * weights_MxT, outputs_M / scale)


@dataclass(frozen=True)
class Transfer:
    """The success of a network over D draws of examples, on all strings: see `transfer`."""

    sums_D: np.ndarray
    majority_D: np.ndarray
    accuracy_D: np.ndarray


def transfer(
    network: Network, length: int, num_examples: int, num_draws: int, rng: np.random.Generator
) -> Transfer:
    """Fit heads on the network's features to 1.z of some masked strings, and test them on all.

    A head is the shortest that gives n random examples their 1.z, which is odd, never 0.
    sums_D: whether on every string the nearest odd number to the head's output is 1.z.
    majority_D: whether on every string the output is above 0 exactly if 1.z is; 0 counts as below.
    accuracy_D: the share of strings for which this is true.
    """
    strings_NxT = masked_strings(length, zero_sum=False)
    sums_N = strings_NxT.sum(axis=1)
    features_NxM = network.features(strings_NxT)
    kernel_NxN = features_NxM @ features_NxM.T
    chosen_DxE = rng.integers(len(strings_NxT), size=(num_draws, num_examples))
    among_DxExE = kernel_NxN[chosen_DxE[:, :, None], chosen_DxE[:, None]]
    inverse_DxExE = np.linalg.pinv(among_DxExE, rcond=1e-10, hermitian=True)
    duals_DxE = (inverse_DxExE @ sums_N[chosen_DxE][..., None])[..., 0]
    heads_DxN = np.einsum("de,den->dn", duals_DxE, kernel_NxN[chosen_DxE])
    near_DxN = np.abs(heads_DxN - sums_N) < 1
    right_DxN = (heads_DxN > ZERO) == (sums_N > 0)
    return Transfer(near_DxN.all(axis=1), right_DxN.all(axis=1), right_DxN.mean(axis=1))


def chance_of_sums(num_examples: int) -> float:
    """Return the probability of `sums` with two neurons, 1 and -1: the examples have both signs."""
    return 1 - 2.0 ** (1 - num_examples)


def chance_of_majority(num_examples: int) -> float:
    """Return the probability of `majority` with two neurons: one example is positive."""
    return 1 - 2.0**-num_examples
