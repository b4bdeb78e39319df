"""Does flatness come from label noise? Sampled labels against the control of exact targets."""

from dataclasses import dataclass

import numpy as np

from jaxflat.analysis import wording
from jaxflat.analysis.cells import Cell
from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.flatness_columns import EMBEDDED
from jaxflat.analysis.pairs import MARGIN
from jaxflat.analysis.results import Row
from jaxflat.analysis.statistics import log_ratio_interval, tost_paired
from jaxflat.analysis.verdicts import NONE, Verdict, all_of, decide

CLAIM = "At matched excess loss the trace falls under sampled labels and not so under exact targets"


@dataclass(frozen=True)
class Arms:
    """The first and last checkpoints of both arms, one row a seed."""

    start: list[Row]
    end: list[Row]
    control_start: list[Row]
    control_end: list[Row]

    def values(self, column: str) -> list[list[float]]:
        arms = (self.start, self.end, self.control_start, self.control_end)
        return [[row.values[column] for row in rows] for rows in arms]


def noise_verdict(comparison: Comparison) -> Verdict | None:
    """None where the sweep has no such control.

    Two statistics, each a ratio of geometric means over seeds: the trace at the end over that at
    the start, with sampled labels; and this ratio over that of the control. Both have to lie
    below 1.
    """
    key = _targets_key(comparison)
    if not key:
        return None
    column, arms = _arms(comparison, key)
    if arms is None:
        return Verdict(CLAIM, "", "", NONE, "the arms share no seed with two common checkpoints")
    start, end, control_start, control_end = arms.values(column)
    losses = arms.values("excess_loss")
    if min(*start, *end, *control_start, *control_end) <= 0:
        return Verdict(CLAIM, "", "", NONE, f"{EMBEDDED[column]} is not positive everywhere")
    matched = [tost_paired(losses[1], other, MARGIN) for other in (losses[0], losses[3])]
    change = log_ratio_interval(start, end)
    control = np.divide(control_end, control_start)
    contrast = log_ratio_interval(control.tolist(), np.divide(end, start).tolist())
    statistic = f"{EMBEDDED[column]}, last over first checkpoint; and this over the control's"
    evidence = f"{wording.ratio(change)}; {wording.ratio(contrast)}"
    if any(test.p is None for test in matched):
        return Verdict(CLAIM, statistic, evidence, NONE, "one seed gives no interval")
    if not all(test.holds for test in matched):
        why = f"the excess losses are not shown to be equal within ±{MARGIN} nats"
        return Verdict(CLAIM, statistic, evidence, NONE, why)
    answer = all_of(decide(ratio, 1.0, -1) for ratio in (change, contrast))
    return Verdict(CLAIM, statistic, evidence, answer)


def _targets_key(comparison: Comparison) -> str:
    """The swept key that tells sampled from exact targets, if there is one."""
    rows = [row for cell in comparison.cells for row in cell.rows.values()]
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.swept.items():
            if key.endswith(".targets"):
                values.setdefault(key, set()).add(value)
    return next((key for key, found in values.items() if {"sampled", "exact"} <= found), "")


def _arms(comparison: Comparison, key: str) -> tuple[str, Arms | None]:
    """Of the first setting that was trained both ways: its first and last common checkpoints."""
    cells = comparison.cells
    column = next((name for name in EMBEDDED if any(c.interval(name) for c in cells)), "")
    needed = (column, "excess_loss")

    def setting(cell: Cell) -> tuple[tuple[str, str], ...]:
        swept = next(iter(cell.rows.values())).swept
        return tuple((name, value) for name, value in swept.items() if name != key)

    def arm(targets: str, like: Cell) -> dict[int, Cell]:
        return {
            cell.step: cell
            for cell in cells
            if setting(cell) == setting(like)
            and next(iter(cell.rows.values())).swept[key] == targets
        }

    for like in cells:
        sampled, exact = arm("sampled", like), arm("exact", like)
        steps = sorted(sampled.keys() & exact.keys())
        if len(steps) < 2:
            continue
        four = [sampled[steps[0]], sampled[steps[-1]], exact[steps[0]], exact[steps[-1]]]
        seeds = [s for s in four[0].rows if all(_has(cell, s, needed) for cell in four)]
        if seeds:
            return column, Arms(*([cell.rows[seed] for seed in seeds] for cell in four))
    return column, None


def _has(cell: Cell, seed: str, columns: tuple[str, ...]) -> bool:
    return seed in cell.rows and all(name in cell.rows[seed].values for name in columns)
