"""Pairs in plain words, the same words for each outcome and its opposite."""

from collections.abc import Sequence

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import MARGIN, Pair

ACCURACY_WORDS = {1: "more accurate", -1: "less accurate", 0: "undecided"}
FLATNESS_WORDS = {1: "flatter", -1: "sharper", 0: "undecided"}
INTERVALS = "Brackets and ± are 95% t intervals over seeds, paired by seed for differences."
RELATION_WORDS = {
    1: "flatter is more accurate",
    -1: "flatter is less accurate",
    0: "undecided",
}


def headline(pairs: Sequence[Pair], compared: str, subject: str) -> str:
    """Count the matched pairs, and among them each outcome for accuracy and flatness.

    `compared` names the comparison ("3 pairs of sizes"); `subject` names a pair's second model.
    """
    if all(pair.excess.low is None for pair in pairs):
        return (
            "No pair shares more than one seed, so there are no intervals, and no pair can be "
            "called matched, flatter or more accurate. The numbers below are single measurements."
        )
    matched = [pair for pair in pairs if pair.equivalence.holds]
    if not matched:
        return (
            f"Of {compared}, none is matched in excess loss within ±{MARGIN} nats, so this sweep "
            f"does not show how flatness and accuracy relate at equal loss. {INTERVALS}"
        )
    return (
        f"Of {compared}, {len(matched)} {'is' if len(matched) == 1 else 'are'} matched in excess "
        f"loss within ±{MARGIN} nats. In these, {subject} is "
        f"{_count([pair.accuracy_side for pair in matched], ACCURACY_WORDS)}; it is "
        f"{_count([pair.flatness_side for pair in matched], FLATNESS_WORDS)}. "
        f"{_invariant_counts(matched)}The flatter model is {relation_counts(matched)}. {INTERVALS}"
    )


def _invariant_counts(matched: Sequence[Pair]) -> str:
    sides = [-pair.invariant_ratio.side(1.0) for pair in matched if pair.invariant_ratio]
    return f"By the invariant trace it is {_count(sides, FLATNESS_WORDS)}. " if sides else ""


def relation_counts(matched: Sequence[Pair]) -> str:
    """Count the matched pairs whose flatter model is the more accurate, and the less accurate."""
    together, apart, unknown = (sum(p.relation == side for p in matched) for side in (1, -1, 0))
    return f"the more accurate in {together}, the less accurate in {apart}, undecided in {unknown}"


def pair_sentence(pair: Pair, first: str, second: str) -> str:
    """Describe one pair; `first` and `second` name its two models."""
    names = f"{place_words(pair.first).capitalize()} and {place_words(pair.second)}"
    losses = " and ".join(f"{cell.mean('excess_loss'):.4f}" for cell in (pair.first, pair.second))
    difference = f"difference {wording.nats(pair.excess)}"
    p = pair.equivalence.p
    if p is None:
        return f"{names}: excess losses {losses} nats, {difference}; one seed allows no test."
    test = f"p {wording.p_value(p) if p < 0.001 else '= ' + wording.p_value(p)}"
    if not pair.equivalence.holds:
        return (
            f"{names} are not matched: their excess losses are {losses} nats, "
            f"{difference}, and equivalence within ±{MARGIN} is not shown ({test}). "
            "A difference in accuracy or flatness could come from the loss, so no verdict is "
            "given for this pair."
        )
    return (
        f"{names} are matched: excess losses {losses} nats, {difference}, equivalent within "
        f"±{MARGIN} ({test}). {_accuracy_words(pair, second)}; {_flatness_words(pair, first)}. "
        f"{_relation(pair)}"
    )


def relation_words(pair: Pair) -> str:
    """Say the verdict of one pair in a few words."""
    return RELATION_WORDS[pair.relation] if pair.equivalence.holds else "not matched"


def place_words(cell: Cell) -> str:
    return f"{cell.arm} (step {cell.step:,})"


def _accuracy_words(pair: Pair, second: str) -> str:
    if pair.accuracy is None:
        return "Accuracy was not measured in both models"
    interval = f"{wording.points(pair.accuracy)} points"
    if pair.accuracy_side == 0:
        return (
            f"Whether {second} is more accurate is undecided, {interval}, the interval includes 0"
        )
    word = "higher" if pair.accuracy_side > 0 else "lower"
    return f"{second[0].upper()}{second[1:]}'s accuracy is {word}, {interval}"


def _flatness_words(pair: Pair, first: str) -> str:
    if not pair.flatness:
        return "no embedded flatness measure was measured in both"
    measure = COMPARED[pair.flatness_column]
    if pair.flatness_ratio is None:
        return f"its flatness is undecided, because {measure} is not positive in every seed"
    interval = f"{measure} {wording.ratio(pair.flatness_ratio)} {first}'s"
    if pair.flatness_side == 0:
        interval += ", the interval includes 1"
    if invariant := pair.invariant_ratio:
        side = FLATNESS_WORDS[-invariant.side(1.0)]
        interval += f"; by the invariant trace: {side}, {wording.ratio(invariant)}"
    if pair.flatness_side == 0:
        return f"its flatness is undecided, {interval}"
    return f"it is {FLATNESS_WORDS[pair.flatness_side]}, {interval}"


def _relation(pair: Pair) -> str:
    if pair.relation > 0:
        return "Here the flatter model is the more accurate one."
    if pair.relation < 0:
        return "Here the flatter model is the less accurate one."
    return "Whether the flatter model is the more accurate one is undecided here."


def _count(sides: list[int], words: dict[int, str]) -> str:
    return ", ".join(f"{word} in {sides.count(side)}" for side, word in words.items())
