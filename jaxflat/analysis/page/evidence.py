"""The verdicts and the correlations of a sweep, as sections of the page and as sentences."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxflat.analysis.associations import STATISTICS, Association, associations
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.page import html, wording
from jaxflat.analysis.verdicts import RULES, Verdict

Table = list[list[str]]

ABOUT = (
    "These correlations describe the sweep; no verdict rests on them. "
    "Accuracy against each flatness measure, and against excess loss. All checkpoints of "
    "one seed give one correlation. The table shows its mean over the seeds that have every "
    "checkpoint, with the 95% t interval over seeds (of Fisher's z for Spearman). "
    "Negative: flatter models, or those nearer to the optimum, are more accurate. Positive: "
    "sharper models, or those further from it, are more accurate. The interval says what other "
    "seeds would give for these arms, not what other arms would give."
)
SIMPSON = (
    "Simpson's paradox: correlations can differ in sign within arms and across them, if size, "
    "optimizer or loss affects both measures. Kendall's correlation over all pairs of checkpoints "
    "is a mean, weighted by numbers of pairs, of two parts: pairs within one arm (the same run "
    "at two steps), and pairs across two arms. Read both parts. 'Given' removes from the ranks "
    "what is linear in the ranks of the covariates: excess loss, then also learning rate, batch "
    "size and steps if they vary. Seeds in which nothing remains are left out."
)
JIANG = (
    "Granulated Kendall compares only checkpoints that differ in one hyper-parameter, and averages "
    "for each hyper-parameter, then over all. Information is the smallest fraction, over "
    "conditioning sets of up to two hyper-parameters, of the uncertainty about which of two "
    "checkpoints is more accurate that the measure removes. It lies between 0 and 1 and ignores "
    "the sign. By chance: the same for the measure in random order (Jiang et al. 2020)."
)


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


def verdict_sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """Return each claim with its verdict and evidence, then those without a verdict by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in verdicts:
        if one.reason:
            reasons.setdefault((one.answer, one.reason), []).append(marked_claim(one))
    return [
        f"{marked_claim(one)}: {one.answer} ({one.statistic}: {one.evidence}; corrected p "
        f"{wording.p_value(one.p)})."
        for one in verdicts
        if not one.reason
    ] + [
        f"{answer.capitalize()}, because {why}: {'; '.join(claims)}."
        for (answer, why), claims in reasons.items()
    ]


def correlations_table(found: Sequence[Association]) -> Table:
    """Return one column per measure and one row per statistic."""
    rows = [["Accuracy against", *(one.name for one in found)]]
    rows.append(["Seeds × checkpoints", *(f"{o.num_seeds} × {o.num_checkpoints}" for o in found)])
    rows += [
        [name, *(wording.correlation(one.found.get(name)) for one in found)]
        for name in STATISTICS
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
            what = "correlation" if len(names) == len(STATISTICS) else ", ".join(names)
            reasons.setdefault((what, why), []).append(one.name)
    return [f"{', '.join(of)}: no {what}, because {why}." for (what, why), of in reasons.items()]


def verdicts_section(verdicts: Sequence[Verdict]) -> list[str]:
    return [
        html.heading("Verdicts"),
        html.table(verdicts_table(verdicts)),
        html.details("The rules", html.bullets(RULES)),
    ]


def correlations_section(found: Sequence[Association]) -> list[str]:
    if not found:
        why = "No seed has accuracy and excess loss at every checkpoint, so there is none."
        return [html.heading("Correlations over all checkpoints"), html.paragraph(why)]
    return [
        html.heading("Correlations over all checkpoints"),
        html.paragraph(ABOUT, "note"),
        html.table(correlations_table(found)),
        html.bullets(missing_numbers(found)),
        *(html.paragraph(note, "note") for note in (SIMPSON, JIANG) if any(o.found for o in found)),
    ]


def _information(one: Association) -> str:
    if one.information is None:
        return wording.MISSING
    given = ", ".join(name.rpartition(".")[2] for name in one.information.conditions) or "nothing"
    return f"{one.information.score:.2f} given {given} (by chance {one.chance:.2f})"
