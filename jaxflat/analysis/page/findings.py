"""The comparison in plain words, the same words for each outcome and its opposite."""

from collections.abc import Sequence
from pathlib import Path

from jaxflat.analysis.arms import ArmComparison
from jaxflat.analysis.cells import Cell, trained_as
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import Comparison, read_comparison
from jaxflat.analysis.page import evidence, wording
from jaxflat.analysis.page.factor_words import factor_sentences
from jaxflat.analysis.page.pair_words import INTERVALS, count_matched, pair_sentence, place_words
from jaxflat.analysis.page.trajectory_words import trajectory_sentences
from jaxflat.analysis.pairs import paired_difference
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY
from jaxflat.analysis.verdicts import Verdict

MAX_LINES = 8  # of findings on the console


def console_lines(workdir: Path) -> list[str]:
    """Return a line for each verdict, the primary ones first, and for what was left out."""
    comparison = read_comparison(Path(workdir))
    verdicts = judge(comparison)
    lines = [
        f"{evidence.marked_claim(one)}: {one.answer} ({one.statistic.partition(';')[0]}: "
        f"{one.evidence})."
        for one in verdicts
        if not one.reason
    ]
    lines += evidence.verdict_sentences([one for one in verdicts if one.reason])
    lines = lines + left_out_sentences(comparison) if verdicts else describe(comparison, verdicts)
    if num_more := max(len(lines) - MAX_LINES, 0):
        place = MAX_LINES // 2  # keeps what was left out, the last line
        lines[place : place + num_more + 1] = [f"The report has {num_more + 1} more findings."]
    return lines


def summary_sentences(workdir: Path) -> list[str]:
    """Say what the sweep in `workdir` found, the answer first."""
    comparison = read_comparison(Path(workdir))
    verdicts = judge(comparison)
    others = [verdict for verdict in verdicts if not verdict.primary]
    return describe(comparison, verdicts) + evidence.verdict_sentences(others)


def describe(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[str]:
    """Say the verdicts on the primary claims, then describe arms or sizes."""
    primary = [verdict for verdict in verdicts if verdict.primary]
    sentences = evidence.verdict_sentences(primary)
    if comparison.plan.primary and not primary:
        kind = comparison.plan.primary
        sentences.append(f"This sweep has no claim of its primary kind, {kind}.")
    if comparison.arm_comparison:
        sentences += arm_sentences(comparison.arm_comparison)
        sentences += trajectory_sentences(comparison.trajectories) + lookup_sentences(comparison)
    elif comparison.trajectories:
        sentences += [*trajectory_sentences(comparison.trajectories), INTERVALS]
    else:
        sentences += sizes_sentences(comparison)
    sentences += factor_sentences(comparison)
    return sentences + left_out_sentences(comparison) + untrained_sentences(comparison)


def left_out_sentences(comparison: Comparison) -> list[str]:
    """Name the runs that no comparison uses, in one sentence if there are any."""
    left_out = ", ".join(comparison.missing)
    reason = "Left out, because the last checkpoint was not measured"
    return [f"{reason}: {left_out}."] if left_out else []


def arm_sentences(found: ArmComparison) -> list[str]:
    """Describe each arm against the baseline."""
    baseline, pairs = found.baseline.arm, found.against
    compared = f"{wording.plural(len(pairs), 'arm')} compared with {baseline}"
    sentences = [count_matched(pairs, compared)]
    sentences += [pair_sentence(pair, baseline, pair.second.arm) for pair in pairs]
    return sentences


def sizes_sentences(comparison: Comparison) -> list[str]:
    if comparison.obstacle:
        return [
            "Sizes cannot be compared at matched excess loss here: "
            f"{comparison.obstacle}. The table shows all measurements."
        ]
    pairs = comparison.pairs
    if not pairs:
        return ["No two sizes share a seed, so no pair can be compared."]
    compared = f"{wording.plural(len(pairs), 'pair')} of sizes"
    sentences = [count_matched(pairs, compared)]
    sentences += [pair_sentence(pair, "smaller", "larger") for pair in pairs]
    return sentences + lookup_sentences(comparison)


def lookup_sentences(comparison: Comparison) -> list[str]:
    """Compare probes of the exact conditionals with probes of the matched models."""
    tables = [cell for cell in comparison.lookup_tables if cell.interval(PRIMARY_ACCURACY)]
    models = [cell for cell in comparison.matched.values() if cell.interval(PRIMARY_ACCURACY)]
    if not tables or not models:
        return []

    def listed(cells: list[Cell]) -> str:
        return ", ".join(
            f"{wording.plus_minus(cell, PRIMARY_ACCURACY, '.1f', 100)}% ({cell.arm})"
            for cell in cells
        )

    losses = [cell.mean("excess_loss") for cell in models]
    return [
        f"A probe of the exact conditional probabilities reaches {listed(tables)}. Probes of the "
        f"models, read at excess losses of {min(losses):.4f} to {max(losses):.4f} nats, reach "
        f"{listed(models)}."
    ]


def untrained_sentences(comparison: Comparison) -> list[str]:
    """Say what training adds to a model's representations, one sentence per size."""
    sentences = []
    baseline = [comparison.arm_comparison.baseline] if comparison.arm_comparison else []
    for control in comparison.untrained:
        same_size = [cell for cell in baseline if cell.num_params == control.num_params]
        cells = comparison.arms.get(trained_as(control.arm), same_size)
        difference = paired_difference(control, cells[-1], PRIMARY_ACCURACY) if cells else None
        if difference:
            reached = (
                f"{wording.plus_minus(cell, PRIMARY_ACCURACY, '.1f', 100)}%"
                for cell in (cells[-1], control)
            )
            trained = wording.capitalized(place_words(cells[-1]))
            sentences.append(
                f"{trained} against the same model at initialisation: "
                f"a probe reaches {' against '.join(reached)}, difference "
                f"{wording.points(difference)} points."
            )
    return sentences
