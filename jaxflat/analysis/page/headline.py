"""The question of a sweep, its answer in one sentence, and its verdicts in short."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxflat.analysis.claims import OPPOSITE
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.effects import ACROSS, WITHIN, common_column
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.loss_scale import SCALES, LossScale
from jaxflat.analysis.page import wording
from jaxflat.analysis.plan import Plan
from jaxflat.analysis.verdicts import (
    ACCURACY,
    CONTRADICTED,
    EFFECT,
    FLATNESS,
    LABEL_NOISE,
    NEGLIGIBLE,
    NONE,
    NOT_IDENTIFIED,
    SUPPORTED,
    UNDECIDED,
    Verdict,
)

MOST_WORDS = 25
LABELS = {
    "map": "the most probable hidden symbol given the words",
    "latent": "the true hidden symbol",
}
YES_OR_NO = {
    SUPPORTED: "Yes",
    CONTRADICTED: "No, the opposite",
    NEGLIGIBLE: "No, negligible",
    UNDECIDED: "Undecided",
    NOT_IDENTIFIED: "Not identified",
    NONE: "No verdict",
}


@dataclass(frozen=True)
class Chip:
    """Claims with one verdict: its word, the claims, and their numbers or the reason for none."""

    answer: str
    claims: list[str]
    detail: str
    primary: bool


@dataclass(frozen=True)
class Headline:
    """The first screen's words.

    leading: the one answer of all verdicts that `answer` rests on, "" if they differ. `basis` names
    the endpoint and the margins; `fallbacks` says which of them replace declared ones.
    """

    question: str
    answer: str
    leading: str
    chips: list[Chip]
    basis: list[tuple[str, str]]
    fallbacks: list[str]


def headline(comparison: Comparison, verdicts: Sequence[Verdict]) -> Headline:
    """Say what the sweep asks, and what its leading claims answer."""
    leading = leading_verdicts(verdicts)
    answers = {one.answer for one in leading}
    return Headline(
        leading=answers.pop() if len(answers) == 1 else "",
        question=_question(comparison, leading[0].kind),
        answer=answer_sentence(comparison, leading),
        chips=_chips(verdicts, _sharpness(comparison)),
        basis=_basis(comparison),
        fallbacks=_fallbacks(comparison, verdicts),
    )


def leading_verdicts(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts that the answer rests on: the primary ones, if the sweep has any.

    Otherwise they have the first kind in `_KINDS` that was tested. A claim on an intervention comes
    before claims that compare seeds or settings.
    """
    primary = [one for one in verdicts if one.primary]
    kinds = [[one for one in verdicts if one.kind == kind] for kind in _KINDS]
    tested = [of_kind for of_kind in kinds if any(one.p is not None for one in of_kind)]
    found = primary or [*tested, *filter(None, kinds)][0]
    interventions = [one for one in found if not one.claim.endswith((WITHIN, ACROSS))]
    within = [one for one in found if one.claim.endswith(WITHIN) and one.p is not None]
    return interventions or within or found[:1]


_KINDS = (ACCURACY, EFFECT, LABEL_NOISE, FLATNESS)


def _question(comparison: Comparison, kind: str) -> str:
    if kind == EFFECT:
        return "At equal pre-training loss, does a flatter model transfer better?"
    if kind == LABEL_NOISE:
        return "At equal pre-training loss, does label noise make a model flatter?"
    word = "more accurate downstream" if kind == ACCURACY else "flatter"
    if not comparison.arm_comparison:
        return f"At equal pre-training loss, is the larger model {word}?"
    baseline, others = comparison.arm_comparison.baseline.arm, comparison.arm_comparison.against
    one = others[0].second.arm if len(others) == 1 else "any other arm"
    return f"At equal pre-training loss, is {one} {word} than {baseline}?"


def answer_sentence(comparison: Comparison, leading: Sequence[Verdict]) -> str:
    """Return the answer with its size and interval, in at most MOST_WORDS words."""
    first, column = leading[0], common_column(comparison.cells)
    if len(leading) == 1:
        sentences = [_of_one(first, COMPARED.get(column, "sharpness"), _sharpness(comparison))]
    else:
        sentences = _of_several(leading, _sharpness(comparison))
    last = f"{YES_OR_NO[first.answer]}: the verdicts and the tests below say why."
    candidates = [form for one in sentences for form in (one, one.replace("95% interval ", ""))]
    candidates.append(last)
    return next(one for one in candidates if len(one.split()) <= MOST_WORDS)


def _sharpness(comparison: Comparison) -> str:
    """Return the short word for the measure of flatness that is compared."""
    column = common_column(comparison.cells)
    return "trace" if column.partition("@")[0].endswith("_trace") else "sharpness"


def _of_one(verdict: Verdict, measure: str, sharpness: str) -> str:
    word = YES_OR_NO[verdict.answer]
    if verdict.reason:
        return f"{word}: {verdict.reason}."
    value, *others = verdict.evidence.split("; ")
    if verdict.claim.endswith(WITHIN):
        p = wording.p_value(verdict.p)
        return (
            f"{word}: over the seeds of one setting, accuracy and a smaller {measure} have rank "
            f"correlation {value} (corrected p {p})."
        )
    if verdict.kind == EFFECT:
        value = _interval(value, " points")
        return f"{word}: halving the {measure} by {verdict.subject} changes accuracy by {value}."
    if verdict.kind == LABEL_NOISE:
        return (
            f"{word}: under label noise the {sharpness} changes {value}; relative to exact "
            f"targets, {others[0]}."
        )
    if verdict.kind == ACCURACY:
        over = f", {verdict.over}" if verdict.over else ""
        value = _interval(value, " points")
        return f"{word}: {verdict.subject} differs in accuracy by {value}{over}."
    value = _interval(value.replace("×", ""), f" times the {measure}")
    opposite = "; the embedded trace says the opposite" if _says_opposite(verdict) else ""
    return f"{word}: {verdict.subject} has {value}{opposite}."


def _says_opposite(verdict: Verdict) -> bool:
    return verdict.kind == FLATNESS and verdict.evidence.endswith(OPPOSITE)


def _interval(value: str, unit: str = "") -> str:
    """'+2.7 (−0.3 to +5.8)' -> '+2.7 points (95% interval −0.3 to +5.8)'."""
    return re.sub(r" \((.* to .*)\)", rf"{unit} (95% interval \1)", value)


def _of_several(leading: Sequence[Verdict], sharpness: str) -> list[str]:
    """Return sentences, the longest first: the arms by answer, or counts, and a value."""
    answers = [one.answer for one in leading]
    nouns = {
        ACCURACY: ("arms", "more accurate", "less accurate"),
        FLATNESS: ("arms", "flatter", "sharper"),
    }
    noun, more, less = nouns.get(leading[0].kind, ("claims", SUPPORTED, CONTRADICTED))
    words: dict[str, str] = {SUPPORTED: more, CONTRADICTED: less}
    found = {
        words.get(answer, answer): [one.subject for one in leading if one.answer == answer]
        for answer in YES_OR_NO
        if answer in answers
    }
    counts = (f"{len(subjects)} {word}" for word, subjects in found.items())
    counted = f"Of {len(leading)} {noun}: {', '.join(counts)}"
    named = ". ".join(f"{wording.capitalized(w)}: {', '.join(s)}" for w, s in found.items())
    tested = [one for one in leading if one.p is not None and not one.reason]
    if not tested:
        reasons = dict.fromkeys((one.answer, one.reason) for one in leading)
        answer, reason = next(iter(reasons))
        word = f"{YES_OR_NO[answer]} on {len(leading)} {noun}"
        return [f"{word}: {reason}."] * (len(reasons) == 1) + [f"{counted}."]
    clearest = min(tested, key=lambda one: one.p or 0.0)
    value = _value(clearest, sharpness).partition("; ")[0].replace(f" of the {sharpness}", "")
    smallest = f"Smallest p: {clearest.subject}, {_interval(value)}."
    names = [f"{named}. {smallest}"] if all(one.subject for one in leading) else []
    return [*names, f"{counted}. {smallest}", f"{counted}."]


def _chips(verdicts: Sequence[Verdict], sharpness: str) -> list[Chip]:
    """Return a chip for each tested claim, and for each reason for no test; primary ones first."""
    tested = [
        Chip(
            one.answer,
            [_short(one.claim)],
            f"{_value(one, sharpness)}; corrected p {wording.p_value(one.p)}",
            one.primary,
        )
        for one in verdicts
        if not one.reason
    ]
    reasons: dict[tuple[str, str, bool], list[str]] = {}
    for one in verdicts:
        if one.reason:
            reasons.setdefault((one.answer, one.reason, one.primary), []).append(_short(one.claim))
    found = tested + [
        Chip(answer, _counted(claims), reason, primary)
        for (answer, reason, primary), claims in reasons.items()
    ]
    return sorted(found, key=lambda one: not one.primary)


def _value(verdict: Verdict, sharpness: str) -> str:
    """Return a verdict's numbers with their units.

    The embedded trace stands beside the invariant one only if it says the opposite.
    """
    units = {
        ACCURACY: " points",
        EFFECT: f" points per halving of the {sharpness}",
        FLATNESS: f" the {sharpness}",
    }
    if verdict.claim.endswith(WITHIN):
        return f"rank correlation {verdict.evidence}"
    value = verdict.evidence
    if verdict.kind == FLATNESS and not _says_opposite(verdict):
        value = value.partition("; ")[0]
    unit = units.get(verdict.kind, "")
    return re.sub(r" \(", f"{unit} (", value, count=1)


def _counted(claims: list[str]) -> list[str]:
    """Return the claims, or their number if there are many: the tests list them."""
    return claims if len(claims) <= 4 else [f"{len(claims)} claims"]


def _short(claim: str) -> str:
    """Return a claim without its first words, "At equal loss", which most have."""
    for scale in SCALES:
        claim = claim.removeprefix(scale.claim(""))
    return claim


def endpoint(comparison: Comparison) -> str:
    """Name the accuracy that was used: its probe, labels, and number of labelled examples."""
    if not comparison.primary_columns:
        return "not measured"
    probe, *_, shots = comparison.primary_columns[0].split("/")
    labeling = comparison.primary_labeling
    meaning = f": {LABELS[labeling]}" if labeling in LABELS else ""
    return (
        f"{probe.replace('_', ' ')}, {int(shots):,} labelled examples, mean over "
        f"{wording.plural(len(comparison.primary_columns), 'task')}, {labeling} labels{meaning}"
    )


def _basis(comparison: Comparison) -> list[tuple[str, str]]:
    column, plan = common_column(comparison.cells), comparison.plan
    word = _sharpness(comparison)
    rows = [row for cell in comparison.cells for row in cell.rows.values()]
    replicates = wording.plural(len({row.seed for row in rows}), "seed")
    if (num_languages := len({row.language for row in rows})) > 1:
        replicates += f" on {num_languages} languages"
    return [
        ("Accuracy", endpoint(comparison)),
        ("Flatness", COMPARED.get(column, "not measured")),
        ("Equal loss", _equal_loss(comparison.scale, plan)),
        ("Negligible", f"within ±{plan.negligible_slope:g} points per halving of the {word}"),
        ("Replicates", replicates),
        ("Verdicts", "rest on p, corrected for the number of claims; intervals are not corrected"),
    ]


def _equal_loss(scale: LossScale, plan: Plan) -> str:
    margin = scale.margin_words(scale.margin(plan))
    if scale.is_log:
        return f"excess losses (above the optimum) within {margin}"
    return (
        f"equal held-out losses, within {margin}, with errors over seeds and documents. The "
        "distance from the optimum is not known"
    )


def _fallbacks(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[str]:
    """Say what was used instead of what was declared or preferred, or that it is missing."""
    plan, found = comparison.plan, []
    if not plan.primary:
        found.append("This folder records no claims, so the endpoint and the margins are defaults.")
    elif not any(one.primary for one in verdicts):
        found.append(
            f"The declared primary claim ({plan.primary}) has no test in this sweep; the answer "
            "is on other claims."
        )
    if not comparison.primary_columns:
        found.append(f"The accuracy to compare ({plan.accuracy}) was not measured.")
    elif comparison.primary_labeling == "latent":
        found.append("No map labels: latent labels are used instead.")
    preferred, used = next(iter(COMPARED)), common_column(comparison.cells)
    if used and used != preferred:
        found.append(f"No {COMPARED[preferred]}: the {COMPARED[used]} is used instead.")
    return found
