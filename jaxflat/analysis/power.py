"""Predict what a sweep can decide, by judging made-up results of its shape."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare
from jaxflat.analysis.plan import Plan
from jaxflat.analysis.synthetic import PlantedTruth, SyntheticArm, draw_sweep
from jaxflat.analysis.verdicts import CONTRADICTED, EFFECT, NEGLIGIBLE, SUPPORTED, UNDECIDED

NUM_SWEEPS = 100
MAX_SECONDS = 3.0
DECIDING = (SUPPORTED, CONTRADICTED, UNDECIDED, NEGLIGIBLE)
PLANTED = {
    "accuracy": "1 point of accuracy between arms",
    "flatness": "half the trace between arms",
    "effect": "1 point per halving of the trace",
}


@dataclass(frozen=True)
class ClaimPower:
    """How made-up results were judged on one claim, in which an effect was planted."""

    claim: str
    kind: str
    answers: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def is_identified(self) -> bool:
        """True if most results gave a verdict."""
        return 2 * sum(self.answers[word] for word in DECIDING) > self.answers.total()

    @property
    def power(self) -> float:
        """The share of results that support the claim, which is true in all of them."""
        return self.answers[SUPPORTED] / self.answers.total()

    @property
    def reason(self) -> str:
        """The most frequent reason for no verdict, or its name if no reason is given."""
        found = (self.reasons or self.answers).most_common(1)
        return found[0][0]


def predict_verdicts(arms: Sequence[SyntheticArm], plan: Plan) -> list[ClaimPower]:
    """Return the claims on made-up results with planted effects, which PLANTED describes.

    For claims on the effect, the trace halves from the first arm (or weakest dose) to the last,
    and halving it causes 1 point. For the other claims, each arm differs from the first by 1 point
    and half the trace. A size differs as much from the next smaller one.
    """
    ramped = [replace(arm, dose=dose) for arm, dose in zip(arms, _doses(arms), strict=True)]
    sizes = sorted({arm.num_params for arm in arms})
    steps = [sizes.index(arm.num_params) if len(sizes) > 1 else a > 0 for a, arm in enumerate(arms)]
    differing = [
        replace(arm, accuracy=float(step), log_trace=-step * math.log(2))
        for arm, step in zip(arms, steps, strict=True)
    ]
    effects = _judge(ramped, plan, PlantedTruth(slope=1.0, dose_log_trace=-math.log(2)))
    others = _judge(differing, plan, PlantedTruth())
    return [effects.get(one.claim, one) if one.kind == EFFECT else one for one in others.values()]


def _doses(arms: Sequence[SyntheticArm]) -> list[float]:
    """Return 0 to 1: by the strength of a penalty on flatness, otherwise in the arms' order."""
    strengths = [
        [text for key, text in arm.swept.items() if key.endswith("flatness_penalty.strength")]
        for arm in arms
    ]
    values: list[float] = list(range(len(arms)))
    if all(strengths):
        values = [float(found[0] or 0) for found in strengths]
    order = sorted(set(values))
    return [order.index(value) / max(1, len(order) - 1) for value in values]


def _judge(arms: Sequence[SyntheticArm], plan: Plan, truth: PlantedTruth) -> dict[str, ClaimPower]:
    """Return the claims on results of one truth; a slow analysis gets fewer results."""
    found: dict[str, ClaimPower] = {}
    random, start = np.random.default_rng(0), time.monotonic()
    for _ in range(NUM_SWEEPS):
        for verdict in judge(compare(draw_sweep(arms, truth, random).rows, plan)):
            one = found.setdefault(verdict.claim, ClaimPower(verdict.claim, verdict.kind))
            one.answers[verdict.answer] += 1
            one.reasons.update([verdict.reason] if verdict.reason else [])
        if time.monotonic() - start > MAX_SECONDS:
            break
    return found
