"""The comparison in plain words. Each outcome and its opposite are worded alike."""

from pathlib import Path

from jaxflat.analysis import evidence, wording
from jaxflat.analysis.comparison import Comparison, paired_difference, read_comparison
from jaxflat.analysis.flatness_columns import EMBEDDED
from jaxflat.analysis.pairs import MARGIN, Pair
from jaxflat.analysis.results import PRIMARY_ACCURACY, Cell, trained_as
from jaxflat.analysis.trajectory_words import trajectory_sentences

ACCURACY_WORDS = {1: "more accurate", -1: "less accurate", 0: "undecided"}
FLATNESS_WORDS = {1: "flatter", -1: "sharper", 0: "undecided"}
INTERVALS = "Brackets and ± are 95% t intervals over seeds, paired by seed for differences."
RELATION_WORDS = {1: "go together", -1: "dissociate", 0: "cannot be told"}


def summary_sentences(workdir: Path) -> list[str]:
    """What the sweep in `workdir` found, the answer first."""
    comparison = read_comparison(Path(workdir))
    return describe(comparison) + evidence.verdict_sentences(comparison)


def describe(comparison: Comparison) -> list[str]:
    arms = trajectory_sentences(comparison.trajectories)
    return ([*arms, INTERVALS] if arms else sizes_sentences(comparison)) + untrained_sentences(
        comparison
    )


def sizes_sentences(comparison: Comparison) -> list[str]:
    if comparison.obstacle:
        return [
            "Sizes cannot be compared at matched excess loss here: "
            f"{comparison.obstacle}. The table shows what was measured."
        ]
    if not comparison.pairs:
        return ["No two sizes share a seed, so no pair can be compared."]
    sentences = [headline(comparison.pairs), *map(pair_sentence, comparison.pairs)]
    return sentences + lookup_sentences(comparison)


def headline(pairs: list[Pair]) -> str:
    if all(pair.excess.low is None for pair in pairs):
        return (
            "The sizes share one seed only: no interval can be given, and no pair can be called "
            "matched, flatter or more accurate. The numbers below are single measurements."
        )
    matched = [pair for pair in pairs if pair.equivalence.holds]
    compared = f"{wording.plural(len(pairs), 'pair')} of sizes"
    if not matched:
        return (
            f"Of {compared}, none is matched in excess loss within ±{MARGIN} nats, so this sweep "
            f"does not tell whether flatness and accuracy go together at equal loss. {INTERVALS}"
        )
    return (
        f"Of {compared}, {len(matched)} {'is' if len(matched) == 1 else 'are'} matched in excess "
        f"loss within ±{MARGIN} nats. There the larger model is "
        f"{_count([pair.accuracy_side for pair in matched], ACCURACY_WORDS)}; and it is "
        f"{_count([pair.flatness_side for pair in matched], FLATNESS_WORDS)}. "
        "Flatness and accuracy go together in "
        f"{sum(pair.relation == 1 for pair in matched)}, dissociate in "
        f"{sum(pair.relation == -1 for pair in matched)}, and cannot be told in "
        f"{sum(pair.relation == 0 for pair in matched)}. {INTERVALS}"
    )


def pair_sentence(pair: Pair) -> str:
    names = f"{_name(pair.smaller).capitalize()} and {_name(pair.larger)}"
    losses = " and ".join(f"{cell.mean('excess_loss'):.4f}" for cell in (pair.smaller, pair.larger))
    difference = f"difference {wording.nats(pair.excess)}"
    p = pair.equivalence.p
    if p is None:
        return f"{names}: excess losses {losses} nats, {difference}; not testable with one seed."
    test = f"p {wording.p_value(p) if p < 0.001 else '= ' + wording.p_value(p)}"
    if not pair.equivalence.holds:
        return (
            f"{names} are not matched: their nearest excess losses are {losses} nats, "
            f"{difference}, and equivalence within ±{MARGIN} is not shown ({test}). "
            "A difference in accuracy or flatness could come from the loss, so no verdict is "
            "given for this pair."
        )
    return (
        f"{names} are matched: excess losses {losses} nats, {difference}, equivalent within "
        f"±{MARGIN} ({test}). {_accuracy_words(pair)}; {_flatness_words(pair)}. {_relation(pair)}"
    )


def lookup_sentences(comparison: Comparison) -> list[str]:
    """The exact conditionals as features, beside the matched models."""
    tables = [cell for cell in comparison.lookup_tables if cell.interval(PRIMARY_ACCURACY)]
    models = [cell for cell in comparison.matched.values() if cell.interval(PRIMARY_ACCURACY)]
    if not tables or not models:
        return []

    def listed(cells: list[Cell]) -> str:
        return ", ".join(
            f"{wording.plus_minus(cell, PRIMARY_ACCURACY, '.1f', 100)}% ({cell.variant})"
            for cell in cells
        )

    losses = [cell.mean("excess_loss") for cell in models]
    return [
        f"A probe of the exact conditional probabilities reaches {listed(tables)}; of the models "
        f"at their nearest common excess loss ({min(losses):.4f} to {max(losses):.4f} nats), "
        f"{listed(models)}."
    ]


def untrained_sentences(comparison: Comparison) -> list[str]:
    """What training adds to a model's representations, one sentence a size."""
    sentences = []
    for control in comparison.untrained:
        cells = comparison.variants.get(trained_as(control.variant), [])
        difference = paired_difference(control, cells[-1], PRIMARY_ACCURACY) if cells else None
        if difference:
            sentences.append(
                f"{_name(cells[-1]).capitalize()} against the same as it is initialised: a probe "
                f"reaches {wording.plus_minus(cells[-1], PRIMARY_ACCURACY, '.1f', 100)}% against "
                f"{wording.plus_minus(control, PRIMARY_ACCURACY, '.1f', 100)}%, difference "
                f"{wording.points(difference)} points."
            )
    return sentences


def relation_words(pair: Pair) -> str:
    """The verdict of one pair in a word or two."""
    return RELATION_WORDS[pair.relation] if pair.equivalence.holds else "not matched"


def _accuracy_words(pair: Pair) -> str:
    if pair.accuracy is None:
        return "Accuracy was not measured in both"
    interval = f"{wording.points(pair.accuracy)} points"
    if pair.accuracy_side == 0:
        return f"The accuracy difference is undecided, {interval}, the interval includes 0"
    word = "higher" if pair.accuracy_side > 0 else "lower"
    return f"The larger model's accuracy is {word}, {interval}"


def _flatness_words(pair: Pair) -> str:
    if not pair.flatness:
        return "no flatness was measured in both in the common parametrisation"
    measure = EMBEDDED[next(iter(pair.flatness))]
    if pair.trace_ratio is None:
        return f"its flatness is undecided, as {measure} is not positive in every seed"
    interval = f"{measure} {wording.ratio(pair.trace_ratio)} the smaller's"
    if pair.flatness_side == 0:
        return f"its flatness is undecided, {interval}, the interval includes 1"
    return f"it is {FLATNESS_WORDS[pair.flatness_side]}, {interval}"


def _relation(pair: Pair) -> str:
    if pair.relation > 0:
        return "Here the flatter model is the more accurate one: flatness and accuracy go together."
    if pair.relation < 0:
        return "Here the flatter model is the less accurate one: flatness and accuracy dissociate."
    return "Whether flatness and accuracy go together cannot be told from this pair."


def _count(sides: list[int], words: dict[int, str]) -> str:
    return ", ".join(f"{word} in {sides.count(side)}" for side, word in words.items())


def _name(cell: Cell) -> str:
    return f"{cell.variant} (step {cell.step:,})"
