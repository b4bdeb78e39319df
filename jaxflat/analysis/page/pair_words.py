"""Pairs in plain words, the same words for each outcome and its opposite."""

from collections.abc import Sequence

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import Pair

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
    """Describe one pair by its numbers; `first` and `second` name its two models."""
    return f"{_losses(pair)}: {_differences(pair, first, second)}."


def place_words(cell: Cell) -> str:
    return f"{cell.arm} (step {cell.step:,})"


def _losses(pair: Pair) -> str:
    """Say where the two models are read, and whether their losses are equal."""
    if pair.interpolated:
        loss = f"{pair.first.mean('excess_loss'):.4f}"
        names = f"{wording.capitalized(pair.first.arm)} and {pair.second.arm}"
        return f"{names}, at excess loss {loss} nats"
    names = f"{wording.capitalized(place_words(pair.first))} and {place_words(pair.second)}"
    losses = " and ".join(f"{cell.mean('excess_loss'):.4f}" for cell in (pair.first, pair.second))
    p = pair.equivalence.p
    if p is None:
        test = "one seed allows no test of equal losses"
    else:
        equal = "equal" if pair.equivalence.holds else "not shown to be equal"
        test = (
            f"{equal} within a factor of {pair.equivalence.margin:g}, p {wording.p_value(p)}, "
            f"ratio {wording.ratio(pair.excess_ratio)}"
        )
    return f"{names}, at excess losses {losses} nats ({test})"


def _differences(pair: Pair, first: str, second: str) -> str:
    accuracy = "accuracy not measured in both"
    if pair.accuracy:
        accuracy = f"accuracy, {second} minus {first}, {wording.points(pair.accuracy)} points"
    if not pair.flatness:
        return f"{accuracy}; no flatness measure in both"
    measure = COMPARED[pair.flatness_column]
    flatness = f"{measure}, {second} over {first}, {wording.ratio(pair.flatness_ratio)}"
    if embedded := pair.embedded_ratio:
        flatness += f", embedded {wording.ratio(embedded)}"
    return f"{accuracy}; {flatness}"
