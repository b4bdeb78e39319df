"""report.html: the question, the answer, the evidence, and how it was made, in one file."""

import json
from pathlib import Path

from jaxflat.analysis import evidence, figures, findings, page, tables
from jaxflat.analysis.algorithm_words import algorithms_section
from jaxflat.analysis.comparison import Comparison, read_comparison
from jaxflat.analysis.evidence import Evidence
from jaxflat.analysis.flatness_columns import PARAMETRISATION
from jaxflat.analysis.pairs import MARGIN
from jaxflat.analysis.provenance import Provenance, read_provenance
from jaxflat.analysis.trajectory_words import trajectory_section

QUESTION = (
    "Among language models of equal pre-training loss, do flatness and downstream accuracy go "
    "together?"
)
PAPER = (
    "Liu, Xie, Li and Ma, Same Pre-training Loss, Better Downstream: Implicit Bias Matters for "
    "Language Models, ICML 2023"
)
BIBTEX = """@inproceedings{liu2023same,
  title     = {Same Pre-training Loss, Better Downstream:
               Implicit Bias Matters for Language Models},
  author    = {Liu, Hong and Xie, Sang Michael and Li, Zhiyuan and Ma, Tengyu},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  note      = {arXiv:2210.14199}
}
@software{jaxflat,
  title = {jaxflat: why do language models with the same pre-training loss transfer differently?},
  note  = {An instrument in JAX}
}"""


def write_report(workdir: Path) -> Path:
    """Write workdir/report.html and workdir/figures/ from the files of the sweep."""
    workdir = Path(workdir)
    comparison = read_comparison(workdir)
    figures.save_figures(comparison, workdir / "figures")
    title = f"jaxflat: {workdir.resolve().name}"
    body = [
        page.heading(title, 1),
        page.paragraph(QUESTION, "question"),
        *sweep_sections(comparison, evidence.examine(comparison), read_provenance(workdir)),
        *closing_sections(),
    ]
    path = workdir / "report.html"
    path.write_text(page.page(title, body), encoding="utf-8")
    return path


def sweep_sections(comparison: Comparison, judged: Evidence, made: Provenance) -> list[str]:
    """What one sweep found, what it rests on, and how it was made."""
    return [
        *_found(comparison),
        *evidence.verdicts_section(judged.verdicts),
        *_figures(comparison),
        *_pairs(comparison),
        *trajectory_section(comparison.trajectories),
        *evidence.correlations_section(judged.correlations),
        *_results(comparison),
        *_unfinished(made),
        *_made(made),
    ]


def closing_sections() -> list[str]:
    """How to read the page, and how to cite."""
    return [*_reading(), *_citing()]


def _found(comparison: Comparison) -> list[str]:
    first, *rest = findings.describe(comparison)
    return [page.heading("What was found"), page.paragraph(first, "lead"), page.bullets(rest)]


def _figures(comparison: Comparison) -> list[str]:
    def svg(title: str, panel: figures.Panel) -> bytes:
        return figures.render(figures.draw([(title, panel)], comparison), "svg", transparent=True)

    return [
        page.figure([(title, svg(title, panel)) for title, panel in plate.panels], plate.caption)
        for plate in figures.plates(comparison)
    ]


def _pairs(comparison: Comparison) -> list[str]:
    if comparison.algorithms:
        return algorithms_section(comparison.algorithms, comparison.controls)
    if not comparison.pairs:
        return []
    count = sum(len(pair.secondary) for pair in comparison.pairs)
    primary = ", ".join(comparison.primary_columns) or "not measured in this sweep"
    return [
        page.heading("Pairs of sizes, nearest in excess loss"),
        page.paragraph(
            "For each pair of sizes, the two checkpoints nearest in mean excess loss; accuracy and "
            f"traces play no part in the choice. Main margin ±{MARGIN} nats, with half and double "
            "it for sensitivity. The pair is chosen and tested on the same losses, so every p is "
            "multiplied by the number of candidate pairs (Bonferroni). "
            "Differences are larger minus smaller, ratios larger over smaller. Flatter and sharper "
            "are by the embedded measures, in one parametrisation, which is a choice. "
            "Scatter from examples: the share, at most, that test sentences and draws of the "
            "probe's training sets have in the variance of the accuracy difference over seeds; the "
            "rest is the seeds'.",
            "note",
        ),
        page.table(tables.pairs_table(comparison.pairs, "Larger model")),
        page.paragraph(
            "Primary endpoint, fixed beforehand: linear-probe accuracy, map labels (the most "
            "probable latent given the sentence), largest number of shots, mean over tasks: "
            f"{primary}. Intervals of different pairs are not corrected for one another.",
            "note",
        ),
        page.details(
            f"Secondary endpoints: {count} intervals, not corrected for their number",
            page.table(tables.secondary_table(comparison.pairs)),
        ),
    ]


def _results(comparison: Comparison) -> list[str]:
    cells = comparison.cells + comparison.controls
    if not cells:
        return [page.heading("Results"), page.paragraph("No point has results yet.")]
    kind = "annealed off their trunk (projected)" if comparison.projected else "as trained"
    return [
        page.heading("Results"),
        page.paragraph(
            f"Mean ± half-width of the 95% t interval over seeds. Checkpoints {kind}. Embedded: in "
            "one parametrisation, which is a choice. Accuracy: "
            "linear probe, largest number of shots, mean over tasks. The ceiling of map labels is "
            "100% by construction; that of latent labels is the mean largest posterior.",
            "note",
        ),
        page.table(tables.results_table(comparison)),
        page.details(
            "Every task, labeling and number of shots",
            page.table(tables.endpoints_table(comparison)),
        ),
    ]


def _unfinished(made: Provenance) -> list[str]:
    if not made.unfinished:
        return []
    rows = [["Point", "State"], *([name, text] for name, text in made.unfinished.items())]
    title = f"Points that did not finish: {len(made.unfinished)} of {made.num_points}"
    return [page.heading(title), page.table(rows)]


def _made(made: Provenance) -> list[str]:
    rows = [["", ""], *([name, "; ".join(texts)] for name, texts in made.facts.items() if texts)]
    if made.seconds:
        spent = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in made.seconds.items())
        rows.append(["Time, all points", spent])
    parts = []
    if len(rows) > 1:
        parts.append(page.table(rows))
    if made.config:
        text = json.dumps(made.config, indent=2)
        parts.append(page.details(f"Configuration of {made.config_point}", page.code(text)))
        parts.append(page.paragraph("What differs between points is in sweep.json.", "note"))
    return [page.heading("How it was made"), *parts] if parts else []


def _reading() -> list[str]:
    return [
        page.heading("How to read the error bars"),
        page.paragraph(
            "Excess loss is the mean divergence of the model from the language's exact "
            "conditionals, in nats, so 0 is the optimum. An error bar is mean ± t(0.975, n−1) × "
            "SEM over n seeds. Sizes share each seed's data stream, so differences are paired by "
            "seed. Two losses count as the same only if two one-sided t-tests reject a difference "
            "of the margin or more (Schuirmann 1987): failing to find a difference is not enough. "
            "Likewise an interval that includes 0 leaves a difference undecided; it does not show "
            "that there is none. All models are measured on the same evaluation and test sentences "
            "of one language: what is particular to these is in no interval over seeds. Every "
            "checkpoint is the end of an anneal, its learning rate decayed to 0, but for those "
            "that trajectories show as trained. The embedded "
            "trace is taken after writing the small model as a "
            f"large one that computes the same function. {PARAMETRISATION}"
        ),
    ]


def _citing() -> list[str]:
    paper = page.link(PAPER, "https://arxiv.org/abs/2210.14199")
    return [
        page.heading("How to cite"),
        f"<p>The question and the claim under test are from {paper}.</p>",
        page.code(BIBTEX),
    ]
