"""Compare the models of a sweep at equal excess losses: sizes, or arms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby, product
from pathlib import Path

import numpy as np

from jaxflat.analysis import results_csv
from jaxflat.analysis.arms import ArmComparison, compare_arms
from jaxflat.analysis.cells import Cell, group_cells, last_cell, naming_keys
from jaxflat.analysis.equal_loss import at_equal_loss
from jaxflat.analysis.loss_scale import LossScale, loss_scale
from jaxflat.analysis.pairs import Pair, compare_pair, pair_at_equal_loss, paired_values
from jaxflat.analysis.plan import UNDECLARED, Plan, read_plan
from jaxflat.analysis.results_csv import Row
from jaxflat.analysis.trajectories import Trajectories, find_trajectories

OF_TRAINING = (
    "phase_order",
    "phases.",
    "training.",
)  # prefixes of keys that decide how a model of given size is trained


@dataclass(frozen=True)
class Comparison:
    """The comparisons that a sweep's results allow.

    `pairs` compares sizes that are trained in the same way, and `settings` compares, for each size,
    the ways in which it is trained. `varied` names the swept keys that distinguish arms.
    `arm_comparison` is set if all models have one size and differ only in training.
    `obstacle` says why sizes were not compared, "" if they were. `missing` names the arms
    that are not compared because their last checkpoint was not measured.
    """

    plan: Plan
    arms: dict[str, list[Cell]]
    varied: list[str]
    settings: list[ArmComparison]
    lookup_tables: list[Cell]
    untrained: list[Cell]
    pairs: list[Pair]
    matched: dict[str, Cell]
    primary_columns: list[str]
    primary_labeling: str
    obstacle: str = ""
    projected: bool = False
    trajectories: list[Trajectories] = field(default_factory=list)
    arm_comparison: ArmComparison | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def cells(self) -> list[Cell]:
        return [cell for cells in self.arms.values() for cell in cells]

    @property
    def scale(self) -> LossScale:
        """The scale on which losses are compared."""
        return loss_scale(row for cell in self.cells for row in cell.rows.values())

    @property
    def controls(self) -> list[Cell]:
        """Models at initialisation, and lookup tables: no training produced them."""
        return self.untrained + self.lookup_tables


def read_comparison(workdir: Path) -> Comparison:
    """Read the table and the plan of a sweep, and compare its models."""
    rows = results_csv.read_results(results_csv.table_path(workdir))
    return compare(rows, read_plan(workdir))


def compare(rows: Sequence[Row], plan: Plan = UNDECLARED) -> Comparison:
    """Group the rows, read the models at equal excess losses, then compare their measurements.

    If some checkpoints were projected, only those are compared: the others
    may retain the noise of their phase.
    """
    rows = results_csv.independent_rows(rows)
    results_csv.add_task_means(rows, plan)
    trained = [row for row in rows if not row.is_control]
    scale = loss_scale(trained)
    margin = scale.margin(plan)
    trained = [row for row in trained if scale.column in row.values]
    trajectories = find_trajectories(trained, margin)
    projected = any(row.projected for row in trained)
    trained = [row for row in trained if row.projected == projected]
    tables = group_cells([row for row in rows if row.is_lookup_table])
    untrained = group_cells([row for row in rows if row.is_untrained], trained)
    arms = group_cells(trained)
    labeling = results_csv.primary_labeling(rows, plan)
    primary_columns = results_csv.accuracy_columns(rows, labeling, plan)
    settings = [
        found
        for _, same_size in groupby(arms.items(), key=lambda arm: arm[1][0].num_params)
        if (found := compare_arms(dict(same_size), primary_columns, margin))
    ]
    varied = naming_keys(trained)
    one_size = len({row.values.get("num_params") for row in trained}) == 1
    differ_in_training = all(key.startswith(OF_TRAINING) for key in varied)
    arm_comparison = settings[0] if settings and one_size and differ_in_training else None
    pairs = _pairs(arms, primary_columns, margin)
    obstacle = "" if pairs else _obstacle(trained)
    fallback = arm_comparison.matched if arm_comparison else match_all(arms) if pairs else {}
    return Comparison(
        plan=plan,
        arms=arms,
        varied=varied,
        settings=settings,
        lookup_tables=[cells[0] for cells in tables.values()],
        untrained=[cells[0] for cells in untrained.values()],
        pairs=pairs,
        matched=_read_together(arms) or fallback if fallback else {},
        primary_columns=primary_columns,
        primary_labeling=labeling,
        obstacle=obstacle,
        projected=projected,
        trajectories=trajectories,
        arm_comparison=arm_comparison,
        missing=[
            name for name, cells in arms.items() if differ_in_training and not last_cell(cells)
        ],
    )


def matched_pairs(comparison: Comparison) -> list[Pair]:
    """Return a sweep's matched pairs: of sizes, of arms, or of a trajectory's two ends."""
    pairs: list[Pair | None] = [*comparison.pairs]
    if comparison.arm_comparison:
        pairs += comparison.arm_comparison.pairs
    else:
        columns, margin = comparison.primary_columns, comparison.scale.margin(comparison.plan)
        arms = [arm for found in comparison.trajectories[:1] for arm in found.arms]
        pairs += [compare_pair(arm.start, arm.end, columns, margin) for arm in arms]
    return [pair for pair in pairs if pair and pair.equivalence.holds]


def match_cells(smaller: Iterable[Cell], larger: Iterable[Cell]) -> tuple[Cell, Cell] | None:
    """Return the two cells nearest in mean loss over shared seeds; ignore other columns."""

    def distance(cells: tuple[Cell, Cell]) -> float:
        first, second = paired_values(*cells, cells[0].scale.column)
        return abs(float(np.mean(np.subtract(second, first))))

    candidates = [
        (first, second)
        for first, second in product(smaller, larger)
        if paired_values(first, second, first.scale.column)[0]
    ]
    return min(candidates, key=distance, default=None)


def _read_together(arms: dict[str, list[Cell]]) -> dict[str, Cell]:
    """Return one cell per arm, all read at the same losses; none if the losses do not overlap."""
    read = at_equal_loss(list(arms.values()))
    return dict(zip(arms, read, strict=True)) if read else {}


def match_all(arms: dict[str, list[Cell]]) -> dict[str, Cell]:
    """Return one cell per size, nearest to a common loss chosen so that the losses differ least."""

    def loss(cell: Cell) -> float:
        return cell.mean(cell.scale.column)

    def nearest(reference: Cell) -> dict[str, Cell]:
        target = loss(reference)
        return {
            name: min(cells, key=lambda cell: abs(loss(cell) - target))
            for name, cells in arms.items()
        }

    def spread(chosen: dict[str, Cell]) -> float:
        losses = [loss(cell) for cell in chosen.values()]
        return max(losses) - min(losses)

    return min((nearest(cell) for cells in arms.values() for cell in cells), key=spread)


def _pairs(arms: dict[str, list[Cell]], primary_columns: list[str], margin: float) -> list[Pair]:
    """Compare each two sizes that are trained in the same way."""

    def treatment(cells: list[Cell]) -> dict[str, str]:
        swept = next(iter(cells[0].rows.values())).swept
        return {key: text for key, text in swept.items() if not _is_of_size(key)}

    pairs = []
    for smaller, larger in combinations(arms.values(), 2):
        sizes = {smaller[0].num_params, larger[0].num_params}
        known = np.isfinite(sum(sizes))
        if len(sizes) == 1 or not known or treatment(smaller) != treatment(larger):
            continue
        pair = pair_at_equal_loss(smaller, larger, primary_columns, margin)
        if pair is None and (cells := match_cells(smaller, larger)):
            candidates = len(smaller) * len(larger)
            pair = compare_pair(*cells, primary_columns, margin, candidates=candidates)
        pairs.append(pair)
    return [pair for pair in pairs if pair]


def _is_of_size(key: str) -> bool:
    """Return True for keys in which two sizes may differ: the model's, and numbers of steps."""
    others = ("model.name", "model.tied_decoder", "model.cls", "model.features")
    return key.endswith("steps") or (key.startswith("model.") and key not in others)


def _obstacle(trained: Sequence[Row]) -> str:
    """Say why no sizes were compared."""
    sizes = {row.values.get("num_params") for row in trained}
    if not trained:
        return "no trained model has results"
    if len(sizes) < 2 or None in sizes:
        return "the results hold models of one size only"
    others = {
        key
        for row in trained
        for key, text in row.swept.items()
        if text != trained[0].swept.get(key, "") and not _is_of_size(key)
    }
    if others:
        return f"models of different sizes differ in {min(others)} too"
    return "no two sizes share a seed"
