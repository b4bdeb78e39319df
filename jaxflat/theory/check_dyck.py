"""Result 3, a reconstruction: on zero-sum strings the flattest solution is the one that transfers.

`zero_sum` has the networks and the bound on the trace, `solutions` two kinds of exact solutions,
and `noisy_training` and `trained` the networks that training reaches.
"""

import jax

from jaxflat.theory import noisy_training, zero_sum
from jaxflat.theory.check import CheckOutcome, mean_and_sem
from jaxflat.theory.solutions import (
    LENGTH,
    LENGTHS,
    NUM_EXAMPLES,
    NUM_NETWORKS,
    SPARE,
    draw_traces,
    draw_transfer,
    gaussians,
    trace_checks,
    transfer_checks,
    transfers,
    wide_check,
)
from jaxflat.theory.trained import Training, draw_training, train, training_checks
from jaxflat.theory.zero_sum import Network, relative_trace

NUM_NEURONS = 32  # of random starts
NUM_TRAINED = 4  # of the Gaussian solutions
MORE_EXAMPLES = (8, 32, 64)


def run() -> CheckOutcome:
    """Check the bound, its minimisers, the transfer of each solution, and the end of training."""
    solutions = {length: gaussians(length, SPARE) for length in LENGTHS}
    random_key, *keys = jax.random.split(jax.random.key(0), 3)
    sizes = (NUM_NETWORKS, LENGTH, NUM_NEURONS)
    random = noisy_training.random_networks(random_key, *sizes)
    trainings = [
        train("random start", noisy_training.settle(random), keys[0]),
        train("Gaussian start", noisy_training.stack(solutions[LENGTH][:NUM_TRAINED]), keys[1]),
    ]
    checks = [
        *(check for length in LENGTHS for check in trace_checks(length, solutions[length])),
        wide_check(),
        *transfer_checks(solutions[LENGTH]),
        *(check for training in trainings for check in training_checks(training)),
    ]
    kinds = {
        "flattest": [zero_sum.flattest(LENGTH)] * NUM_NETWORKS,
        "Gaussian": solutions[LENGTH],
        "random start": trainings[0].before,
        "after label noise": trainings[0].after,
    }
    panels = [
        ("Traces of solutions", lambda ax: draw_traces(ax, solutions)),
        ("Transfer", lambda ax: draw_transfer(ax, kinds)),
        ("SGD with label noise", lambda ax: draw_training(ax, trainings)),
    ]
    return CheckOutcome(checks, panels, remarks(solutions, trainings))


def remarks(solutions: dict[int, list[Network]], trainings: list[Training]) -> list[str]:
    """Return lines with further figures, which no check claims."""
    lines = [
        "zero-sum strings, one masked: f(z) = sum_i a_i relu(w_i . z); a reconstruction",
        "flattest: two neurons, multiples of the vectors of ones and of minus ones",
    ]
    for length, networks in solutions.items():
        least = zero_sum.least_trace(length)
        mean, sem = mean_and_sem([least * relative_trace(network, length) for network in networks])
        lines.append(f"T = {length}: trace of Gaussian solutions {mean:.1f} +- {sem:.1g} (SEM)")
    for num_examples in MORE_EXAMPLES:
        sums, signs = transfers(solutions[LENGTH], num_examples)
        lines.append(
            f"Gaussian, {num_examples} examples: all sums right in {sums.mean():.1%} of draws, "
            f"all signs in {signs.mean():.1%}"
        )
    for training in trainings:
        signs = transfers(training.after, NUM_EXAMPLES[-1])[1]
        largest = max(relative_trace(network, LENGTH) for network in training.after)
        lines.append(
            f"{training.name}, after label noise: all signs right after {NUM_EXAMPLES[-1]} "
            f"examples in {signs.mean():.1%} of draws; largest trace over the least {largest:.3f}"
        )
    return lines
