"""The two kinds of solution on zero-sum strings: their traces and their transfer."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from jaxflat.analysis.page.drawing import COLORS
from jaxflat.theory import zero_sum
from jaxflat.theory.check import NUM_ERRORS, Check, mean_and_sem
from jaxflat.theory.zero_sum import Network, loss, relative_trace

LENGTHS, LENGTH = (6, 8, 10), 6  # for traces; for transfer and training
NUM_NETWORKS = 8  # of each kind
SPARE, WIDE = 2, 256  # neurons of Gaussian solutions, relative to the number that a fit needs
NUM_EXAMPLES = (2, 4, 8)
NUM_DRAWS = 500  # of examples for each network


def gaussians(length: int, times: int) -> list[Network]:
    """Return solutions with `times` as many neurons as a fit needs."""
    num_neurons = times * zero_sum.neurons_to_fit(length)
    seeds = range(NUM_NETWORKS)
    return [zero_sum.gaussian(length, num_neurons, np.random.default_rng(s)) for s in seeds]


def transfers(networks: Sequence[Network], num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each network's share of draws with all sums right, and with all signs right."""
    shares = []
    for seed, network in enumerate(networks):
        rng = np.random.default_rng(seed)
        found = zero_sum.transfer(network, LENGTH, num_examples, NUM_DRAWS, rng)
        shares.append((found.sums_D.mean(), found.majority_D.mean()))
    sums, majority = np.asarray(shares).T
    return sums, majority


def trace_checks(length: int, solutions: list[Network]) -> list[Check]:
    """Check that the flattest solution attains the bound, Gaussian ones exceed it, at zero loss."""
    flattest = zero_sum.flattest(length)
    losses = [loss(network, length) for network in (flattest, *solutions)]
    mean, sem = mean_and_sem([relative_trace(network, length) for network in solutions])
    size = f"{len(solutions[0].outputs_M)} neurons"
    over_networks = f"{NUM_ERRORS} SEM of {NUM_NETWORKS} networks"
    trace = zero_sum.least_trace(length) * relative_trace(flattest, length)
    return [
        Check(f"T = {length}: largest loss of all solutions", 0, max(losses), 1e-9, "tolerance"),
        Check(f"T = {length}: trace of the flattest", zero_sum.least_trace(length), trace, 1e-9,
              "tolerance"),
        Check(f"T = {length}: trace of Gaussian solutions, {size}, over the least", 1, mean,
              NUM_ERRORS * sem, over_networks, ">"),
    ]  # fmt: skip


def wide_check() -> Check:
    """Many Gaussian neurons: a = -2 (1.w) / M, a trace of 2 (T - 1) sqrt(T)."""
    mean, sem = mean_and_sem([relative_trace(n, LENGTH) for n in gaussians(LENGTH, WIDE)])
    limit = (LENGTH * (LENGTH - 1)) ** 0.5
    name = f"T = {LENGTH}: the same, {WIDE * zero_sum.neurons_to_fit(LENGTH):,} neurons"
    error = f"{NUM_ERRORS} SEM of {NUM_NETWORKS} networks + 1/{WIDE}"
    return Check(name, limit, mean, NUM_ERRORS * sem + limit / WIDE, error)


def transfer_checks(solutions: list[Network]) -> list[Check]:
    """Check that the flattest solution transfers as the closed forms say; Gaussian ones do not."""
    flattest = [zero_sum.flattest(LENGTH)] * NUM_NETWORKS
    checks = []
    for num_examples in NUM_EXAMPLES:
        chances = zero_sum.chance_of_sums(num_examples), zero_sum.chance_of_majority(num_examples)
        for kind, chance, found in zip(
            ("sums", "signs"), chances, transfers(flattest, num_examples), strict=True
        ):
            name = f"flattest: all {kind} right after {num_examples} examples"
            checks.append(chance_check(name, chance, found))
    below = transfers(solutions, NUM_EXAMPLES[-1])[0]
    name = f"Gaussian: all sums right after {NUM_EXAMPLES[-1]} examples"
    return [*checks, chance_check(name, zero_sum.chance_of_sums(NUM_EXAMPLES[-1]), below, "<")]


def chance_check(
    name: str, chance: float, shares: np.ndarray, relation: Literal["=", "<"] = "="
) -> Check:
    """Check the mean of shares of draws against a probability."""
    num_draws = len(shares) * NUM_DRAWS
    error_bar = NUM_ERRORS * (chance * (1 - chance) / num_draws) ** 0.5
    error = f"{NUM_ERRORS} SEM of {num_draws:,} draws"
    return Check(name, chance, float(shares.mean()), error_bar, error, relation)


def draw_traces(ax: Axes, solutions: dict[int, list[Network]]) -> None:
    """Draw the traces against length, on a log scale."""
    lengths = list(solutions)
    least = [zero_sum.least_trace(length) for length in lengths]
    flattest = [relative_trace(zero_sum.flattest(length), length) for length in lengths]
    ax.plot(lengths, least, color="black", label="2√(T − 1)")
    ax.plot(lengths, np.multiply(least, flattest), "o", color=COLORS[0], label="flattest")
    for length, networks in solutions.items():
        traces = [zero_sum.least_trace(length) * relative_trace(n, length) for n in networks]
        label = "Gaussian" if length == lengths[0] else ""
        ax.plot([length] * len(traces), traces, "s", color=COLORS[1], alpha=0.5, label=label)
    ax.set_yscale("log")
    ax.set_xticks(lengths)
    ax.set_xlabel("Length T")
    ax.set_ylabel("Trace of the Hessian")
    ax.legend(frameon=False)


def draw_transfer(ax: Axes, kinds: dict[str, list[Network]]) -> None:
    """Draw the probability of right sums against the number of examples."""
    numbers = [1, 2, 3, 4, 6, 8, 12, 16, 32]
    for color, (name, networks) in zip(COLORS, kinds.items(), strict=False):
        shares = [transfers(networks, number)[0] for number in numbers]
        ax.plot(numbers, np.mean(shares, axis=1), "o-", markersize=4, color=color, label=name)
    chances = [zero_sum.chance_of_sums(number) for number in numbers]
    ax.plot(numbers, chances, "--", color="black", label="1 − 2^(1 − n)")
    ax.set_xscale("log", base=2)
    ax.set_xlabel("Examples n")
    ax.set_ylabel("Chance that all sums are right")
    ax.legend(frameon=False)
