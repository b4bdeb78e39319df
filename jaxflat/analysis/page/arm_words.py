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
            "Each arm and the baseline are read at the same excess losses, by interpolation "
            "between the checkpoints of each run; an arm's row shows baseline → arm. If their "
            "losses do not overlap, the last checkpoints are compared. Two one-sided tests then "
            "say whether the losses are the same. An arm whose loss is not shown to be the same is "
            "listed, but no verdict compares it with the baseline: its differences may come from "
            "the loss. All arms share a seed's start; their sentences after it may differ. "
            "Intervals are not corrected for the number of arms.",
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
    rows.append(_row(found.baseline, None, column))
    rows += [_row(pair.second, pair, column) for pair in found.against]
    rows += [_row(control, None, column) for control in controls]
    return rows


def _row(cell: Cell, pair: Pair | None, column: str) -> list[str]:
    """Describe a cell; beside a pair's second cell stand the values of the first."""

    def number(name: str, style: str = "", scale: float = 1.0) -> str:
        cells = (pair.first, cell) if pair else (cell,)
        return " → ".join(wording.plus_minus(one, name, style, scale) for one in cells)

    interpolated = pair is not None and pair.interpolated
    loss = wording.plus_minus(cell, "excess_loss", ".4f")
    return [
        *(cell.arm, f"{cell.step:,}" if cell.step else wording.MISSING),
        *(loss if interpolated else number("excess_loss", ".4f"), _same(pair), number(column)),
        wording.ratio(pair.flatness.get(column) if pair else None),
        *(number(PRIMARY_ACCURACY, ".1f", 100.0), wording.points(pair and pair.accuracy)),
    ]


def _same(pair: Pair | None) -> str:
    if pair is None:
        return wording.MISSING
    if pair.interpolated:
        return "read at the same loss"
    test = pair.equivalence
    return f"{'yes' if test.holds else 'not shown'}, p {wording.p_value(test.p)}"
