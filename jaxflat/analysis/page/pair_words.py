"""Pairs in plain words, the same words for each outcome and its opposite."""

from collections.abc import Sequence

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import Pair

ACCURACY_WORDS = {1: "more accurate", -1: "less accurate", 0: "undecided"}
FLATNESS_WORDS = {1: "flatter", -1: "sharper", 0: "undecided"}
INTERVALS = (
    "Brackets and ± are 95% t intervals over seeds, paired by seed for differences, and not "
    "corrected for their number."
)


def count_matched(pairs: Sequence[Pair], compared: str) -> str:
    """Count the pairs at equal loss; `compared` names the comparison ("3 pairs of sizes")."""
    if all(pair.excess.low is None for pair in pairs):
        return (
            "No pair shares more than one seed, so there are no intervals, and no pair can be "
            "called flatter or more accurate. The numbers below are single measurements."
        )
    matched = [pair for pair in pairs if pair.equivalence.holds]
    ratio = f"a factor of {pairs[0].equivalence.margin:g}"
    if not matched:
        return (
            f"Of {compared}, none has equal excess losses (within {ratio}), so this sweep "
            f"does not compare them at equal loss. {INTERVALS}"
        )
    return f"Of {compared}, {len(matched)} can be compared at equal excess loss. {INTERVALS}"


def pair_sentence(pair: Pair, first: str, second: str) -> str:
    """Describe one pair; `first` and `second` name its two models."""
    if pair.interpolated:
        return (
            f"{pair.first.arm.capitalize()} and {pair.second.arm}, both read at an excess loss of "
            f"{pair.first.mean('excess_loss'):.4f} nats. {_differences(pair, first, second)}"
        )
    names = f"{place_words(pair.first).capitalize()} and {place_words(pair.second)}"
    losses = " and ".join(f"{cell.mean('excess_loss'):.4f}" for cell in (pair.first, pair.second))
    ratio = f"ratio {wording.ratio(pair.excess_ratio)}"
    p = pair.equivalence.p
    if p is None:
        return f"{names}: excess losses {losses} nats, {ratio}; one seed allows no test."
    test = f"p {wording.p_value(p) if p < 0.001 else '= ' + wording.p_value(p)}"
    within = f"a factor of {pair.equivalence.margin:g}"
    if not pair.equivalence.holds:
        return (
            f"{names} are not matched: their excess losses are {losses} nats, "
            f"{ratio}, and are not shown to be equal within {within} ({test}). "
            "A difference in accuracy or flatness could come from the loss, so no verdict is "
            "given for this pair."
        )
    return (
        f"{names} are matched: excess losses {losses} nats, {ratio}, equal within "
        f"{within} ({test}). {_differences(pair, first, second)}"
    )


def place_words(cell: Cell) -> str:
    return f"{cell.arm} (step {cell.step:,})"


def _differences(pair: Pair, first: str, second: str) -> str:
    return f"{_accuracy_words(pair, second)}; {_flatness_words(pair, first)}."


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
    if embedded := pair.embedded_ratio:
        side = FLATNESS_WORDS[-embedded.side(1.0)]
        interval += f"; by the embedded trace: {side}, {wording.ratio(embedded)}"
    if pair.flatness_side == 0:
        return f"its flatness is undecided, {interval}"
    return f"it is {FLATNESS_WORDS[pair.flatness_side]}, {interval}"
