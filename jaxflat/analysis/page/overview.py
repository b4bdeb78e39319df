"""The small table: a row an arm, beside the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxflat.analysis.cells import Cell, last_cell
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.effects import common_column
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import Pair
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY


@dataclass(frozen=True)
class Overview:
    """The header, a row for each arm and control, and the arm with which the others compare.

    read: the sentence that says at which losses or checkpoints the arms' numbers are.
    """

    header: list[str]
    rows: list[list[str]]
    baseline: str
    read: str


def overview(comparison: Comparison) -> Overview | None:
    """Return the table; None if no arm and no control has results."""
    cells = [
        comparison.matched.get(arm) or last_cell(cells) or cells[-1]
        for arm, cells in comparison.arms.items()
    ]
    shown = cells + comparison.controls
    if not shown:
        return None
    found = comparison.arm_comparison
    baseline = found.baseline.arm if found else shown[0].arm
    column = common_column(comparison.cells)
    measure = COMPARED.get(column, "")
    measure = wording.capitalized(measure)
    label = comparison.scale.label
    header = ["Arm", "Seeds", label, *([measure] if measure else []), "Accuracy (%)"]
    pairs = _pairs_with(comparison, baseline)
    if pairs:
        header += ["Accuracy difference (points)", *([f"{measure} ratio"] if measure else [])]
        header.append("Same loss?")
    rows = [_row(cell, pairs, column, comparison.scale.column) for cell in shown]
    return Overview(
        header,
        [row[: len(header)] for row in rows],
        baseline if pairs else "",
        _where_read(comparison, cells),
    )


def _where_read(comparison: Comparison, cells: Sequence[Cell]) -> str:
    """Say whether each arm is read between its checkpoints or at one of them."""
    places: dict[str, list[str]] = {}
    for cell in cells:
        is_checkpoint = any(cell is one for one in comparison.arms[cell.arm])
        losses = comparison.scale.nouns
        between = f"between checkpoints, at the {losses} at which it is compared"
        place = f"at step {cell.step:,}" if is_checkpoint else between
        places.setdefault(place, []).append(cell.arm)
    if len(places) == 1:
        return f"Each arm is read {next(iter(places))}."
    return " ".join(f"Read {place}: {', '.join(arms)}." for place, arms in places.items())


def _row(cell: Cell, pairs: dict[str, Pair], column: str, loss: str) -> list[str]:
    pair = pairs.get(cell.arm)
    ratio = pair.flatness.get(column) if pair else None
    return [
        *(cell.arm, str(len(cell.rows)), wording.plus_minus(cell, loss, ".4f")),
        *([wording.plus_minus(cell, column)] if column else []),
        *(
            wording.plus_minus(cell, PRIMARY_ACCURACY, ".1f", 100.0),
            wording.points(pair and pair.accuracy),
        ),
        *([wording.ratio(ratio)] if column else []),
        same_loss(pair),
    ]


def same_loss(pair: Pair | None) -> str:
    """Say whether the losses of a pair are the same, and how that is known."""
    if pair is None:
        return wording.MISSING
    if pair.is_read_at_one_loss:
        return "read at the same loss"
    test = pair.equivalence
    return f"{'yes' if test.holds else 'not shown'}, p {wording.p_value(test.p)}"


def _pairs_with(comparison: Comparison, baseline: str) -> dict[str, Pair]:
    """Return the pair of the baseline with each arm that has one, by the arm's name."""
    pairs: Sequence[Pair] = [
        *comparison.pairs,
        *(pair for found in comparison.settings for pair in found.pairs),
    ]
    return {pair.second.arm: pair for pair in pairs if pair.first.arm == baseline}
