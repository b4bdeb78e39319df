"""What a sweep found, as the few lines that the command prints."""

from collections.abc import Sequence

from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.page import evidence
from jaxflat.analysis.verdicts import Verdict

MAX_LINES = 8  # of findings on the console


def console_lines(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[str]:
    """Return a line for each verdict, the primary ones first, then one that names unused runs."""
    lines = [
        f"{evidence.marked_claim(one)}: {one.answer} ({one.statistic.removesuffix(f'; {one.over}')}"
        f": {one.evidence})."
        for one in verdicts
        if not one.reason
    ]
    lines += evidence.reason_sentences(verdicts) + left_out_sentences(comparison)
    if num_more := max(len(lines) - MAX_LINES, 0):
        place = MAX_LINES // 2  # the last line, on unused runs, stays
        lines[place : place + num_more + 1] = [f"The report has {num_more + 1} more findings."]
    return lines


def left_out_sentences(comparison: Comparison) -> list[str]:
    """Name the runs that no comparison uses, in one sentence if there are any."""
    left_out = ", ".join(comparison.missing)
    reason = "Left out, because the last checkpoint was not measured"
    return [f"{reason}: {left_out}."] if left_out else []
