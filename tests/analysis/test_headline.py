"""The first screen: the answer follows the numbers, and names what was used to get them."""

import json

import numpy as np
import pytest

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.page import drawing
from jaxflat.analysis.page.headline import MOST_WORDS, headline, leading_verdicts
from jaxflat.analysis.page.primary_picture import Differences, Doses, primary_picture
from jaxflat.analysis.page.settings import read_provenance
from jaxflat.analysis.statistics.intervals import Interval, mean_interval
from tests.analysis.conftest import write_rows
from tests.analysis.test_findings import declare
from tests.analysis.test_unset_keys import PROBE, TARGETS, TRACE

STRENGTH = "phases.dial.flatness_penalty.strength"


def first_screen(folder):
    comparison = read_comparison(folder)
    verdicts = judge(comparison)
    kind = leading_verdicts(verdicts)[0].kind
    return headline(comparison, verdicts), primary_picture(comparison, kind)


def write_doses(folder, key, values, slope=1.0, seeds=6):
    """Write arms that differ in `key`: each halves the trace, and adds `slope` points."""
    random, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        own = random.normal(0, 0.005)
        for place, value in enumerate(values):
            for step, loss in ((1000, 0.004), (2000, 0.003)):
                row = {"point": f"{value},{seed}", key: value, "seed": seed, "step": step}
                row |= {"projected": 0, "last": int(step == 2000), "num_params": 1000}
                row |= {"excess_loss": loss * np.exp(random.normal(0, 0.01))}
                row |= {TRACE: 40 * 0.5**place * np.exp(random.normal(0, 0.02))}
                row |= {PROBE: 0.9 + own + 0.01 * slope * place + random.normal(0, 5e-4)}
                rows.append(row)
    write_rows(folder / "results.csv", rows)
    return folder


@pytest.mark.parametrize(("accuracy", "word"), [(1.5, "Yes: "), (-1.5, "No, the opposite: ")])
def test_an_effect_and_its_reverse_differ_in_the_word_and_the_number(sweep, accuracy, word):
    words, picture = first_screen(declare(sweep(accuracy=accuracy), "accuracy"))
    assert (
        words.question
        == "At equal pre-training loss, is the larger model more accurate downstream?"
    )
    sign = "+" if accuracy > 0 else "−"
    assert words.answer.startswith(f"{word}the larger model differs in accuracy by {sign}")
    assert "95% interval" in words.answer
    assert words.answer.endswith("mean over 3 pairs.")
    assert isinstance(picture, Differences)
    assert [len(row.by_seed) for row in picture.rows] == [5] * 4
    mean, *pairs = picture.rows
    np.testing.assert_allclose(mean.by_seed, np.mean([row.by_seed for row in pairs], axis=0))
    assert f"{abs(mean.interval.mean):.1f} points (95%" in words.answer


@pytest.mark.parametrize(("slope", "word"), [(1.0, "Yes"), (-1.0, "No, the opposite")])
def test_doses_are_answered_per_halving_and_drawn_seed_by_seed(tmp_path, slope, word):
    folder = write_doses(tmp_path, STRENGTH, (0.0, 1e-5, 1e-4), slope)
    (folder / "sweep.json").write_text("{}")
    words, picture = first_screen(declare(folder, "effect"))
    assert words.answer.startswith(f"{word}: halving the Hessian trace, embedded changes accuracy")
    assert isinstance(picture, Doses)
    (arms,) = picture.groups
    assert [cell.arm for cell in arms] == ["strength 0.0", "strength 1e-05", "strength 0.0001"]
    assert all(len(cell.rows) == 6 for cell in arms)
    losses = [[row.values["excess_loss"] for row in cell.rows.values()] for cell in arms]
    np.testing.assert_allclose(losses, losses[:1] * 3)  # each seed at one loss


def test_label_noise_is_drawn_as_each_seed_s_change(tmp_path):
    folder = write_doses(tmp_path, TARGETS, ("exact", "sampled"))
    (folder / "sweep.json").write_text("{}")
    words, picture = first_screen(declare(folder, "label noise"))
    assert words.question.endswith("does label noise make a model flatter?")
    assert [row.name for row in picture.rows] == [
        *("exact targets", "sampled labels", "sampled over exact"),
    ]
    control, noise, ratio = (np.array(row.by_seed) for row in picture.rows)
    np.testing.assert_allclose(ratio, noise / control)


def test_the_endpoint_and_the_margins_are_those_that_were_declared(sweep):
    folder = declare(sweep(log_invariant=-0.2), "accuracy")
    record = json.loads((folder / "sweep.json").read_text())
    record["trains"]["claims"] |= {"shots": 200, "loss_margin": 0.25, "negligible_slope": 0.7}
    (folder / "sweep.json").write_text(json.dumps(record))
    words, _ = first_screen(folder)
    basis = dict(words.basis)
    assert basis["Accuracy"] == "linear probe, map labels, 200 labelled examples, mean over 2 tasks"
    assert basis["Flatness"] == "invariant Hessian trace"
    assert "1.25" in basis["Equal loss"]
    assert "±0.7" in basis["Negligible"]
    assert words.fallbacks == []


def test_what_replaced_the_declared_or_preferred_is_called_so(sweep):
    words, _ = first_screen(sweep())
    assert any("records no claims" in text for text in words.fallbacks)
    assert any("the Hessian trace, embedded is used instead" in text for text in words.fallbacks)
    folder = declare(sweep(), "label noise")
    assert any("(label noise) has no test" in text for text in first_screen(folder)[0].fallbacks)


def test_chips_have_the_primary_claim_first_and_a_word_each(sweep):
    chips = first_screen(declare(sweep(log_trace=-0.3), "flatness"))[0].chips
    assert chips[0].primary
    assert chips[0].claims == ["the larger model is the flatter"]
    assert chips[0].answer == "supported"
    assert not any(chip.primary for chip in chips[1:])
    assert all(chip.answer and chip.detail for chip in chips)


def test_a_long_reason_leaves_a_short_answer(tmp_path):
    name = "a_very " * 30
    folder = write_doses(tmp_path, f"phases.{name}.width", (1, 2))
    (folder / "sweep.json").write_text("{}")
    assert len(first_screen(declare(folder, "effect"))[0].answer.split()) <= MOST_WORDS


def test_a_long_interval_does_not_stretch_an_axis():
    values = [80.0, 81.0]
    assert mean_interval(values).half_width > 6
    low, high = drawing.limits(values, [mean_interval(values)])
    assert 78.5 < low < 79.1
    assert 81.9 < high < 82.5
    short = Interval(80.5, 80.1, 80.9, 5)
    assert drawing.limits(values, [short]) == drawing.limits(values, [])
    low, high = drawing.limits([10.0, 20.0], [], log=True)
    assert 9 < low < 10 < 20 < high < 22


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_only_a_smoke_run_is_called_one(sweep, scale):
    folder = sweep()
    record = json.loads((folder / "sweep.json").read_text())
    record["command"] = f"--config=configs/model_size_sweep.py:{scale} --config.seed=1"
    (folder / "sweep.json").write_text(json.dumps(record))
    made = read_provenance(folder)
    assert made.is_smoke == (scale == "smoke")
    assert made.command.startswith(f"python -m jaxflat.main {record['command']} --workdir=")
