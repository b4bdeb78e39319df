"""The page loads nothing external, shows the table's numbers, and allows missing results."""

import csv
import json

import pytest

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.page import figures
from jaxflat.analysis.page.evidence import verdicts_table
from jaxflat.analysis.verdicts import RULES
from tests.support.pages import read_page
from tests.support.reports import report_of, table_of


def read(workdir):
    page = read_page(report_of(workdir))
    return page, page.visible


def drop(path, unwanted):
    """Rewrite a csv without the columns whose name contains `unwanted`."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    places = [place for place, name in enumerate(header) if unwanted not in name]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([row[place] for place in places] for row in [header, *rows])


@pytest.fixture
def workdir(sweep):
    return sweep(accuracy=1.5, log_trace=-0.3)


@pytest.fixture(scope="module")
def reported(sweep):
    """Return (folder, page, visible text) of one sweep, for tests that only read."""
    folder = sweep(accuracy=1.5, log_trace=-0.3)
    return folder, *read(folder)


@pytest.fixture(autouse=True)
def no_files_of_figures(reported, monkeypatch):
    """Skip the figure files: the page draws the same panels, and `reported` has the files."""
    monkeypatch.setattr(figures, "save_figures", lambda *_: [])


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere(reported):
    _, page, _ = reported
    for tag, address in page.addresses:
        assert address.startswith("data:") if tag == "img" else address.startswith("https://arxiv")
    assert sum(tag == "img" for tag, _ in page.addresses) == 12


def test_the_page_shows_the_numbers_of_the_table(reported):
    folder, _, visible = reported
    _, *rows = table_of(folder)  # its names are shorter than the page's
    assert rows
    for _, *numbers in rows:
        for text in numbers:
            assert text in visible


def test_the_figures_are_also_files(reported):
    names = {path.name for path in (reported[0] / "figures").iterdir()}
    plates = ("answer", "differences", "size", "trajectories", "one_loss", "steps", "labels")
    assert names == {f"{plate}.{kind}" for plate in plates for kind in ("png", "svg")}


def test_verdicts_and_correlations_are_on_the_page_with_their_rules(reported):
    folder, _, visible = reported
    for row in [*verdicts_table(judge(read_comparison(folder))), ["Kendall, within arms"]]:
        for text in row:
            assert text in visible
    for text in (
        *RULES,
        "Simpson's paradox",
        "Information",
        "Scatter from examples",
    ):
        assert text in visible


def test_the_page_explains_the_choice_of_parametrisation_once(reported):
    visible = reported[2]
    assert visible.count("the choice of parametrisation can change which of two models") == 1
    assert visible.count("Many other parametrisations") == 1


@pytest.mark.slow
def test_where_there_is_no_number_the_page_says_why(sweep):
    _, visible = read(sweep(seeds=1))
    assert "no verdict: one seed gives no interval" in visible
    _, visible = read(sweep(widths=(16,)))
    assert "no correlation, because 3 checkpoints per seed are fewer than 4." in visible


def test_how_it_was_made(reported):
    for text in ("abc1234", "jax 0.10.2", "train 300 s", "phase_order", "2210.14199"):
        assert text in reported[2]


@pytest.mark.slow
def test_the_same_results_give_the_same_page(reported):
    before = (reported[0] / "report.html").read_bytes()
    assert report_of(reported[0]).read_bytes() == before


@pytest.mark.slow
def test_failed_points_and_text_from_files_are_shown_as_text(workdir):
    point = next(path for path in workdir.iterdir() if path.is_dir() and "seed=0" in path.name)
    status = {"state": "failed", "reason": "loss is <b>not</b> finite"}
    (point / "status.json").write_text(json.dumps(status))
    _, visible = read(workdir)
    assert "are not finished: 1 of 15" in visible
    assert "failed: loss is <b>not</b> finite" in visible


@pytest.mark.parametrize("missing", ["@embedded", "trace", "linear_probe", "bayes", "loss"])
@pytest.mark.slow
def test_missing_columns_leave_a_page(workdir, missing):
    drop(workdir / "results.csv", missing)
    read(workdir)


@pytest.mark.slow
def test_one_seed_one_size_and_nothing_at_all(sweep, tmp_path):
    read(sweep(seeds=1))
    _, visible = read(sweep(widths=(16,)))
    assert "models of one size only" in visible
    (tmp_path / "empty").mkdir()
    _, visible = read(tmp_path / "empty")
    assert "No point has results yet" in visible


@pytest.mark.slow
def test_half_written_files_are_read_as_far_as_they_go(workdir):
    point = next(path for path in workdir.iterdir() if path.is_dir() and "seed=0" in path.name)
    with (point / "timing.jsonl").open("a") as file:
        file.write('{"stage": "tra')
    (point / "config.json").write_text("{")
    _, visible = read(workdir)
    assert "train 300 s" in visible


@pytest.mark.slow
def test_a_trace_that_is_not_positive_leaves_flatness_undecided(workdir):
    """No other measure replaces it: the choice of measure must not depend on the results."""
    path = workdir / "results.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["hessian_trace@embedded"] = row["hessian_trace@embedded"] and "-1.0"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    _, visible = read(workdir)
    assert "the embedded Hessian trace is not positive in every seed" in visible
    assert "embedded Hessian trace ratio – – –" in visible  # the pairs give no ratio
