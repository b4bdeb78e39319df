"""report.html: the question, the answer, the evidence, and how it was made, in one file."""

import json
from pathlib import Path

from jaxflat.analysis.comparison import Comparison, read_comparison
from jaxflat.analysis.equal_loss import NUM_LEVELS
from jaxflat.analysis.page import evidence, figures, findings, html, tables
from jaxflat.analysis.page.arm_words import arms_section
from jaxflat.analysis.page.evidence import Evidence
from jaxflat.analysis.page.factor_words import factors_section
from jaxflat.analysis.page.settings import Provenance, read_provenance
from jaxflat.analysis.page.trajectory_words import trajectory_section

QUESTION = (
    "Among language models of equal pre-training loss, is flatness related to downstream accuracy?"
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
        html.heading(title, 1),
        html.paragraph(QUESTION, "question"),
        *sweep_sections(comparison, evidence.examine(comparison), read_provenance(workdir)),
        *closing_sections(),
    ]
    path = workdir / "report.html"
    path.write_text(html.page(title, body), encoding="utf-8")
    return path


def sweep_sections(comparison: Comparison, judged: Evidence, made: Provenance) -> list[str]:
    """Return the sections of one sweep: findings, evidence, and how it was made."""
    return [
        *_found(comparison, judged),
        *evidence.verdicts_section(judged.verdicts),
        *_figures(comparison),
        *_pairs(comparison),
        *factors_section(comparison),
        *trajectory_section(comparison.trajectories),
        *evidence.correlations_section(judged.correlations),
        *_results(comparison),
        *_unfinished(made),
        *_made(made),
    ]


def closing_sections() -> list[str]:
    """Return the sections on how to read the page and how to cite."""
    return [*_reading(), *_citing()]


def _found(comparison: Comparison, judged: Evidence) -> list[str]:
    first, *rest = findings.describe(comparison, judged.verdicts)
    return [html.heading("What was found"), html.paragraph(first, "lead"), html.bullets(rest)]


def _figures(comparison: Comparison) -> list[str]:
    def svg(title: str, panel: figures.Panel) -> bytes:
        return figures.render(figures.draw([(title, panel)], comparison), "svg", transparent=True)

    return [
        html.figure([(title, svg(title, panel)) for title, panel in plate.panels], plate.caption)
        for plate in figures.plates(comparison)
    ]


def _pairs(comparison: Comparison) -> list[str]:
    if comparison.arm_comparison:
        return arms_section(comparison.arm_comparison, comparison.controls)
    if not comparison.pairs:
        return []
    count = sum(len(pair.secondary) for pair in comparison.pairs)
    primary = ", ".join(comparison.primary_columns) or "not measured in this sweep"
    return [
        html.heading("Pairs of sizes, at equal excess loss"),
        html.paragraph(
            "Both models of a pair are read at the same excess losses, seed by seed, by "
            f"interpolation between the checkpoints of each run: the mean over {NUM_LEVELS} losses "
            "that both runs passed. If the losses do not overlap, the two checkpoints nearest in "
            "mean excess loss are compared, and two one-sided tests say whether their losses are "
            "equal within the declared ratio; half and double its logarithm are shown for "
            "sensitivity. Such a pair is chosen and tested on the same losses, so every p is "
            "multiplied by the number of candidate pairs (Bonferroni). "
            "Differences are larger minus smaller, ratios larger over smaller. "
            "Scatter from examples: an upper bound of the share of the variance of the accuracy "
            "difference over seeds that comes from test sentences and from draws of the probe's "
            "training sets. The rest comes from the seeds.",
            "note",
        ),
        html.table(tables.pairs_table(comparison.pairs)),
        html.paragraph(
            f"Accuracy: {comparison.plan.accuracy}, {comparison.primary_labeling} labels, mean "
            f"over tasks: {primary}. Intervals are not corrected for the number of pairs.",
            "note",
        ),
        html.details(
            f"Secondary endpoints: {count} intervals, not corrected for their number",
            html.table(tables.secondary_table(comparison.pairs)),
        ),
    ]


def _results(comparison: Comparison) -> list[str]:
    cells = comparison.cells + comparison.controls
    if not cells:
        return [html.heading("Results"), html.paragraph("No point has results yet.")]
    kind = "after a projection" if comparison.projected else "as trained"
    return [
        html.heading("Results"),
        html.paragraph(
            f"Mean ± half-width of the 95% t interval over seeds. Checkpoints {kind}. Accuracy: "
            f"{comparison.plan.accuracy}, mean over tasks. The ceiling of map labels is "
            "100% by construction; the ceiling of latent labels is the mean largest posterior.",
            "note",
        ),
        html.table(tables.results_table(comparison)),
        html.details(
            "Every task, labeling and number of shots",
            html.table(tables.endpoints_table(comparison)),
        ),
    ]


def _unfinished(made: Provenance) -> list[str]:
    if not made.unfinished:
        return []
    rows = [["Point", "State"], *([name, text] for name, text in made.unfinished.items())]
    title = f"Points that did not finish: {len(made.unfinished)} of {made.num_points}"
    return [html.heading(title), html.table(rows)]


def _made(made: Provenance) -> list[str]:
    rows = [["", ""], *([name, "; ".join(texts)] for name, texts in made.facts.items() if texts)]
    if made.seconds:
        spent = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in made.seconds.items())
        rows.append(["Time, all points", spent])
    parts = []
    if len(rows) > 1:
        parts.append(html.table(rows))
    if made.config:
        text = json.dumps(made.config, indent=2)
        parts.append(html.details(f"Configuration of {made.config_point}", html.code(text)))
        parts.append(
            html.paragraph("sweep.json lists the settings that differ between points.", "note")
        )
    return [html.heading("How it was made"), *parts] if parts else []


def _reading() -> list[str]:
    return [
        html.heading("How to read the error bars"),
        html.paragraph(
            "Excess loss is the mean divergence of the model from the language's exact "
            "conditionals, in nats, so 0 is the optimum. An error bar is mean ± t(0.975, n−1) × "
            "SEM over n seeds. Sizes share each seed's data stream, so differences are paired by "
            "seed. Two losses count as the same only if two one-sided t-tests reject a difference "
            "of the margin or more (Schuirmann 1987): failing to find a difference is not enough. "
            "Models that are read by interpolation have the same loss by construction. "
            "Likewise, an interval that includes 0 leaves a difference undecided; it does not show "
            "that there is none. All models of a language are evaluated on the same sentences, and "
            "all models of a seed are probed on the same test sentences. Intervals over seeds do "
            "not cover the choice of the evaluation sentences. "
            "Every checkpoint is the end of an anneal, its learning rate decayed to 0, except "
            "those that trajectories show as trained."
        ),
        html.heading("How to read the traces"),
        html.paragraph(
            "An embedded trace is measured after the small model is written as the sweep's largest "
            "one, which computes the same function. So two sizes are compared in one "
            "parametrisation. Many other parametrisations compute the same functions: rescaling "
            "the weights without changing the function changes the trace. So the choice of "
            "parametrisation can change which of two models is the flatter. An invariant trace is "
            "the trace in the units in which the Gauss-Newton trace is least, over all rescalings "
            "that jaxflat knows of the model. They do not change it. It still depends on how the "
            "small model is embedded."
        ),
    ]


def _citing() -> list[str]:
    paper = html.link(PAPER, "https://arxiv.org/abs/2210.14199")
    return [
        html.heading("How to cite"),
        f"<p>The question and the claim under test are from {paper}.</p>",
        html.code(BIBTEX),
    ]
