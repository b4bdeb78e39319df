"""The report in a real browser: it runs offline, shows the numbers of results.csv, and prints."""

import base64
import csv
import json

import numpy as np
import pytest

from jaxflat.analysis.page.explorer import TASK_MEAN
from jaxflat.analysis.statistics.intervals import mean_interval
from tests.support.browser import find_browser, open_tab
from tests.support.reports import report_of

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed"),
]
MARKS = "document.querySelectorAll('.mark-symbol path')"
X, Y = "hessian_trace@embedded", "linear_probe/state_3.map/4000"


@pytest.fixture(scope="module")
def folder(sweep):
    folder = sweep(accuracy=1.5, log_trace=-0.3)
    record = json.loads((folder / "sweep.json").read_text())
    record |= {"command": "--config=configs/model_size_sweep.py:smoke"}
    (folder / "sweep.json").write_text(json.dumps(record))
    report_of(folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_tab(PROGRAM, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser, folder):
    """Return a freshly opened page, as wide as a laptop's."""
    browser.open(folder / "report.html", 1280, 800)
    browser.wait_until("document.querySelector('.explorer').dataset.drawn === 'yes'")
    return browser


def choose(tab, **choices):
    """Set fields of the form, and wait until the figure is drawn again."""
    sets = "".join(f"form[{name!r}].value = {value!r};" for name, value in choices.items())
    tab.evaluate(
        "(() => { const root = document.querySelector('.explorer');"
        f"root.dataset.drawn = ''; const form = root.querySelector('form'); {sets}"
        "form.dispatchEvent(new Event('change')); })()"
    )
    tab.wait_until("document.querySelector('.explorer').dataset.drawn === 'yes'")


def toggle(tab, place):
    tab.evaluate(
        "(() => { const root = document.querySelector('.explorer'); root.dataset.drawn = '';"
        f"root.querySelectorAll('fieldset input')[{place}].click(); }})()"
    )
    tab.wait_until("document.querySelector('.explorer').dataset.drawn === 'yes'")


def described(tab):
    """Return the names and values that the page tells of the chosen run."""
    return dict(
        tab.evaluate(
            "[...document.querySelectorAll('.run dt')].map("
            "name => [name.textContent, name.nextSibling.textContent])"
        )
    )


def test_the_page_works_offline_without_an_error(tab, folder):
    assert tab.errors() == []
    assert tab.requests() == [(folder / "report.html").resolve().as_uri()]
    assert (folder / "report.html").stat().st_size < 3_000_000


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_no_width_needs_scrolling_sideways(browser, folder, width, height):
    browser.open(folder / "report.html", width, height)
    browser.wait_until("document.querySelector('.explorer').dataset.drawn === 'yes'")
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_first_screen_has_the_answer_its_picture_and_the_first_verdict(
    browser, folder, width, height
):
    browser.open(folder / "report.html", width, height)
    for part in (".question", ".answer", ".first img", ".strip li"):
        box = f"document.querySelector('{part}').getBoundingClientRect()"
        assert 0 <= browser.evaluate(f"{box}.top") < browser.evaluate(f"{box}.bottom") <= height
    assert "Smoke run" in browser.evaluate("document.querySelector('.smoke').textContent")


def test_pointing_at_a_mark_shows_the_values_of_results_csv(tab, rows):
    choose(tab, x=X, y=Y)
    assert tab.evaluate(f"{MARKS}.length") == len([row for row in rows if row[X]])
    tab.evaluate("document.querySelector('.plot').scrollIntoView()")
    for place in (0, 7):
        box = tab.evaluate(f"{MARKS}[{place}].getBoundingClientRect().toJSON()")
        tab.move_mouse(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tab.wait_until("document.querySelector('.run dl') !== null")
        told = described(tab)
        (row,) = [r for r in rows if (r["point"], r["step"]) == (told["Run"], told["step"])]
        for column in (X, Y):
            value, _, error = told[column].removesuffix(" (SEM)").partition(" ± ")
            assert float(value) == pytest.approx(float(row[column]), rel=1e-5)
            assert float(error) == pytest.approx(float(row[f"{column}_sem"]), rel=1e-5)
        assert told["model.width"] == row["model.width"]
        assert told["Command"].startswith("python -m jaxflat.main --config=configs/model_size")
        assert told["Command"].endswith(f"--points={row['point']}")
        alike = [
            r for r in rows if (r["model.width"], r["step"]) == (row["model.width"], row["step"])
        ]
        interval = mean_interval([float(r[Y]) for r in alike])
        numbers = told[f"{Y}, mean over seeds (95% interval)"].translate(
            {ord(c): " " for c in "(),"}
        )
        mean, low, _, high, count, _ = numbers.split()
        found = np.array([mean, low, high, count], float)
        expected = [interval.mean, interval.low, interval.high, len(alike)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_arms_pairs_and_axes_can_be_chosen(tab, rows):
    trained = len([row for row in rows if row[X]])
    count = "Number(document.querySelector('.explorer').dataset.count)"
    choose(tab, x=X, y=Y)
    toggle(tab, 0)
    assert tab.evaluate(count) == trained - len([r for r in rows if r["model.width"] == "16"])
    toggle(tab, 0)
    choose(tab, pair="0")  # widths 16 and 32
    assert tab.evaluate(count) == trained - len([r for r in rows if r["model.width"] == "64"])
    choose(tab, pair="")
    options = "[...document.querySelector('.explorer form').x.options].map(one => one.value)"
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    assert {*tab.evaluate(options)} == {TASK_MEAN, *columns}
    for column in columns:
        choose(tab, x=column, y="excess_loss")
        assert tab.evaluate(count) == len([row for row in rows if row[column]])
    assert tab.errors() == []


def test_a_run_can_be_chosen_by_keyboard(tab, rows):
    choose(tab, run="3")
    assert described(tab)["Run"] == rows[3]["point"]


def test_it_prints_with_its_folded_parts_and_without_the_interactive_one(tab):
    pdf = base64.b64decode(tab.send("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
    tab.send("Emulation.setEmulatedMedia", media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    explorer = "getComputedStyle(document.querySelector('.explorer')).display"
    assert tab.evaluate(explorer) == "none"
    tab.send("Emulation.setEmulatedMedia", media="")
