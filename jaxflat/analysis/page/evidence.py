"""The verdicts and the correlations of a sweep, as tables and in sentences."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxflat.analysis.associations import Association, associations, statistics
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.loss_scale import LossScale
from jaxflat.analysis.page import wording
from jaxflat.analysis.verdicts import Verdict

Table = list[list[str]]


class Evidence(NamedTuple):
    """The verdicts on a sweep's claims, and correlations that describe its checkpoints."""

    verdicts: list[Verdict]
    correlations: list[Association]


def examine(comparison: Comparison) -> Evidence:
    """Return the evidence for the sections of the page and for the joint table."""
    found = associations(comparison)
    return Evidence(judge(comparison), found)


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    header = ["Claim", "Verdict", "Value (95% interval)", "p, corrected", "Statistic"]
    return [header] + [
        [
            marked_claim(one),
            answer_words(one),
            one.evidence or wording.MISSING,
            wording.p_value(one.p),
            one.statistic or wording.MISSING,
        ]
        for one in verdicts
    ]


def answer_words(verdict: Verdict) -> str:
    return f"{verdict.answer}: {verdict.reason}" if verdict.reason else verdict.answer


def marked_claim(verdict: Verdict) -> str:
    return f"{verdict.claim} (primary)" if verdict.primary else verdict.claim


def reason_sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the claims that were not tested, a sentence for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in verdicts:
        if one.reason:
            reasons.setdefault((one.answer, one.reason), []).append(marked_claim(one))
    return [
        f"{answer.capitalize()}, because {why}: {'; '.join(claims)}."
        for (answer, why), claims in reasons.items()
    ]


def correlations_table(found: Sequence[Association], scale: LossScale) -> Table:
    """Return one column per measure and one row per statistic."""
    rows = [["Accuracy against", *(one.name for one in found)]]
    rows.append(["Seeds × checkpoints", *(f"{o.num_seeds} × {o.num_checkpoints}" for o in found)])
    rows += [
        [name, *(wording.correlation(one.found.get(name)) for one in found)]
        for name in statistics(scale)
        if any(name in one.found for one in found)
    ]
    if any(one.information for one in found):
        rows.append(["Information", *map(_information, found)])
    return rows


def missing_numbers(found: Sequence[Association]) -> list[str]:
    """Say why numbers are missing from the table, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in found:
        by_reason: dict[str, list[str]] = {}
        for name, why in one.missing.items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            are_all = len(names) == len(one.found) + len(one.missing)
            what = "correlation" if are_all else ", ".join(names)
            reasons.setdefault((what, why), []).append(one.name)
    return [f"{', '.join(of)}: no {what}, because {why}." for (what, why), of in reasons.items()]


def _information(one: Association) -> str:
    if one.information is None:
        return wording.MISSING
    given = ", ".join(name.rpartition(".")[2] for name in one.information.conditions) or "nothing"
    return f"{one.information.score:.2f} given {given} (by chance {one.chance:.2f})"
