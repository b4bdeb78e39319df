"""Results with an effect, with none and with the reverse get three different verdicts."""

import numpy as np
import pytest

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.label_noise import CLAIM
from jaxflat.analysis.page.evidence import verdict_sentences
from jaxflat.analysis.statistics.intervals import Interval
from jaxflat.analysis.verdicts import (
    CONTRADICTED,
    NONE,
    RULES,
    SUPPORTED,
    UNDECIDED,
    all_of,
    decide,
)
from tests.analysis.conftest import write_rows
from tests.support.simulation import rows_of, sweeps

ACCURATE = "At matched excess loss the larger model is the more accurate"
FLATTER = "At matched excess loss the larger model is the flatter"
TOGETHER = "At matched excess loss the flatter model is the more accurate"
OVERALL = "Over all checkpoints, flatter models tend to be more accurate"


def write_table(folder, seed=0, **effect):
    """Write results.csv of one simulated sweep."""
    random = np.random.default_rng(seed)
    (sharpness,), (accuracy,) = sweeps(random, 1, **effect)
    rows = [
        {"point": r.point, **r.swept, "seed": r.seed, "step": r.step, "projected": 1, **r.values}
        for r in rows_of(random, sharpness, accuracy)
    ]
    write_rows(folder / "results.csv", rows)
    return folder


def answers(folder):
    return {one.claim: one.answer for one in judge(read_comparison(folder))}


@pytest.mark.parametrize(
    ("effect", "accurate", "together"),
    [
        ({"size": 3.0}, SUPPORTED, SUPPORTED),
        ({}, UNDECIDED, UNDECIDED),
        ({"size": -3.0}, CONTRADICTED, SUPPORTED),
        ({"slope": 3.0}, UNDECIDED, CONTRADICTED),
    ],
    ids=str,
)
def test_an_effect_none_and_its_reverse_are_three_verdicts(tmp_path, effect, accurate, together):
    found = answers(write_table(tmp_path, seed=3, **effect))
    assert (found[ACCURATE], found[FLATTER]) == (accurate, accurate)
    assert (found[TOGETHER], found[OVERALL]) == (together, together)


@pytest.mark.parametrize("expected", [1, -1])
def test_the_rule_is_the_same_in_both_directions(expected):
    above, around = Interval(0.2, 0.1, 0.3, 5), Interval(0.2, -0.1, 0.5, 5)
    below, alone = Interval(-0.2, -0.3, -0.1, 5), Interval(0.2, None, None, 1)
    answers = [decide(one, 0.0, expected) for one in (above, below, around, alone, None)]
    words = [SUPPORTED, CONTRADICTED] if expected > 0 else [CONTRADICTED, SUPPORTED]
    assert answers == [*words, UNDECIDED, NONE, NONE]


def test_a_claim_of_two_parts():
    assert all_of([SUPPORTED, SUPPORTED]) == SUPPORTED
    assert all_of([SUPPORTED, UNDECIDED]) == UNDECIDED
    assert all_of([UNDECIDED, CONTRADICTED]) == CONTRADICTED
    assert all_of([CONTRADICTED, NONE]) == NONE


def test_a_verdict_says_what_the_invariant_trace_decides(sweep):
    effects = {"accuracy": 1.5, "log_trace": 0.3}
    verdicts = {
        effect: judge(read_comparison(sweep(**effects, log_invariant=effect)))
        for effect in (None, 0.3, -0.3)
    }
    answers = {effect: [one.answer for one in found] for effect, found in verdicts.items()}
    assert answers[None] == answers[0.3] == answers[-0.3]
    assert answers[None][:3] == [SUPPORTED, CONTRADICTED, CONTRADICTED]
    for place in (1, 2):
        evidence = {effect: found[place].evidence for effect, found in verdicts.items()}
        assert "invariant" not in evidence[None]
        assert "; by the invariant trace " in evidence[0.3]
        assert SUPPORTED not in evidence[0.3]
        assert evidence[-0.3].endswith(", supported")


def test_sizes_that_are_not_matched_get_no_verdict(sweep):
    found = judge(read_comparison(sweep(excess=0.02, steps=(1000,), accuracy=1.5)))
    assert [one.answer for one in found[:3]] == [NONE] * 3
    assert {one.reason for one in found[:3]} == {"no pair is matched in excess loss"}


@pytest.mark.parametrize(
    ("effects", "reason"),
    [
        ({"seeds": 1}, "one seed gives no interval"),
        ({"widths": (16,)}, "models of one size only"),
        ({"steps": (1000,)}, "fewer than 4"),
    ],
)
def test_where_there_is_no_verdict_the_reason_is_said(sweep, effects, reason):
    sentences = verdict_sentences(read_comparison(sweep(**effects)))
    assert any("No verdict" in one and reason in one for one in sentences)
    assert "nan" not in " ".join(sentences)


def test_a_claim_and_its_reverse_are_worded_alike(tmp_path):
    sentences = [
        verdict_sentences(read_comparison(write_table(tmp_path, seed=3, size=size)))[0]
        for size in (3.0, -3.0)
    ]
    heads = [one.partition(" (")[0] for one in sentences]
    assert heads[0].replace(SUPPORTED, CONTRADICTED) == heads[1]
    assert SUPPORTED in RULES[0]
    assert CONTRADICTED in RULES[0]


def write_noise(folder, sampled, exact, excess=0.004):
    """Write sampled labels beside exact targets; each multiplies the trace by its factor."""
    random = np.random.default_rng(0)
    rows = []
    for seed in range(5):
        for targets, factor in (("sampled", sampled), ("exact", exact)):
            for step in (100, 200):
                trace = 40 * (factor if step == 200 else 1) * np.exp(random.normal(0, 0.03))
                loss = (excess if targets == "sampled" else 0.004) + random.normal(0, 1e-4)
                rows.append(
                    {
                        **{"point": f"{targets},{seed}", "phases.drift.targets": targets},
                        **{"seed": seed, "step": step, "projected": 1, "num_params": 1000},
                        **{"excess_loss": loss, "hessian_trace@embedded": trace},
                    }
                )
    write_rows(folder / "results.csv", rows)
    return folder


@pytest.mark.parametrize(
    ("sampled", "exact", "answer"),
    [
        (0.3, 1.0, SUPPORTED),
        (1.0, 1.0, UNDECIDED),
        (3.0, 1.0, CONTRADICTED),
        (0.3, 0.3, UNDECIDED),
        (0.3, 0.6, SUPPORTED),
        (0.6, 0.3, CONTRADICTED),
    ],
)
def test_the_trace_falls_under_label_noise_and_its_ratio_is_below_the_controls(
    tmp_path, sampled, exact, answer
):
    """The claim does not say more: the control's trace may fall too."""
    assert answers(write_noise(tmp_path, sampled, exact))[CLAIM] == answer


def test_the_control_has_to_be_matched(tmp_path):
    assert answers(write_noise(tmp_path, 0.3, 1.0, excess=0.03))[CLAIM] == NONE


def test_sweeps_without_the_control_are_not_asked(sweep):
    assert CLAIM not in answers(sweep())
