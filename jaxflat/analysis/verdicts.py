"""Turn an interval into a word, by one rule that is the same in both directions."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxflat.analysis.statistics.intervals import Interval

SUPPORTED, CONTRADICTED, UNDECIDED, NONE = "supported", "contradicted", "undecided", "no verdict"
RULES = (
    "A claim says on which side of a value its statistic lies: of 0, or of 1 for ratios. The "
    "verdict is 'supported' if the whole 95% interval lies on that side, 'contradicted' if the "
    "whole interval lies on the other, and 'undecided' if it includes the value. Undecided does "
    "not mean that there is no effect.",
    "A claim of two parts is supported if both are, contradicted if either is, and otherwise "
    "undecided.",
    "'At matched excess loss' uses only pairs whose losses are equivalent (two one-sided tests at "
    "the main margin). If there is no such pair, no interval or no measurement, there is 'no "
    "verdict', and the reason is given instead.",
    "'Flatter' refers to the embedded measure (see 'How to read the traces'). Claims on "
    "pairs add what the invariant trace says, where it was measured.",
    "Every statistic is one number per seed, averaged over seeds, with Student's t interval. The "
    "claims are not corrected for their number.",
)


@dataclass(frozen=True)
class Verdict:
    """`statistic` names what judges the claim; `evidence` is its value and interval as text.

    `reason` says why there is no verdict; it is "" if there is one.
    """

    claim: str
    statistic: str
    evidence: str
    answer: str
    reason: str = ""


def decide(interval: Interval | None, null: float, expected: int) -> str:
    """Judge whether the statistic is on the `expected` side of `null` (+1: above; -1: below)."""
    if interval is None or interval.low is None:
        return NONE
    return {1: SUPPORTED, -1: CONTRADICTED, 0: UNDECIDED}[expected * interval.side(null)]


def all_of(answers: Iterable[str]) -> str:
    """Return the answer to a claim of several parts."""
    answers = list(answers)
    if NONE in answers:
        return NONE
    if CONTRADICTED in answers:
        return CONTRADICTED
    return SUPPORTED if set(answers) == {SUPPORTED} else UNDECIDED
