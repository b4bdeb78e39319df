"""Count false verdicts on made-up sweeps, from the rows of results.csv to the report's words."""

import math
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare
from jaxflat.analysis.plan import UNDECLARED
from jaxflat.analysis.synthetic import SyntheticArm, SyntheticSweep, draw_sweep
from jaxflat.analysis.verdicts import (
    ACCURACY,
    CONTRADICTED,
    EFFECT,
    LABEL_NOISE,
    NEGLIGIBLE,
    SUPPORTED,
)
from jaxflat.benchmark.verdict_scenarios import Scenario

MARGIN = UNDECLARED.negligible_slope  # an effect as large as this is not negligible
ANY = "any"
CHUNK = 50  # sweeps that one generator draws, so that the number of processes changes no result


@dataclass(frozen=True)
class VerdictCounts:
    """Counts over made-up sweeps of one scenario.

    `answers` counts the answers to each (kind, claim), `wrong` the false ones. `wrong_sweeps`
    counts the sweeps with a false verdict of a kind, or of any. `effect` counts the answers to the
    first claim about the effect of flatness on accuracy.
    """

    num_sweeps: int = 0
    answers: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong_sweeps: Counter[str] = field(default_factory=Counter)
    effect: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "VerdictCounts") -> "VerdictCounts":
        return VerdictCounts(
            self.num_sweeps + other.num_sweeps,
            self.answers + other.answers,
            self.wrong + other.wrong,
            self.wrong_sweeps + other.wrong_sweeps,
            self.effect + other.effect,
        )

    def worst(self, kind: str) -> int:
        """Return the number of false verdicts on the claim of this kind that has most."""
        return max((count for (of, _), count in self.wrong.items() if of == kind), default=0)


def count_all(scenarios: Sequence[Scenario], num_sweeps: int) -> Iterator[VerdictCounts]:
    """Yield the counts of each scenario, in order; all processors draw and judge sweeps."""
    sizes = [min(CHUNK, num_sweeps - start) for start in range(0, num_sweeps, CHUNK)]
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may block
    with ProcessPoolExecutor(mp_context=context) as pool:
        pending = [
            [pool.submit(count_verdicts, scenario, size, (s, c)) for c, size in enumerate(sizes)]
            for s, scenario in enumerate(scenarios)
        ]
        for chunks in pending:
            yield sum((chunk.result() for chunk in chunks), VerdictCounts())


def count_verdicts(scenario: Scenario, num_sweeps: int, seed: Sequence[int]) -> VerdictCounts:
    """Draw sweeps of a scenario, and count the verdicts on them."""
    counts, random = VerdictCounts(num_sweeps), np.random.default_rng(seed)
    plan = replace(UNDECLARED, primary=scenario.primary)
    for _ in range(num_sweeps):
        sweep = draw_sweep(scenario.arms, scenario.truth, random)
        verdicts = judge(compare(sweep.rows, plan))
        wrong_kinds = set()
        for verdict in verdicts:
            kind = verdict.kind
            value = planted_value(verdict.claim, kind, scenario, sweep)
            counts.answers[kind, verdict.claim, verdict.answer] += 1
            if is_false(verdict.answer, value):
                counts.wrong[kind, verdict.claim] += 1
                wrong_kinds |= {kind, ANY}
        counts.wrong_sweeps.update(wrong_kinds)
        effects = (one.answer for one in verdicts if one.kind == EFFECT)
        counts.effect.update([next(effects, "no claim")])
    return counts


def is_false(answer: str, planted: float) -> bool:
    """Say whether an answer is false of a planted value: a claim is true if it is positive.

    A claim that is neither supported, contradicted nor negligible is never false.
    """
    if answer == SUPPORTED:
        return planted <= 0
    if answer == CONTRADICTED:
        return planted >= 0
    return answer == NEGLIGIBLE and abs(planted) >= MARGIN


def right_answer(planted: float) -> str:
    """Return the answer that a sweep with enough seeds would give."""
    return SUPPORTED if planted > 0 else CONTRADICTED if planted < 0 else NEGLIGIBLE


def planted_value(claim: str, kind: str, scenario: Scenario, sweep: SyntheticSweep) -> float:
    """Return the true value of what a claim says, positive if the claim is true.

    Accuracy is in points, and flatness in halvings of the trace; both are second arm minus first,
    at equal loss. An effect is in points per halving that the trace causes, or the penalty that the
    claim names. No scenario has an effect of label noise. The second arm is the one that the claim
    names first; a claim that names only one compares it with the baseline. A claim that names none
    compares the largest model with the smallest: effects of size have one sign in each scenario.
    """
    if kind == LABEL_NOISE:
        return 0.0
    halvings_A = -sweep.log_trace_A / math.log(2)
    if kind == EFFECT:
        for a, arm in enumerate(scenario.arms):
            halvings, measure = float(halvings_A[a] - halvings_A[0]), penalised(arm)
            if measure and measure in claim and arm.accuracy and halvings:
                return float(sweep.accuracy_A[a] - sweep.accuracy_A[0]) / halvings
        return scenario.truth.slope
    values_A = sweep.accuracy_A if kind == ACCURACY else halvings_A
    second, first = [*(named_arms(claim, scenario.arms) or [-1]), 0][:2]
    return float(values_A[second] - values_A[first])


def penalised(arm: SyntheticArm) -> str:
    """Return what the arm's penalty measures, as claims name it, "" without a measure."""
    measures = (text for key, text in arm.swept.items() if key.endswith("flatness_penalty.measure"))
    return next(measures, "").replace("_", " ")


def named_arms(claim: str, arms: Sequence[SyntheticArm]) -> list[int]:
    """Return the arms that a claim names, in the order of the claim."""
    places: dict[int, int] = {}
    for a, arm in enumerate(arms):
        swept = arm.swept.items()
        keys = (f"{key.rpartition('.')[2]} {text}" for key, text in swept if text)
        if match := re.search(rf"{re.escape(', '.join(keys))}(?!\w|\.\w)", claim):
            places[a] = match.start()
    return sorted(places, key=lambda a: places[a])
