"""report.html: the question, the answer, the evidence, and how it was made, in one file."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.equal_loss import NUM_LEVELS
from jaxflat.analysis.page import evidence, explorer, figures
from jaxflat.analysis.page.settings import read_provenance
from jaxflat.analysis.page.view import SweepView, leading_picture, view_sweep
from jaxflat.analysis.verdicts import RULES


def write_report(workdir: Path) -> Path:
    """Write workdir/report.html and workdir/figures/ from the files of the sweep."""
    workdir = Path(workdir)
    comparison = read_comparison(workdir)
    judged = evidence.examine(comparison)
    figures.save_figures(comparison, leading_picture(comparison, judged), workdir / "figures")
    name = workdir.resolve().name
    made = read_provenance(workdir)
    shown = view_sweep(name, comparison, judged, made, workdir / "results.csv")
    path = workdir / "report.html"
    path.write_text(render_page(f"jaxflat: {name}", [shown]), encoding="utf-8")
    return path


def render_page(title: str, sweeps: list[SweepView], joint: dict[str, Any] | None = None) -> str:
    """Fill the template. `joint` has what several sweeps share: an answer, a table, a picture."""
    environment = Environment(
        loader=PackageLoader("jaxflat.analysis.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    interactive = any(sweep.explorer for sweep in sweeps)
    return environment.get_template("report.html").render(
        title=title,
        sweeps=sweeps,
        joint=joint,
        rules=RULES,
        num_levels=NUM_LEVELS,
        runtime=explorer.runtime() if interactive else "",
    )
