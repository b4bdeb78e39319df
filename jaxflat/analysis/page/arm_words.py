"""The table of arms, as the paper's table of algorithms: each arm and its results."""

from collections.abc import Sequence

from jaxflat.analysis.arms import ArmComparison
from jaxflat.analysis.cells import Cell
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import html, tables, wording
from jaxflat.analysis.pairs import Pair
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY

Table = list[list[str]]


def arms_section(found: ArmComparison, controls: Sequence[Cell]) -> list[str]:
    """Return the part of the page about arms."""
    return [
        html.heading("Arms"),
        html.paragraph(
            "Mean ± half-width of the 95% t interval over seeds. The baseline is the sweep's first "
            f"arm, {found.baseline.arm}; the others are compared with it, paired by seed. "
            "Each arm is read at the baseline's excess losses, by interpolation between the "
            "checkpoints of each run. If an arm's losses do not overlap with the baseline's, its "
            "last checkpoint is compared. Two one-sided tests then say whether the losses are the "
            "same. An arm whose loss is not shown to be the same is listed, but no verdict "
            "compares it with the baseline: its differences may come from the loss. All arms share "
            "a seed's start; their sentences after it may differ. Intervals are not corrected for "
            "the number of arms.",
            "note",
        ),
        html.table(arms_table(found, controls)),
        html.details(
            "All pairs",
            html.table(tables.pairs_table(found.pairs)),
        ),
    ]


def arms_table(found: ArmComparison, controls: Sequence[Cell]) -> Table:
    """Return rows for the baseline, each other arm against it, and the untrained controls."""
    column = next((pair.flatness_column for pair in found.against if pair.flatness), "")
    measure = COMPARED.get(column, "Sharpness")
    header = ["Training", "Step", "Excess loss (nats)", "Same loss?", measure, "Ratio"]
    rows = [[*header, "Accuracy (%)", "Difference (points)"]]
    pairs: list[tuple[Cell, Pair | None]] = [(found.baseline, None)]
    pairs += [(pair.second, pair) for pair in found.against]
    pairs += [(control, None) for control in controls]
    for cell, pair in pairs:
        numbers = [
            wording.plus_minus(cell, name, style, scale)
            for name, style, scale in (
                ("excess_loss", ".4f", 1.0),
                (column, "", 1.0),
                (PRIMARY_ACCURACY, ".1f", 100.0),
            )
        ]
        rows.append(
            [
                *(cell.arm, f"{cell.step:,}" if cell.step else wording.MISSING),
                *(numbers[0], _same(pair), numbers[1]),
                wording.ratio(pair.flatness.get(column) if pair else None),
                *(numbers[2], wording.points(pair and pair.accuracy)),
            ]
        )
    return rows


def _same(pair: Pair | None) -> str:
    if pair is None:
        return wording.MISSING
    if pair.interpolated:
        return "read at the same loss"
    test = pair.equivalence
    return f"{'yes' if test.holds else 'not shown'}, p {wording.p_value(test.p)}"
