"""From an interval to a word, by one rule that is the same in both directions."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxflat.analysis.flatness_columns import PARAMETRISATION
from jaxflat.analysis.statistics.intervals import Interval

SUPPORTED, CONTRADICTED, UNDECIDED, NONE = "supported", "contradicted", "undecided", "no verdict"
RULES = (
    "A claim says on which side of a value its statistic lies: of 0, or of 1 for ratios. The "
    "verdict is 'supported' where the whole 95% interval lies on that side, 'contradicted' where "
    "the whole interval lies on the other, and 'undecided' where it includes the value. Undecided "
    "does not mean that there is no effect.",
    "A claim of two parts is supported where both are, contradicted where either is, and else "
    "undecided.",
    "'At matched excess loss' takes only pairs whose losses are equivalent (two one-sided tests at "
    "the main margin). Without such a pair, without an interval or without the measurements there "
    "is 'no verdict', and the reason stands in its place.",
    f"'Flatter' is by the embedded measure. {PARAMETRISATION}",
    "Every statistic is one number a seed, averaged over the seeds: the interval is Student's t "
    "over seeds. The claims are not corrected for their number.",
)


@dataclass(frozen=True)
class Verdict:
    """`statistic` says what the claim is judged by, `evidence` its value and interval as text.

    `reason` is why there is no verdict, where there is none.
    """

    claim: str
    statistic: str
    evidence: str
    answer: str
    reason: str = ""


def decide(interval: Interval | None, null: float, expected: int) -> str:
    """Is the statistic on the `expected` side of `null` (+1: above it; -1: below)?"""
    if interval is None or interval.low is None:
        return NONE
    return {1: SUPPORTED, -1: CONTRADICTED, 0: UNDECIDED}[expected * interval.side(null)]


def all_of(answers: Iterable[str]) -> str:
    """The answer to a claim that has several parts."""
    answers = list(answers)
    if NONE in answers:
        return NONE
    if CONTRADICTED in answers:
        return CONTRADICTED
    return SUPPORTED if set(answers) == {SUPPORTED} else UNDECIDED
