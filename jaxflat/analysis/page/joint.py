"""Several sweeps on one page: their verdicts side by side, and every matched pair in one figure."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxflat.analysis.comparison import Comparison, matched_pairs, read_comparison
from jaxflat.analysis.page import document, drawing, evidence, figures, wording
from jaxflat.analysis.page.evidence import Evidence
from jaxflat.analysis.page.explorer import MOST_CHARACTERS
from jaxflat.analysis.page.settings import read_provenance
from jaxflat.analysis.page.view import image, leading_picture, view_sweep
from jaxflat.analysis.pairs import Pair

Sweeps = Mapping[str, Comparison]
CAPTION = (
    "A number is a pair of models of equal {noun}. Left of 1 the model that the key names "
    "first is flatter, above 0 more accurate; of an arm alone, its last checkpoint. Pairs differ "
    "in more than flatness, so the figure only describes. Bars: 95% t intervals over seeds."
)


def read_sweeps(workdirs: Mapping[str, Path]) -> dict[str, Comparison]:
    return {name: read_comparison(workdir) for name, workdir in workdirs.items()}


def write_joint(
    sweeps: Sweeps,
    judged: Mapping[str, Evidence],
    workdirs: Mapping[str, Path],
    output: Path,
) -> Path:
    """Write output/report.html and output/figures/interventions.* from named sweeps."""
    figure = draw_pairs(sweeps)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        path = output / "figures" / f"interventions.{kind}"
        path.write_bytes(figures.render(figure, kind, transparent=False))
    shown = [
        view_sweep(
            name,
            comparison,
            judged[name],
            leading_picture(comparison, judged[name]),
            read_provenance(workdirs[name]),
            workdirs[name] / "results.csv",
            MOST_CHARACTERS // len(sweeps),
        )
        for name, comparison in sweeps.items()
    ]
    joint = {
        "answer": summary_sentence(sweeps, judged),
        "table": verdicts_table(judged),
        "picture": image(figure, "Accuracy against flatness at equal loss"),
        "caption": CAPTION.format(noun=_noun(sweeps)),
    }
    path = output / "report.html"
    path.write_text(
        document.render_page(f"jaxflat: {', '.join(sweeps)}", shown, joint), encoding="utf-8"
    )
    return path


def _noun(sweeps: Sweeps) -> str:
    """Name the losses that all sweeps compare."""
    nouns = {one.scale.noun for one in sweeps.values()}
    return nouns.pop() if len(nouns) == 1 else "loss"


def judge_sweeps(sweeps: Sweeps) -> dict[str, Evidence]:
    return {name: evidence.examine(comparison) for name, comparison in sweeps.items()}


def verdicts_table(judged: Mapping[str, Evidence]) -> list[list[str]]:
    """Return one row for each claim and each sweep that tests it, grouped by claim."""
    header = ["Claim", "Sweep", "Verdict", "Value (95% interval)", "p, corrected", "Statistic"]
    claims = dict.fromkeys(one.claim for found in judged.values() for one in found.verdicts)
    return [header] + [
        [
            evidence.marked_claim(one),
            *(name, evidence.answer_words(one), one.evidence or wording.MISSING),
            *(wording.p_value(one.p), one.statistic),
        ]
        for claim in claims
        for name, found in judged.items()
        for one in found.verdicts
        if one.claim == claim
    ]


def summary_sentence(sweeps: Sweeps, judged: Mapping[str, Evidence]) -> str:
    """Count the pairs of models at equal loss, and the answers to the sweeps' primary claims."""
    matched = [pair for one in sweeps.values() for pair in matched_pairs(one)]
    answers = [one.answer for found in judged.values() for one in found.verdicts if one.primary]
    counts = ", ".join(f"{answer} {answers.count(answer)}" for answer in dict.fromkeys(answers))
    return (
        f"Over {wording.plural(len(sweeps), 'sweep')}: "
        f"{wording.plural(len(matched), 'pair')} of models at equal {_noun(sweeps)}; "
        f"primary claims: {counts or 'none declared'}."
    )


def draw_pairs(sweeps: Sweeps) -> Figure:
    """Draw every matched pair as a number, with a key to the numbers beside the panel."""
    drawn = [
        (name, place, pair)
        for place, (name, comparison) in enumerate(sweeps.items())
        for pair in matched_pairs(comparison)
        if pair.flatness_ratio and pair.accuracy
    ]
    height = max(4.8, 0.16 * (len(drawn) + 2 * len(sweeps)))
    figure = Figure(figsize=(8.0, height), layout="constrained")
    ax = figure.subplots()
    drawing.style(ax, "Accuracy, difference (points)", "Sharpness ratio, log scale")
    ax.axhline(0, color=drawing.GREY, linewidth=0.8)
    ax.axvline(1, color=drawing.GREY, linewidth=0.8)
    spans, key = [1.0], {name: [f"\n{name}"] for name, _, _ in drawn}
    for number, (name, place, pair) in enumerate(drawn, start=1):
        key[name].append(f"{number}  {_pair_words(pair)}")
        spans += _scatter(ax, place, str(number), pair)
    drawing.log_axis(ax, spans)
    words = "\n".join(line for lines in key.values() for line in lines).strip()
    ax.text(1.03, 1, words, transform=ax.transAxes, va="top", fontsize=7, linespacing=1.5)
    return figure


def _scatter(ax: Axes, place: int, name: str, pair: Pair) -> tuple[float, float]:
    """Draw a pair with its intervals; return the ends of the sharpness ratio's interval."""
    across, up = pair.flatness_ratio, pair.accuracy
    assert across is not None
    assert up is not None
    low, high = across.low or across.mean, across.high or across.mean
    look = drawing.look(place)
    ax.errorbar(
        across.mean,
        100 * up.mean,
        xerr=[[across.mean - low], [high - across.mean]],
        yerr=100 * (up.half_width or 0.0),
        **look,
        **{"markersize": 5, "elinewidth": 0.8},
        linestyle="none",
    )
    where = {
        "xy": (across.mean, 100 * up.mean),
        "xytext": (4, 4),
        "fontsize": 8,
        "color": look["color"],
    }
    ax.annotate(name, textcoords="offset points", **where)
    return low, high


def _pair_words(pair: Pair) -> str:
    if pair.first.arm == pair.second.arm:
        return pair.second.arm
    return f"{pair.second.arm} / {pair.first.arm}"
