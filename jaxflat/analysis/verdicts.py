"""Turn the tests of a sweep's claims into words, by one rule for both directions."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxflat.analysis.statistics.intervals import LEVEL

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
NEGLIGIBLE, NOT_IDENTIFIED, NONE = "negligible", "not identified", "no verdict"
ACCURACY, FLATNESS, EFFECT, LABEL_NOISE = KINDS = ("accuracy", "flatness", "effect", "label noise")
RULES = (
    "A claim says on which side of a value its statistic lies: of 0, or of 1 for ratios. It is "
    "'supported' if a two-sided test at 5% finds the statistic on that side, 'contradicted' if on "
    "the other, and otherwise 'undecided'. Undecided does not mean that there is no effect.",
    "A claim on the effect of flatness is 'negligible' if two one-sided tests at 5% show that the "
    "effect lies within the margin that the sweep declared, and if the compared models' traces "
    "differ by a factor of at least 1.5 (the whole interval). There must also be room below the "
    "accuracies' ceiling for an effect as large as the margin. A small effect may lie on a side "
    "and also be negligible; the verdict is then 'supported' or 'contradicted'.",
    "Claims of the primary kind, which the sweep declared before it ran, are corrected for their "
    "own number (Holm 1979; Shaffer 1986). All other claims are corrected together, for theirs. So "
    "the interval of a claim may exclude 0 (1 for ratios) although the claim is undecided.",
    "A claim on the effect of flatness is 'not identified' if flatness differs only together with "
    "something else that may change accuracy, such as size. The page then describes, and gives no "
    "verdict.",
    "Claims at equal loss read both models at the same losses, by interpolation between the "
    "checkpoints of each run. On a text, or if the runs' losses do not overlap, two one-sided "
    "tests must show the losses equal within the declared margin. Otherwise there is 'no verdict', "
    "with the reason. The claim on label noise compares first and last checkpoints, by these two "
    "tests.",
)


@dataclass(frozen=True)
class ClaimTest:
    """The test of one claim, before correction for the number of claims.

    kind: one of KINDS. `statistic` names what is tested; `evidence` is its value and interval as
    text. side: +1 if the statistic lies on the claimed side, else -1. p: of the two-sided test,
    None if there is none; `reason` then says why. p_negligible: of the two one-sided tests, None
    if they do not apply. identified: False if flatness differs only with something else. subject:
    the second of two models, or what changes flatness. over: the end of `statistic`, which says
    what it is a mean over.
    """

    claim: str
    kind: str
    statistic: str = ""
    evidence: str = ""
    side: int = 0
    p: float | None = None
    p_negligible: float | None = None
    reason: str = ""
    identified: bool = True
    subject: str = ""
    over: str = ""


@dataclass(frozen=True)
class Verdict:
    """The answer to a claim; see ClaimTest for the other fields.

    `p` is corrected, and of the test that gave the answer; `reason` says why there is none.
    """

    claim: str
    kind: str
    primary: bool
    statistic: str
    evidence: str
    answer: str
    p: float | None = None
    reason: str = ""
    subject: str = ""
    over: str = ""


def decide(tests: Sequence[ClaimTest], primary: str) -> list[Verdict]:
    """Return the verdicts, those on claims of the kind `primary` first."""
    first = [test for test in tests if test.kind == primary]
    return [
        verdict
        for family, is_primary in (
            (first, True),
            ([test for test in tests if test.kind != primary], False),
        )
        for verdict in _decide_family(family, is_primary)
    ]


def shaffer(p_values: Sequence[float], claims: Sequence[int]) -> list[float]:
    """Return the corrected p of each test, where at most one null hypothesis of a claim is true.

    Tests are corrected from the smallest p on. Each p is multiplied by the number of claims that
    still have an uncorrected test. It becomes at least the p corrected before it, and at most 1
    (Shaffer 1986, J. Am. Stat. Assoc. 81:826). With one test a claim, this is Holm's correction
    (1979, Scand. J. Stat. 6:65). The probability that any true null hypothesis has a corrected p
    below a is at most a.
    """
    corrected, largest, remaining = [0.0] * len(p_values), 0.0, list(claims)
    for place in sorted(range(len(p_values)), key=lambda place: p_values[place]):
        largest = max(largest, min(1.0, len({*remaining}) * p_values[place]))
        corrected[place] = largest
        remaining.remove(claims[place])
    return corrected


def _decide_family(tests: Sequence[ClaimTest], primary: bool) -> list[Verdict]:
    """Decide claims that are corrected together.

    An effect that is 0 does not lie outside the margin. So of a claim's two null hypotheses, at
    most one is true.
    """
    found = [(c, p) for c, t in enumerate(tests) for p in (t.p, t.p_negligible) if p is not None]
    corrected = iter(shaffer([p for _, p in found], [claim for claim, _ in found]))
    verdicts = []
    for test in tests:
        p, p_negligible = (
            None if one is None else next(corrected) for one in (test.p, test.p_negligible)
        )
        answer = _answer(test, p, p_negligible)
        verdicts.append(
            Verdict(
                *(test.claim, test.kind, primary, test.statistic, test.evidence, answer),
                p=p_negligible if answer == NEGLIGIBLE else p,
                reason=test.reason,
                subject=test.subject,
                over=test.over,
            )
        )
    return verdicts


def _answer(test: ClaimTest, p: float | None, p_negligible: float | None) -> str:
    if not test.identified:
        return NOT_IDENTIFIED
    if p is None:
        return NONE
    if p < 1 - LEVEL:
        return SUPPORTED if test.side > 0 else CONTRADICTED
    if p_negligible is not None and p_negligible < 1 - LEVEL:
        return NEGLIGIBLE
    return UNDECIDED
