"""Results with an effect, with none and with the reverse get three different verdicts."""

import csv
from itertools import combinations, product

import numpy as np
import pytest
from scipy import special

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.label_noise import CLAIM
from jaxflat.analysis.page.evidence import reason_sentences
from jaxflat.analysis.verdicts import (
    ACCURACY,
    CONTRADICTED,
    EFFECT,
    FLATNESS,
    NEGLIGIBLE,
    NONE,
    NOT_IDENTIFIED,
    RULES,
    SUPPORTED,
    UNDECIDED,
    ClaimTest,
    decide,
    shaffer,
)
from tests.analysis.conftest import write_rows
from tests.support.claims import ACROSS, WITHIN
from tests.support.counts import in_full
from tests.support.simulation import rows_of, sweeps

ACCURATE = "At equal excess loss the larger model is the more accurate"
FLATTER = "At equal excess loss the larger model is the flatter"


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
    ("effect", "accurate", "within"),
    [
        ({"size": 3.0}, SUPPORTED, UNDECIDED),
        ({}, UNDECIDED, UNDECIDED),
        ({"size": -3.0}, CONTRADICTED, UNDECIDED),
        ({"slope": 3.0}, UNDECIDED, CONTRADICTED),
        ({"slope": -3.0}, UNDECIDED, SUPPORTED),
    ],
    ids=str,
)
def test_an_effect_none_and_its_reverse_are_three_verdicts(tmp_path, effect, accurate, within):
    found = answers(write_table(tmp_path, seed=3, **effect))
    assert (found[ACCURATE], found[FLATTER]) == (accurate, accurate)
    assert found[WITHIN] == within
    assert found[ACROSS] == NOT_IDENTIFIED  # flatness differs with size


def test_no_verdict_rests_on_correlations_over_all_checkpoints(tmp_path):
    claims = answers(write_table(tmp_path, seed=3, size=3.0))
    assert [*claims] == [ACCURATE, FLATTER, ACROSS, WITHIN]


def of_kind(kind, p, side=1, p_negligible=None, **more):
    return ClaimTest(f"{kind} {p}", kind, side=side, p=p, p_negligible=p_negligible, **more)


@pytest.mark.parametrize("side", [1, -1])
def test_the_rule_is_the_same_in_both_directions(side):
    tests = [of_kind(EFFECT, p, side) for p in (0.01, 0.2, None)]
    found = [decide([test], "")[0].answer for test in tests]
    assert found == [SUPPORTED if side > 0 else CONTRADICTED, UNDECIDED, NONE]


def test_an_effect_is_negligible_only_if_the_equivalence_test_says_so():
    found = [
        decide([of_kind(EFFECT, p, side, small)], "")[0].answer
        for side in (1, -1)
        for p, small in ((0.2, 0.01), (0.2, 0.2), (0.2, None), (0.01, 0.01))
    ]
    assert found[:3] == found[4:7] == [NEGLIGIBLE, UNDECIDED, UNDECIDED]
    assert (found[3], found[7]) == (SUPPORTED, CONTRADICTED)


def test_what_is_not_identified_gets_no_verdict_at_any_p():
    (found,) = decide([of_kind(EFFECT, 1e-9, reason="size", identified=False)], "")
    assert (found.answer, found.reason) == (NOT_IDENTIFIED, "size")


def test_primary_claims_are_corrected_for_their_own_number_and_come_first():
    tests = [of_kind(ACCURACY, 0.04), of_kind(FLATNESS, 0.04), of_kind(ACCURACY, 0.001)]
    tests += [of_kind(EFFECT, None), of_kind(EFFECT, 0.02)]
    found = decide(tests, FLATNESS)
    assert [(one.kind, one.primary) for one in found] == [
        (FLATNESS, True),
        *((kind, False) for kind in (ACCURACY, ACCURACY, EFFECT, EFFECT)),
    ]
    assert [one.p for one in found] == pytest.approx([0.04, 0.04, 0.003, None, 0.04])
    assert [one.p for one in decide(tests, "")] == pytest.approx([0.08, 0.08, 0.004, None, 0.06])
    assert not any(one.primary for one in decide(tests, ""))


def test_negligible_effects_are_corrected_for_their_number_too():
    tests = [of_kind(EFFECT, 0.5, p_negligible=p) for p in (0.03, 0.04, 0.0001)]
    assert [one.answer for one in decide(tests, "")] == [UNDECIDED, UNDECIDED, NEGLIGIBLE]


@pytest.mark.parametrize("ties", [False, True])
def test_one_test_a_claim_steps_down_as_holm_until_a_hypothesis_is_kept(ties):
    """Definition: reject the smallest p while p_(k) <= a / (m - k + 1); then reject no more."""
    random = np.random.default_rng(0)
    for m, _ in product(range(1, 8), range(20)):
        p_values = random.beta(0.3, 3, m)
        p_values = np.round(p_values, 2) if ties else p_values
        corrected = np.array(shaffer(p_values.tolist(), range(m)))
        for level in (0.003, 0.0501, 0.1501, 0.901):  # no product of m and p equals one of these
            rejected = np.zeros(m, bool)
            for k, place in enumerate(np.argsort(p_values, kind="stable")):
                if p_values[place] > level / (m - k):
                    break
                rejected[place] = True
            assert (corrected <= level).tolist() == rejected.tolist()


def test_hypotheses_that_exclude_each_other_count_once():
    """Reject the smallest p while p <= a / t; t hypotheses can be true among the remaining ones."""
    random = np.random.default_rng(0)
    for _ in range(100):
        claims = random.permutation([0, 0, 1, 1, 2, 3])
        p_values = random.beta(0.3, 3, len(claims))
        corrected = np.array(shaffer(p_values.tolist(), claims.tolist()))
        for level in (0.003, 0.05, 0.15, 0.9):
            rejected = np.zeros(len(claims), bool)
            for place in np.argsort(p_values):
                left = np.flatnonzero(~rejected)
                true = [
                    chosen
                    for size in range(1, len(left) + 1)
                    for chosen in combinations(left, size)
                    if len({*claims[[*chosen]]}) == size
                ]
                if p_values[place] > level / max(map(len, true)):
                    break
                rejected[place] = True
            assert (corrected <= level).tolist() == rejected.tolist()


@pytest.mark.parametrize("amount", [4000, *in_full(200_000)])
@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_holm_rejects_a_true_hypothesis_in_at_most_5_percent(amount, shared):
    """Of six hypotheses four are true; their p are independent, or correlated with 0.9."""
    random = np.random.default_rng(1)
    common, own = random.normal(size=(amount, 1)), random.normal(size=(amount, 6))
    z = np.sqrt(shared) * common + np.sqrt(1 - shared) * own + np.array([[4.0, 2.0, 0, 0, 0, 0]])
    p = 2 * special.ndtr(-np.abs(z))
    wrong = np.mean([min(shaffer(one, range(6))[2:]) < 0.05 for one in p.tolist()])
    print(f"any true hypothesis rejected, correlation {shared}: {wrong:.4f}")
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / amount)


@pytest.mark.parametrize("amount", [4000, *in_full(200_000)])
def test_claims_without_an_effect_and_at_the_margin_are_rarely_false_together(amount):
    """Two corrections, one for sides and one for negligible effects, err in 7 to 8%."""
    random = np.random.default_rng(1)
    effects, errors, margin = np.array([0.0, 0.5, 0.0]), np.array([0.1, 0.2, 0.2]), 0.5
    found = effects + errors * random.normal(size=(amount, 3))
    p_side = 2 * special.ndtr(-np.abs(found) / errors)
    p_small = special.ndtr((np.abs(found) - margin) / errors)
    wrong = 0
    for p, small, found_C in zip(p_side, p_small, found, strict=True):
        tests = [of_kind(EFFECT, *one) for one in zip(p, np.sign(found_C), small, strict=True)]
        tests[2] = of_kind(EFFECT, p[2], np.sign(found_C[2]))
        first, second, third = (one.answer for one in decide(tests, ""))
        sides = {SUPPORTED, CONTRADICTED}
        wrong += first in sides or second in {CONTRADICTED, NEGLIGIBLE} or third in sides
    print(f"any of three claims false: {wrong / amount:.4f}")
    assert wrong / amount <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / amount)


def test_the_invariant_trace_decides_and_the_embedded_one_stands_beside_it(sweep):
    effects = {"accuracy": 1.5, "log_trace": 0.3}
    verdicts = {
        effect: judge(read_comparison(sweep(**effects, log_invariant=effect)))
        for effect in (None, 0.3, -0.3)
    }
    assert [found[0].answer for found in verdicts.values()] == [SUPPORTED] * 3
    flat = {effect: found[1] for effect, found in verdicts.items()}
    assert {one.claim for one in flat.values()} == {FLATTER}
    assert [flat[effect].answer for effect in flat] == [CONTRADICTED, CONTRADICTED, SUPPORTED]
    assert "by the embedded trace" not in flat[None].evidence
    assert "by the embedded trace" in flat[0.3].evidence
    assert not flat[0.3].evidence.endswith(", the opposite")
    assert flat[-0.3].evidence.endswith(", the opposite")


def test_sizes_that_are_not_matched_get_no_verdict(sweep):
    found = judge(read_comparison(sweep(excess=0.02, steps=(1000,), accuracy=1.5)))[:2]
    assert [one.claim for one in found] == [ACCURATE, FLATTER]
    assert [one.answer for one in found] == [NONE] * 2
    assert {one.reason for one in found} == {"no pair is matched in excess loss"}


@pytest.mark.parametrize(
    ("effects", "reason"),
    [
        ({"seeds": 1}, "No verdict, because one seed gives no interval"),
        ({"widths": (16,)}, "No verdict, because the results hold models of one size only"),
        ({"steps": (1000,), "widths": (16,)}, "Not identified, because no setting's seeds have"),
        ({}, "Not identified, because flatness differs only with model.width"),
    ],
)
def test_where_there_is_no_verdict_the_reason_is_said(sweep, effects, reason):
    sentences = reason_sentences(judge(read_comparison(sweep(**effects))))
    assert any(one.startswith(reason) for one in sentences)
    assert "nan" not in " ".join(sentences)


def test_a_claim_and_its_reverse_are_worded_alike(tmp_path):
    found = [
        judge(read_comparison(write_table(tmp_path, seed=3, size=size)))[0] for size in (3.0, -3.0)
    ]
    assert [one.answer for one in found] == [SUPPORTED, CONTRADICTED]
    assert len({(one.claim, one.statistic, one.subject) for one in found}) == 1
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


@pytest.mark.parametrize("fall", [0.94, 1.06])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_trace_that_follows_the_loss_does_not_fall_at_equal_loss(tmp_path, fall, exponent):
    """The losses of the ends are equal within the margin of 10%, and the scatter is tiny."""
    path = write_noise(tmp_path, 1.0, 1.0) / "results.csv"
    random = np.random.default_rng(1)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        loss = fall if (row["phases.drift.targets"], row["step"]) == ("sampled", "200") else 1.0
        noise = 1 + 0.001 * random.normal(size=2)
        row["excess_loss"], row["hessian_trace@embedded"] = (
            0.004 * loss * noise[0],
            40 * loss**exponent * noise[1],
        )
    write_rows(path, rows)
    assert answers(tmp_path)[CLAIM] == UNDECIDED


def test_the_control_has_to_be_matched(tmp_path):
    assert answers(write_noise(tmp_path, 0.3, 1.0, excess=0.03))[CLAIM] == NONE


def test_sweeps_without_the_control_are_not_asked(sweep):
    assert CLAIM not in answers(sweep())


@pytest.mark.parametrize("arms", [["sampled"], ["sampled", "exact"]], ids=str)
def test_an_extra_checkpoint_in_one_seed_leaves_the_verdict_on_label_noise(tmp_path, arms):
    path = write_noise(tmp_path, 0.3, 1.0) / "results.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    extended = [f"{targets},0" for targets in arms]
    rows = [row | {"last": int(row["point"] not in extended)} for row in rows]
    ends = [row for row in rows if not row["last"] and row["step"] == "200"]
    write_rows(path, rows + [row | {"step": 300, "last": 1} for row in ends])
    assert answers(tmp_path)[CLAIM] == SUPPORTED
