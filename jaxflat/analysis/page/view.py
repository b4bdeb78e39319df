"""What the page shows of one sweep: texts, tables and pictures, without a word of HTML."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.factorial import factor_effects
from jaxflat.analysis.page import evidence, explorer, figures, tables
from jaxflat.analysis.page.evidence import Evidence
from jaxflat.analysis.page.factor_tables import factor_lines, factor_tables
from jaxflat.analysis.page.findings import left_out_sentences
from jaxflat.analysis.page.headline import Headline, headline, leading_verdicts
from jaxflat.analysis.page.overview import Overview, overview
from jaxflat.analysis.page.primary_picture import Picture, draw_picture, primary_picture
from jaxflat.analysis.page.settings import Provenance
from jaxflat.analysis.page.trajectory_table import trajectory_table

Table = list[list[str]]


@dataclass(frozen=True)
class Image:
    """A picture as a data address, with the text that stands for it."""

    text: str
    source: str


@dataclass(frozen=True)
class Section:
    """A part of the page that folds: its title, the name of its note in the template, its tables.

    is_open: whether it is unfolded at first.
    """

    title: str
    note: str
    tables: list[Table]
    lines: list[str]
    is_open: bool = False


@dataclass(frozen=True)
class SweepView:
    """One sweep, in the order in which the page shows it; noun: of the losses compared."""

    name: str
    noun: str
    headline: Headline
    picture: Image | None
    caption: str
    overview: Overview | None
    explorer: dict[str, Any] | None
    figures: list[tuple[str, list[Image]]]
    sections: list[Section]
    unfinished: dict[str, str]
    num_points: int
    is_smoke: bool
    config: str
    config_point: str


def leading_picture(comparison: Comparison, judged: Evidence) -> Picture | None:
    """Return the picture of the claim on which the answer rests."""
    return primary_picture(comparison, leading_verdicts(judged.verdicts)[0])


def view_sweep(
    name: str,
    comparison: Comparison,
    judged: Evidence,
    picture: Picture | None,
    made: Provenance,
    results: Path,
    most_characters: int,
) -> SweepView:
    """Turn the results of one sweep into what the page shows.

    picture: leading_picture(...); results: its results.csv; most_characters: of the values that
    its interactive figure holds.
    """
    words = headline(comparison, judged.verdicts)
    return SweepView(
        name=name,
        noun=comparison.scale.noun,
        headline=words,
        picture=image(draw_picture(picture), words.answer) if picture else None,
        caption=picture.caption if picture else "",
        overview=overview(comparison),
        explorer=explorer.explorer_data(comparison, made, results, most_characters),
        figures=[
            (
                plate.caption,
                [image(figures.draw([one], comparison), one[0]) for one in plate.panels],
            )
            for plate in figures.plates(comparison, picture)
        ],
        sections=[one for one in _sections(comparison, judged, made) if one.tables or one.lines],
        unfinished=made.unfinished,
        num_points=made.num_points,
        is_smoke=made.is_smoke,
        config=json.dumps(made.config, indent=2) if made.config else "",
        config_point=made.config_point,
    )


def image(figure: Figure, text: str) -> Image:
    """Render a figure for the page."""
    svg = figures.render(figure, "svg", transparent=True)
    return Image(text, f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}")


def _sections(comparison: Comparison, judged: Evidence, made: Provenance) -> list[Section]:
    """Return the folded parts: every test, then every number, then how they were made."""
    pairs = comparison.arm_comparison.pairs if comparison.arm_comparison else comparison.pairs
    paired = [tables.pairs_table(pairs), tables.secondary_table(pairs)] if pairs else []
    changes = [trajectory_table(comparison.trajectories)] if comparison.trajectories else []
    left_out = left_out_sentences(comparison)
    obstacle = [
        f"Sizes cannot be compared at matched {comparison.scale.noun} here: {comparison.obstacle}."
    ] * bool(comparison.obstacle and not comparison.arm_comparison and not comparison.trajectories)
    correlations = judged.correlations
    related = [evidence.correlations_table(correlations, comparison.scale)] if correlations else []
    factors = factor_effects(comparison.arms)
    effects: tuple[list[Table], list[str]] = ([], [])
    if factors and all(len(one.levels) == 2 for one in factors.factors):
        effects = factor_tables(factors), factor_lines(factors)
    return [
        Section("The effect of each factor", "factors", *effects, is_open=bool(effects[0])),
        Section("Tests", "tests", [evidence.verdicts_table(judged.verdicts)], []),
        Section("Pairs at equal loss", "pairs", paired, left_out + obstacle),
        Section("Changes from the first checkpoint to the last", "changes", changes, []),
        Section(
            "Correlations over all checkpoints",
            "correlations",
            related,
            evidence.missing_numbers(correlations),
        ),
        Section("Results", "results", _results(comparison), []),
        Section("How it was made", "made", [_made(made)], []),
    ]


def _results(comparison: Comparison) -> list[Table]:
    if not comparison.cells + comparison.controls:
        return []
    return [tables.results_table(comparison), tables.endpoints_table(comparison)]


def _made(made: Provenance) -> Table:
    rows = [["", ""], ["Command", made.command]]
    rows += [[name, "; ".join(texts)] for name, texts in made.facts.items() if texts]
    if made.seconds:
        spent = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in made.seconds.items())
        rows.append(["Time, all points", spent])
    return rows
