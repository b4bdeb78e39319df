"""Networks on zero-sum strings, trained by SGD with label noise."""

from dataclasses import dataclass

import jax
import numpy as np
from matplotlib.axes import Axes

from jaxflat.analysis.page.drawing import COLORS, GREY
from jaxflat.theory import noisy_training, zero_sum
from jaxflat.theory.check import NUM_ERRORS, Check, mean_and_sem
from jaxflat.theory.solutions import LENGTH, NUM_EXAMPLES, chance_check, transfers
from jaxflat.theory.zero_sum import Network, loss, relative_trace

NEAR = 0.02  # of the least trace: allowance for the finite budget of training


@dataclass(frozen=True)
class Training:
    """Networks of one kind before, during and after label noise, and the control without it."""

    name: str
    on_the_way: list[list[Network]]
    before: list[Network]
    after: list[Network]
    control: list[Network]


def train(name: str, before: noisy_training.Weights, key: jax.Array) -> Training:
    """Train from zero loss with noisy labels, then settle; the control uses right labels."""
    noisy = noisy_training.noisy_sgd(before, key, noisy_training.NOISE)
    right = noisy_training.noisy_sgd(before, key, 0.0)
    records = [jax.tree.map(lambda x, r=r: x[r], noisy) for r in range(noisy_training.NUM_RECORDS)]
    after = noisy_training.settle(records[-1])
    control = noisy_training.settle(jax.tree.map(lambda x: x[-1], right))
    found = (noisy_training.networks_of(weights) for weights in (before, after, control))
    return Training(name, [noisy_training.networks_of(r) for r in records], *found)


def training_checks(training: Training) -> list[Check]:
    """Check that label noise reaches the flattest solution and transfers; the control does not."""
    name, length, most = training.name, LENGTH, NUM_EXAMPLES[-1]
    over_networks = f"{NUM_ERRORS} SEM of {len(training.before)} networks"
    before, after, control = (
        np.asarray([relative_trace(network, length) for network in networks])
        for networks in (training.before, training.after, training.control)
    )
    (first, first_sem), (last, last_sem) = mean_and_sem(before), mean_and_sem(after)
    kept, kept_sem = mean_and_sem(control / before)
    networks = (*training.before, *training.after, *training.control)
    chance = zero_sum.chance_of_sums(most)
    sums = f"{name}: all sums right after {most} examples"
    return [
        Check(f"{name}: largest loss of all", 0, max(loss(n, length) for n in networks), 1e-5,
              "tolerance"),
        Check(f"{name}: trace over the least, before", 1, first, NUM_ERRORS * first_sem,
              over_networks, ">"),
        Check(f"{name}: trace over the least, after label noise", 1, last,
              NUM_ERRORS * last_sem + NEAR, f"{over_networks} + {NEAR}"),
        Check(f"{name}: trace after right labels, over before", 1, kept,
              NUM_ERRORS * kept_sem + NEAR, f"{over_networks} + {NEAR}"),
        chance_check(f"{sums}, before", chance, transfers(training.before, most)[0], "<"),
        chance_check(f"{sums}, after label noise", chance, transfers(training.after, most)[0]),
    ]  # fmt: skip


def draw_training(ax: Axes, trainings: list[Training]) -> None:
    """Draw the traces during training, and the traces of the settled networks."""
    steps = noisy_training.NUM_STEPS * np.arange(noisy_training.NUM_RECORDS + 1) / 1000
    for color, training in zip(COLORS, trainings, strict=False):
        stages = [training.before, *training.on_the_way[:-1], training.after]
        ratios = np.asarray([[relative_trace(n, LENGTH) for n in stage] for stage in stages])
        label = [training.name] + [""] * (ratios.shape[1] - 1)
        ax.plot(steps, ratios, color=color, linewidth=0.8, label=label)
        kept = np.mean([relative_trace(n, LENGTH) for n in training.control])
        ax.plot([0, steps[-1]], [ratios[0].mean(), kept], "--", color=color, linewidth=0.8)
    ax.axhline(1, color=GREY, linestyle=":")
    ax.set_yscale("log")
    ax.set_xlabel("Steps (thousands); dashed: right labels")
    ax.set_ylabel("Trace over the least")
    ax.legend(frameon=False)
