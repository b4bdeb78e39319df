"""report.html: the question, the answer, the evidence, and how it was made, in one file."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from jaxflat.analysis.comparison import Comparison
from jaxflat.analysis.equal_loss import NUM_LEVELS
from jaxflat.analysis.page import explorer, figures
from jaxflat.analysis.page.evidence import Evidence
from jaxflat.analysis.page.explorer import MOST_CHARACTERS
from jaxflat.analysis.page.settings import read_provenance
from jaxflat.analysis.page.view import SweepView, leading_picture, view_sweep
from jaxflat.analysis.verdicts import RULES


def write_report(workdir: Path, comparison: Comparison, judged: Evidence) -> Path:
    """Write workdir/report.html and workdir/figures/ about the sweep in workdir."""
    picture = leading_picture(comparison, judged)
    figures.save_figures(comparison, picture, workdir / "figures")
    name = workdir.resolve().name
    made = read_provenance(workdir)
    results = workdir / "results.csv"
    shown = view_sweep(name, comparison, judged, picture, made, results, MOST_CHARACTERS)
    path = workdir / "report.html"
    path.write_text(render_page(f"jaxflat: {name}", [shown]), encoding="utf-8")
    return path


@cache
def _template() -> Template:
    """Return the compiled template of the page."""
    environment = Environment(
        loader=PackageLoader("jaxflat.analysis.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def render_page(title: str, sweeps: list[SweepView], joint: dict[str, Any] | None = None) -> str:
    """Fill the template. `joint` has what several sweeps share: an answer, a table, a picture."""
    interactive = any(sweep.explorer for sweep in sweeps)
    return _template().render(
        title=title,
        sweeps=sweeps,
        joint=joint,
        rules=RULES,
        num_levels=NUM_LEVELS,
        runtime=explorer.runtime() if interactive else "",
    )
