"""Does label noise cause flatness? Compare sampled labels with exact targets, the control."""

from collections.abc import Sequence
from dataclasses import replace

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.effects import common_column
from jaxflat.analysis.flatness_columns import COMPARED
from jaxflat.analysis.page import wording
from jaxflat.analysis.statistics.intervals import Interval
from jaxflat.analysis.trajectories import change
from jaxflat.analysis.verdicts import LABEL_NOISE, ClaimTest

LOSS = "excess_loss"
CLAIM = (
    "At equal excess loss the trace falls under sampled labels, and its ratio, last over first "
    "checkpoint, is smaller than under exact targets"
)


def label_noise_test(comparison: Comparison) -> ClaimTest | None:
    """Return the test of CLAIM, or None if the sweep has no such control or did not project.

    Without a projection, noise of the last steps may look like drift.
    Both statistics are ratios of geometric means over seeds, and both have to lie below 1. The
    first is the trace of the last checkpoint over the first one's, with sampled labels. The
    second is this ratio over the control's. The control's own ratio is not tested: its trace may
    fall too. Losses that are equal within the margin still differ, and a trace may follow them. So
    both statistics are also tested for the trace divided by the excess loss. If at equal loss there
    is no fall, and the trace follows loss^k with 0 <= k <= 1, one of the two ways shows none.
    If all lie below 1, p is the largest of the four (Berger 1982, Technometrics 24:295).
    Otherwise the claim is contradicted if a statistic lies above 1 in both ways. The p of such a
    statistic is its larger one, and the claim's is twice the smallest of these.
    """
    projected = any(row.projected for cell in comparison.cells for row in cell.rows.values())
    if not (projected and targets_key(comparison)):
        return None
    column, cells = control_and_noise(comparison)
    if not cells:
        why = "no seed has a first and a last checkpoint in both arms"
        return ClaimTest(CLAIM, LABEL_NOISE, reason=why)
    loss_ratio = comparison.plan.loss_ratio
    control = change(column, loss_ratio, *cells[:2])
    both = change(column, loss_ratio, *cells[2:]), change(column, loss_ratio, *cells)
    ratios = [one.ratio for one in both if one.ratio]
    if len(ratios) < 2:
        why = f"{COMPARED[column]} is not positive in every seed"
        return ClaimTest(CLAIM, LABEL_NOISE, reason=why)
    over = "then this ratio over the control's"
    statistic = f"{COMPARED[column]}, last over first checkpoint; {over}"
    evidence = "; ".join(map(wording.ratio, ratios))
    side, p, reason = -1, None, ""
    if len(cells[0].rows) == 1:
        reason = "one seed gives no interval"
    elif not all(one.equal and one.equal.holds for one in (control, *both)):
        reason = f"the excess losses are not shown to be equal within a factor of {loss_ratio:g}"
    else:
        per_loss = [_per_loss(cell, column) for cell in cells]
        scaled = [change(column, loss_ratio, *own).ratio for own in (per_loss[2:], per_loss)]
        side, p = _both_below_one(
            [[one for one in ways if one] for ways in zip(ratios, scaled, strict=True)]
        )
    return ClaimTest(CLAIM, LABEL_NOISE, statistic, evidence, side, p, reason=reason, over=over)


def _per_loss(cell: Cell, column: str) -> Cell:
    """Return the cell with the trace divided by the excess loss, which is positive."""
    rows = {
        seed: replace(row, values=row.values | {column: row.values[column] / row.values[LOSS]})
        for seed, row in cell.rows.items()
    }
    return replace(cell, rows=rows)


def _both_below_one(statistics: Sequence[Sequence[Interval]]) -> tuple[int, float]:
    """Return the claimed side and p of statistics that are each tested in several ways."""
    p_values = [max(one.p_ratio() or 0.0 for one in ways) for ways in statistics]
    means = [[one.mean for one in ways] for ways in statistics]
    above = [p for p, ways in zip(p_values, means, strict=True) if min(ways) > 1]
    if above:
        return -1, min(1.0, 2 * min(above))
    return 1, max(p_values) if max(map(max, means)) < 1 else 1.0


def targets_key(comparison: Comparison) -> str:
    """Return the swept key that takes the values sampled and exact, or ""."""
    rows = [row for cell in comparison.cells for row in cell.rows.values()]
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.swept.items():
            if key.endswith(".targets"):
                values.setdefault(key, set()).add(value)
    return next((key for key, found in values.items() if {"sampled", "exact"} <= found), "")


def control_and_noise(comparison: Comparison) -> tuple[str, list[Cell]]:
    """Return the flatness measure, and the cells of the first two arms that differ in targets only.

    The cells are the first and last of the checkpoints that most seeds share, the control's two
    before the others. All have the same seeds. There are no cells if no two such arms have a seed
    at all four.
    """
    key, cells = targets_key(comparison), comparison.cells
    column = common_column(cells)

    def other_keys(cell: Cell) -> tuple[tuple[str, str], ...]:
        swept = next(iter(cell.rows.values())).swept
        return tuple((name, value) for name, value in swept.items() if name != key)

    def arm(targets: str, like: Cell) -> dict[int, Cell]:
        return {
            cell.step: cell
            for cell in cells
            if other_keys(cell) == other_keys(like)
            and next(iter(cell.rows.values())).swept[key] == targets
        }

    for like in cells:
        sampled, exact = arm("sampled", like), arm("exact", like)
        counts = {
            step: len(sampled[step].rows.keys() & exact[step].rows.keys())
            for step in sampled.keys() & exact.keys()
        }
        steps = sorted(step for step, count in counts.items() if count == max(counts.values()))
        if len(steps) < 2 or not (_ends(sampled[steps[-1]]) and _ends(exact[steps[-1]])):
            continue
        four = [found[step] for found in (exact, sampled) for step in (steps[0], steps[-1])]
        measured = [cell.by_seed(name) for cell in four for name in (column, LOSS)]
        seeds = [seed for seed in four[0].rows if all(seed in values for values in measured)]
        if seeds:
            return column, [replace(cell, rows={s: cell.rows[s] for s in seeds}) for cell in four]
    return column, []


def _ends(cell: Cell) -> bool:
    """Return True if a run ends at this cell; one of another seed may have a later checkpoint."""
    return any(row.last for row in cell.rows.values())
