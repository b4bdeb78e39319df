"""Changes along trajectories in words and tables, the same words for a fall and a rise."""

from collections.abc import Sequence

from jaxflat.analysis.flatness_columns import COMPARED, SHARPNESS
from jaxflat.analysis.page import wording
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY
from jaxflat.analysis.statistics.intervals import Interval
from jaxflat.analysis.trajectories import Arm, Change, Trajectories

FACTOR = 2.0


def trajectory_sentences(found: Sequence[Trajectories]) -> list[str]:
    """Compare arms first, then describe each; projected checkpoints come before raw ones."""
    sentences = []
    for kind in found:
        sentences += [_contrast(kind, *contrast) for contrast in kind.contrasts]
        sentences += [_arm(kind, arm) for arm in kind.arms]
    return sentences


def trajectory_table(found: Sequence[Trajectories]) -> list[list[str]]:
    measure = (COMPARED | SHARPNESS).get(found[0].measure, "Sharpness")
    header = ["Arm", "Checkpoints", "Steps", "Excess loss (nats)", measure, f"{measure} ratio"]
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


def verdict(ratio: Interval | None) -> str:
    """Say whether a ratio falls or rises, and whether by a factor of 2, or that it is undecided."""
    if ratio is None:
        return "undecided, because it was not measured, or is not positive in every seed"
    if ratio.low is None or ratio.high is None:
        return "undecided with one seed"
    low, high = ratio.low, ratio.high
    large = high <= 1 / FACTOR or low >= FACTOR
    small = low > 1 / FACTOR and high < FACTOR
    size = "a factor of 2 is " + ("exceeded" if large else "excluded" if small else "undecided")
    way = {-1: "a fall", 1: "a rise", 0: "undecided, the interval includes 1"}[ratio.side(1.0)]
    return f"{way}; {size}"


def _contrast(kind: Trajectories, first: Arm, second: Arm, change: Change) -> str:
    return (
        f"{wording.capitalized(second.name)} against {first.name} ({_kind(kind)}): the ratio of "
        f"the {_name(kind)}, end over start, is {wording.ratio(change.ratio)} the other arm's: "
        f"{verdict(change.ratio)}. {_losses(change)}. {_others(change)}"
    )


def _losses(change: Change) -> str:
    if change.equal is None or change.equal.p is None:
        return "Whether their losses at the end are the same was not tested"
    word = "are" if change.equal.holds else "are not shown to be"
    p = wording.p_value(change.equal.p)
    ratio = f"{change.equal.margin:g}"
    return f"Their losses at the end {word} equal within a factor of {ratio} (p {p})"


def _arm(kind: Trajectories, arm: Arm) -> str:
    ends = [wording.plus_minus(cell, kind.measure) for cell in (arm.start, arm.end)]
    return (
        f"{wording.capitalized(arm.name)} ({_kind(kind)}), step {arm.start.step:,} to "
        f"{arm.end.step:,}: the {_name(kind)} goes from {ends[0]} to {ends[1]}, "
        f"{wording.ratio(arm.change.ratio)}: "
        f"{verdict(arm.change.ratio)}. {_others(arm.change)}"
    )


def _others(change: Change) -> str:
    words = f"Excess loss {wording.nats(change.excess)} nats"
    if change.accuracy is None:
        return f"{words}."
    undecided = "" if change.accuracy.side(0.0) else ", undecided"
    return f"{words}; accuracy {wording.points(change.accuracy)} points{undecided}."


def _arm_row(kind: Trajectories, arm: Arm) -> list[str]:
    def both(column: str, style: str, scale: float = 1.0) -> str:
        cells = (arm.start, arm.end)
        return " → ".join(wording.plus_minus(cell, column, style, scale) for cell in cells)

    return [
        *(arm.name, _kind(kind), f"{arm.start.step:,} → {arm.end.step:,}"),
        *(both("excess_loss", ".4f"), both(kind.measure, ""), wording.ratio(arm.change.ratio)),
        *(both(PRIMARY_ACCURACY, ".1f", 100), wording.points(arm.change.accuracy)),
    ]


def _kind(kind: Trajectories) -> str:
    return "projected" if kind.projected else "as trained"


def _name(kind: Trajectories) -> str:
    name = (COMPARED | SHARPNESS).get(kind.measure, "sharpness")
    return name if name.startswith(("invariant", "Hessian", "Fisher", "Gauss")) else name.lower()
