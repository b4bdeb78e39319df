"""Changes along trajectories, as a table."""

from collections.abc import Sequence

from jaxflat.analysis.flatness_columns import COMPARED, SHARPNESS
from jaxflat.analysis.page import wording
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY
from jaxflat.analysis.trajectories import Arm, Trajectories


def trajectory_table(found: Sequence[Trajectories]) -> list[list[str]]:
    measure = (COMPARED | SHARPNESS).get(found[0].measure, "Sharpness")
    label = found[0].arms[0].end.scale.label
    header = ["Arm", "Checkpoints", "Steps", label, measure, f"{measure} ratio"]
    rows = [[*header, "Accuracy (%)", "Accuracy change (points)"]]
    for kind in found:
        rows += [_arm_row(kind, arm) for arm in kind.arms]
        rows += [
            [
                *(f"{second.name} against {first.name}", _kind(kind), ""),
                *(wording.nats(change.excess), "", wording.ratio(change.ratio)),
                *("", wording.points(change.accuracy)),
            ]
            for first, second, change in kind.contrasts
        ]
    return rows


def _arm_row(kind: Trajectories, arm: Arm) -> list[str]:
    def both(column: str, style: str, scale: float = 1.0) -> str:
        cells = (arm.start, arm.end)
        return " → ".join(wording.plus_minus(cell, column, style, scale) for cell in cells)

    return [
        *(arm.name, _kind(kind), f"{arm.start.step:,} → {arm.end.step:,}"),
        *(
            both(arm.end.scale.column, ".4f"),
            both(kind.measure, ""),
            wording.ratio(arm.change.ratio),
        ),
        *(both(PRIMARY_ACCURACY, ".1f", 100), wording.points(arm.change.accuracy)),
    ]


def _kind(kind: Trajectories) -> str:
    return "projected" if kind.projected else "as trained"
