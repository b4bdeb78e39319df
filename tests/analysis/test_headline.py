"""The first screen: the answer follows the numbers, and names the endpoint and the margins."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.page import drawing, wording
from jaxflat.analysis.page.headline import MOST_WORDS, answer_sentence, headline, leading_verdicts
from jaxflat.analysis.page.overview import overview
from jaxflat.analysis.page.primary_picture import (
    Difference,
    Differences,
    Doses,
    Seeds,
    primary_picture,
    row_names,
)
from jaxflat.analysis.page.settings import read_provenance
from jaxflat.analysis.results_csv import Row
from jaxflat.analysis.statistics.intervals import Interval, mean_interval
from jaxflat.analysis.verdicts import (
    ACCURACY,
    CONTRADICTED,
    EFFECT,
    LABEL_NOISE,
    SUPPORTED,
    UNDECIDED,
    Verdict,
)
from tests.analysis.conftest import write_rows
from tests.analysis.test_findings import declare
from tests.analysis.test_unset_keys import PROBE, TARGETS, TRACE
from tests.support.claims import ACROSS, WITHIN

STRENGTH = "phases.dial.flatness_penalty.strength"


def first_screen(folder):
    comparison = read_comparison(folder)
    verdicts = judge(comparison)
    return headline(comparison, verdicts), primary_picture(
        comparison, leading_verdicts(verdicts)[0]
    )


def write_doses(folder, key, values, slope=1.0, seeds=6, projected=0):
    """Write arms that differ in `key`: each halves the trace, and adds `slope` points."""
    random, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        own = random.normal(0, 0.005)
        for place, value in enumerate(values):
            for step, loss in ((1000, 0.004), (2000, 0.003)):
                row = {"point": f"{value},{seed}", key: value, "seed": seed, "step": step}
                row |= {"projected": projected, "last": int(step == 2000), "num_params": 1000}
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
    assert f"{abs(mean.interval.mean):.2f} points (95%" in words.answer


@pytest.mark.parametrize(("slope", "word"), [(1.0, "Yes"), (-1.0, "No, the opposite")])
def test_doses_are_answered_per_halving_and_drawn_seed_by_seed(tmp_path, slope, word):
    folder = write_doses(tmp_path, STRENGTH, (0.0, 1e-5, 1e-4), slope)
    (folder / "sweep.json").write_text("{}")
    words, picture = first_screen(declare(folder, "effect"))
    assert words.answer.startswith(
        f"{word}: halving the embedded Hessian trace by the penalty changes accuracy by "
    )
    assert isinstance(picture, Doses)
    (arms,) = picture.groups
    assert [cell.arm for cell in arms] == ["strength 0.0", "strength 1e-05", "strength 0.0001"]
    assert all(len(cell.rows) == 6 for cell in arms)
    losses = [[row.values["excess_loss"] for row in cell.rows.values()] for cell in arms]
    np.testing.assert_allclose(losses, losses[:1] * 3)  # each seed at one loss


def test_a_dose_whose_losses_do_not_overlap_is_named_and_not_drawn(tmp_path):
    path = write_doses(tmp_path, STRENGTH, (0.0, -1e-5, 1e-4)) / "results.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row[STRENGTH] == "-1e-05":
            row["excess_loss"] = float(row["excess_loss"]) * 10
    write_rows(path, rows)
    (tmp_path / "sweep.json").write_text("{}")
    _, picture = first_screen(declare(tmp_path, "effect"))
    (arms,) = picture.groups
    assert [cell.arm for cell in arms] == ["strength 0.0", "strength 0.0001"]
    assert picture.caption.endswith("Without strength -1e-05: too few losses in common.")


def test_label_noise_is_drawn_as_each_seed_s_change(tmp_path):
    folder = write_doses(tmp_path, TARGETS, ("exact", "sampled"), projected=1)
    (folder / "sweep.json").write_text("{}")
    words, picture = first_screen(declare(folder, "label noise"))
    assert words.question.endswith("does label noise make a model flatter?")
    assert [row.name for row in picture.rows] == [
        *("exact targets", "sampled labels", "sampled over exact"),
    ]
    control, noise, ratio = (np.array(row.by_seed) for row in picture.rows)
    np.testing.assert_allclose(ratio, noise / control)
    # The loss falls from 0.004 to 0.003 in each arm, so only the arms' ends have equal losses.
    assert [row.equal_loss for row in picture.rows] == [False, False, True]
    assert "Hollow" in picture.caption


MEASURE = "phases.dial.flatness_penalty.measure"


def write_penalties(folder):
    """Write two penalties beside one baseline, which names one of their measures."""
    path = write_doses(folder, STRENGTH, (0.0, 1e-5, 1e-4)) / "results.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {"0.0": "fisher_trace", "1e-05": "fisher_trace", "0.0001": "gauss_newton_trace"}
    write_rows(path, [{"point": row["point"], MEASURE: names[row[STRENGTH]]} | row for row in rows])
    (folder / "sweep.json").write_text("{}")
    return folder


@pytest.mark.parametrize("swept", [True, False])
@pytest.mark.parametrize("measure", ["parameter_norm", "feature_rank"])
def test_a_penalty_on_no_curvature_is_a_control(tmp_path, measure, swept):
    """It may change the trace and the accuracy together, as here, and flatness be no cause."""
    path = write_doses(tmp_path, STRENGTH, (0.0, 1e-4)) / "results.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if swept:
        names = {"0.0": "", "0.0001": measure}
        rows = [{"point": row["point"], MEASURE: names[row[STRENGTH]]} | row for row in rows]
        write_rows(path, rows)
    (tmp_path / "sweep.json").write_text("{}")
    record = json.loads((declare(tmp_path, "effect") / "sweep.json").read_text())
    if not swept:
        record["trains"]["phases"] = {"dial": {"flatness_penalty": {"measure": measure}}}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    verdicts = judge(read_comparison(tmp_path))
    effects = [one for one in verdicts if one.kind == "effect"]
    assert effects[0].answer == "not identified"
    assert "is a control" in effects[0].reason
    assert not any(one.answer == "supported" for one in effects)
    (accuracy,) = [one for one in verdicts if one.kind == "accuracy"]
    assert accuracy.answer == "supported"
    assert (measure if swept else "strength 0.0001") in accuracy.claim


def test_each_penalty_is_named_and_drawn_with_its_own_doses(tmp_path):
    folder = declare(write_penalties(tmp_path), "effect")
    words, picture = first_screen(folder)
    assert words.answer.startswith("Of 2 claims: 2 supported. Smallest p: a penalty on ")
    assert " points per halving (95% interval " in words.answer
    assert words.leading == SUPPORTED
    comparison = read_comparison(folder)
    leading = leading_verdicts(judge(comparison))
    assert [one.subject for one in leading] == [
        "a penalty on fisher trace",
        "a penalty on gauss newton trace",
    ]
    for verdict, dose in zip(leading, ("1e-05", "0.0001"), strict=True):
        (arms,) = primary_picture(comparison, verdict).groups
        swept = [next(iter(cell.rows.values())).swept for cell in arms]
        assert [one[STRENGTH] for one in swept] == ["0.0", dose]
    assert isinstance(picture, Doses)


def test_arms_that_differ_in_their_answers_have_none_together(tmp_path):
    verdicts = judge(read_comparison(declare(write_penalties(tmp_path), "effect")))
    mixed = [replace(verdicts[0], answer=UNDECIDED), *verdicts[1:]]
    assert headline(read_comparison(tmp_path), mixed).leading == ""


def test_a_claim_on_seeds_is_drawn_as_seeds_and_one_that_is_not_identified_has_no_picture(sweep):
    comparison = read_comparison(declare(sweep(), "effect"))
    verdicts = {one.claim: one for one in judge(comparison)}
    picture = primary_picture(comparison, verdicts[WITHIN])
    assert isinstance(picture, Seeds)
    assert [cell.arm for cell in picture.settings] == list(comparison.arms)
    words, first = first_screen(declare(sweep(), "effect"))
    assert isinstance(first, Seeds)
    assert ": over the seeds of one setting, " in words.answer
    assert "(corrected p " in words.answer
    assert primary_picture(comparison, verdicts[ACROSS]) is None


def test_the_answer_on_flatness_says_that_the_embedded_trace_says_the_opposite(sweep):
    effects = {"log_trace": 0.3, "accuracy": 1.5}
    for invariant, opposite in ((-0.3, True), (0.3, False)):
        folder = declare(sweep(**effects, log_invariant=invariant), "flatness")
        answer = first_screen(folder)[0].answer
        assert "times the invariant Hessian trace" in answer
        assert answer.endswith("; the embedded trace says the opposite.") == opposite


def test_what_all_rows_have_in_common_is_in_the_caption():
    arms = [[f"width {w}, rate {r}" for w in (32, 64)] for r in ("0.02", "0.05")]
    cells = [[Cell(arm, 0, {}) for arm in both] for both in arms]
    pairs = [SimpleNamespace(first=first, second=second) for first, second in cells]
    names, about = row_names(pairs)
    assert names == ["rate 0.02", "rate 0.05"]
    assert about.startswith("Width 64 against width 32")
    names, about = row_names(pairs[:1])
    assert (names, about) == (["width 64, rate 0.02"], "Against width 32, rate 0.02.")
    mixed = [*pairs, SimpleNamespace(first=cells[0][0], second=cells[1][1])]
    assert row_names(mixed)[0][2] == "width 64, rate 0.05 against width 32, rate 0.02"


def test_a_claim_without_its_measurements_has_no_picture_of_another(sweep):
    comparison = read_comparison(sweep())
    for kind in (LABEL_NOISE, EFFECT):
        claim = Verdict("a claim", kind, True, "", "", UNDECIDED, subject="a penalty")
        assert primary_picture(comparison, claim) is None


def test_the_small_table_says_where_its_arms_are_read(sweep):
    between = overview(read_comparison(sweep())).read
    assert between.startswith("Each arm is read between checkpoints")
    apart = overview(read_comparison(sweep(excess=0.02, steps=(1000,)))).read
    assert apart == "Each arm is read at step 1,000."


def test_small_differences_have_two_digits():
    assert wording.points(Interval(-0.002, -0.004, -0.0004, 5)) == "−0.20 (−0.40 to −0.04)"
    assert wording.points(Interval(0.027, -0.003, 0.058, 5)) == "+2.7 (−0.3 to +5.8)"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.0040, 0.0042), "0.0041 ± 0.0013"),
        ((0.0002151, 0.0002153), "0.000215 ± 0.000001"),
        ((0.00021, 0.00021), "0.0002 ± 0.0000"),
        ((0.3, 0.3 + 1e-9), "0.3000 ± 0.0000"),  # two more digits do not show it either
    ],
)
def test_an_error_that_is_not_0_is_shown_with_up_to_two_more_digits(values, text):
    rows = {
        str(seed): Row("", {}, str(seed), 1, False, {"loss": value}, True)
        for seed, value in enumerate(values)
    }
    assert wording.plus_minus(Cell("arm", 1, rows), "loss", ".4f") == text


def test_an_arrow_is_explained_where_one_is_drawn():
    short, long = Interval(1.0, 0.9, 1.1, 5), Interval(1.0, -50.0, 52.0, 5)
    for interval, beyond in ((short, False), (long, True)):
        rows = [Difference("a", [0.9, 1.1], interval)]
        assert ("An arrow" in Differences("", 0.0, rows, "").caption) == beyond


def test_the_first_36_arms_look_different():
    assert len({tuple(drawing.look(place).values()) for place in range(36)}) == 36


def test_the_endpoint_and_the_margins_are_those_that_were_declared(sweep):
    folder = declare(sweep(log_invariant=-0.2), "accuracy")
    record = json.loads((folder / "sweep.json").read_text())
    record["trains"]["claims"] |= {"shots": 200, "loss_margin": 0.25, "negligible_slope": 0.7}
    (folder / "sweep.json").write_text(json.dumps(record))
    words, _ = first_screen(folder)
    basis = dict(words.basis)
    assert basis["Accuracy"] == (
        "linear probe, 200 labelled examples, mean over 2 tasks, map labels: the most probable "
        "hidden symbol given the words"
    )
    assert basis["Flatness"] == "invariant Hessian trace"
    assert "1.25" in basis["Equal loss"]
    assert "±0.7" in basis["Negligible"]
    assert words.fallbacks == []


def test_what_replaced_the_declared_or_preferred_is_called_so(sweep):
    words, _ = first_screen(sweep())
    assert any("records no claims" in text for text in words.fallbacks)
    assert any("the embedded Hessian trace is used instead" in text for text in words.fallbacks)
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


def test_several_arms_are_named_by_their_answers_as_long_as_the_words_suffice(sweep):
    comparison = read_comparison(sweep())

    def answer(*named):
        leading = [
            Verdict(name, ACCURACY, True, "", "−1.5 (−2.0 to −1.0)", answer, p, subject=name)
            for name, answer, p in named
        ]
        return answer_sentence(comparison, leading)

    smallest = "Smallest p: {}, −1.5 points (95% interval −2.0 to −1.0)."
    few = ("SAM", SUPPORTED, 0.02), ("Muon", UNDECIDED, 0.3), ("adversary", CONTRADICTED, 0.01)
    named = "More accurate: SAM. Less accurate: adversary. Undecided: Muon. "
    assert answer(*few) == named + smallest.format("adversary")
    long = ("a name of many words", SUPPORTED, 0.02), ("another " * 6, UNDECIDED, 0.3)
    counted = "Of 2 arms: 1 more accurate, 1 undecided. "
    assert answer(*long) == counted + smallest.format("a name of many words")
