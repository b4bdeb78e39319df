"""Does label noise cause flatness? Compare sampled labels with exact targets, the control."""

from dataclasses import replace

from jaxflat.analysis.cells import Cell, last_cell
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.flatness_columns import EMBEDDED
from jaxflat.analysis.page import wording
from jaxflat.analysis.pairs import MARGIN
from jaxflat.analysis.trajectories import change
from jaxflat.analysis.verdicts import NONE, Verdict, all_of, decide

CLAIM = (
    "At matched excess loss the trace falls under sampled labels, and its ratio, last over first "
    "checkpoint, is smaller than under exact targets"
)


def noise_verdict(comparison: Comparison) -> Verdict | None:
    """Return the verdict on CLAIM, or None if the sweep has no such control.

    Both statistics are ratios of geometric means over seeds, and both have to lie below 1. The
    first is the trace of the last checkpoint over the first one's, with sampled labels. The
    second is this ratio over the control's. The control's own ratio is not tested: its trace may
    fall too.
    """
    key = _targets_key(comparison)
    if not key:
        return None
    column, cells = _arms(comparison, key)
    if not cells:
        return Verdict(
            CLAIM, "", "", NONE, "no seed has a first and a last checkpoint in both arms"
        )
    both = change(column, *cells[2:]), change(column, *cells)
    ratios = [one.ratio for one in both]
    if None in ratios:
        return Verdict(CLAIM, "", "", NONE, f"{EMBEDDED[column]} is not positive in every seed")
    statistic = (
        f"{EMBEDDED[column]}, last over first checkpoint; then this ratio over the control's"
    )
    evidence = "; ".join(map(wording.ratio, ratios))
    if len(cells[0].rows) == 1:
        return Verdict(CLAIM, statistic, evidence, NONE, "one seed gives no interval")
    if not all(one.equal and one.equal.holds for one in both):
        why = f"the excess losses are not shown to be equal within ±{MARGIN} nats"
        return Verdict(CLAIM, statistic, evidence, NONE, why)
    answer = all_of(decide(ratio, 1.0, -1) for ratio in ratios)
    return Verdict(CLAIM, statistic, evidence, answer)


def _targets_key(comparison: Comparison) -> str:
    """Return the swept key that takes the values sampled and exact, or ""."""
    rows = [row for cell in comparison.cells for row in cell.rows.values()]
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.swept.items():
            if key.endswith(".targets"):
                values.setdefault(key, set()).add(value)
    return next((key for key, found in values.items() if {"sampled", "exact"} <= found), "")


def _arms(comparison: Comparison, key: str) -> tuple[str, list[Cell]]:
    """Return the flatness measure, and the cells of the first two arms that differ in `key` only.

    The cells are its first and last common checkpoints, the control's two before the others. All
    have the same seeds. There are no cells if no two such arms have a seed at all four.
    """
    cells = comparison.cells
    column = next((name for name in EMBEDDED if any(c.interval(name) for c in cells)), "")

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
        steps = sorted(sampled.keys() & exact.keys())
        if len(steps) < 2 or not (
            last_cell([sampled[steps[-1]]]) and last_cell([exact[steps[-1]]])
        ):
            continue
        four = [found[step] for found in (exact, sampled) for step in (steps[0], steps[-1])]
        measured = [cell.by_seed(name) for cell in four for name in (column, "excess_loss")]
        seeds = [seed for seed in four[0].rows if all(seed in values for values in measured)]
        if seeds:
            return column, [replace(cell, rows={s: cell.rows[s] for s in seeds}) for cell in four]
    return column, []
