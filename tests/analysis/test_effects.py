"""The effect of flatness is found in contrasts that identify it, and nowhere else."""

from itertools import product

import numpy as np
import pytest

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.comparison import compare
from jaxflat.analysis.effects import contrast_effect, effect_tests
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY, Row
from jaxflat.analysis.statistics.intervals import quotient_interval
from jaxflat.analysis.verdicts import (
    CONTRADICTED,
    NEGLIGIBLE,
    NONE,
    NOT_IDENTIFIED,
    SUPPORTED,
    UNDECIDED,
    decide,
)
from tests.support.claims import ACROSS, WITHIN
from tests.support.counts import in_full
from tests.support.simulation import PROBE, TRACE, Arm, ladder_rows, share_covering

STRENGTH = "phases.dial.flatness_penalty.strength"
MEASURE = "phases.dial.flatness_penalty.measure"
TARGETS = "phases.dial.targets"
RATE, BATCH, WIDTH = "phases.dial.learning_rate", "phases.dial.batch_size", "model.width"
PENALTY = "At equal excess loss a trace that the penalty lowers raises accuracy"
LATENT = PROBE.replace("map", "latent")
NOISE = "At equal excess loss a trace that label noise lowers raises accuracy"
DECIDED = (SUPPORTED, CONTRADICTED, NEGLIGIBLE)
FEW = pytest.param(1000, marks=pytest.mark.slow)


def judged(rows):
    """Return the verdicts on effects, each corrected for itself alone."""
    return {
        test.claim: verdict
        for test in effect_tests(compare(rows))
        for verdict in decide([test], "effect")
    }


def share(amount, claim, make_rows, wrong):
    """Return how often the claim's answer is one of `wrong`, and print all answers."""
    random = np.random.default_rng(0)
    answers = [judged(make_rows(random))[claim].answer for _ in range(amount)]
    print(f"{claim}: { ({one: answers.count(one) / amount for one in sorted({*answers})}) }")
    return np.mean([one in wrong for one in answers])


def allowed(amount, level=0.05):
    """Return 7% in the full count, and for few sweeps the level with three binomial errors."""
    return 0.07 if amount >= 1000 else level + 3 * np.sqrt(level * (1 - level) / amount)


def doses(strengths, halvings, slope=0.0, **swept):
    return [
        Arm({STRENGTH: str(strength), **swept}, points=slope * one, halvings=one)
        for strength, one in zip(strengths, halvings, strict=True)
    ]


def random_rows(arms, seed=0, **more):
    return ladder_rows(np.random.default_rng(seed), arms, **more)


@pytest.mark.parametrize(
    ("slope", "answer"),
    [(1.0, SUPPORTED), (0.0, NEGLIGIBLE), (-1.0, CONTRADICTED)],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_doses_have_an_effect_none_or_its_reverse_wherever_the_baseline_stands(
    slope, answer, order
):
    arms = doses((0, 1e-5, 1e-4), (0.0, 1.5, 2.5), slope)
    (found,) = [
        one
        for claim, one in judged(random_rows([arms[place] for place in order])).items()
        if claim == PENALTY
    ]
    assert found.answer == answer
    assert float(found.evidence.split()[0].replace("−", "-")) == pytest.approx(slope, abs=0.3)


def test_doses_of_both_signs_are_one_claim():
    arms = doses((-1e-5, 0, 1e-5), (-1.0, 0.0, 1.5), slope=1.0)
    found = judged(random_rows(arms))
    assert [*found] == [PENALTY, WITHIN]
    assert found[PENALTY].answer == SUPPORTED


@pytest.mark.parametrize("amount", [12, *in_full(pytest.param(500, marks=pytest.mark.slow))])
@pytest.mark.parametrize("slope", [1.0, -1.0, 0.0])
def test_the_power_at_eight_seeds(amount, slope):
    """An effect of 1 point per halving, or none: at least 90%."""
    arms = doses((0, 1e-5, 1e-4), (0.0, 1.0, 1.5), slope)
    right = {1.0: SUPPORTED, -1.0: CONTRADICTED, 0.0: NEGLIGIBLE}[slope]
    power = share(amount, PENALTY, lambda random: ladder_rows(random, arms), [right])
    assert power >= 0.9 - 3 * np.sqrt(0.9 * 0.1 / amount) * (amount < 100)


def contrast(arm, halvings_S, points_S):
    rows = {
        str(seed): Row(
            arm,
            {},
            str(seed),
            1,
            projected=True,
            values={TRACE: 100 * 2.0**-h, PRIMARY_ACCURACY: 0.9 + 0.01 * y},
        )
        for seed, (h, y) in enumerate(zip(halvings_S, points_S, strict=True))
    }
    return Cell(arm, 1, rows)


def draw_contrasts(random, slope, scatter, causal, doses_D=(1.0, 2.0), seeds=8):
    """Draw contrasts with one baseline; accuracy follows each run's trace, or the dose alone."""
    shape = (len(doses_D) + 1, seeds)
    mean_DxS = np.array([[0.0], *([one] for one in doses_D)]) + np.zeros((1, seeds))
    halvings_DxS = mean_DxS + scatter[0] * random.normal(size=shape)
    cause_DxS = halvings_DxS if causal else mean_DxS
    points_DxS = slope * cause_DxS + scatter[1] * random.normal(size=shape)
    baseline, *others = map(contrast, "abc", halvings_DxS, points_DxS)
    return [(baseline, other) for other in others]


@pytest.mark.parametrize("amount", [200, *in_full(pytest.param(4000, marks=pytest.mark.slow))])
@pytest.mark.parametrize("slope", [0.5, -0.5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scatter", [(0.1, 0.3), (0.3, 0.05)], ids=str)
def test_an_effect_of_exactly_the_margin_is_rarely_called_negligible(
    amount, slope, causal, scatter
):
    """Also where the traces scatter more than the accuracies, in halvings and points."""
    random = np.random.default_rng(2)
    tests = [
        contrast_effect("", draw_contrasts(random, slope, scatter, causal), 0.5, 100.0)
        for _ in range(amount)
    ]
    wrong = np.mean([(test.p_negligible or 0.0) < 0.05 for test in tests])
    print(f"negligible at {slope}: {wrong:.4f}")
    assert wrong <= allowed(amount)


def test_the_effect_is_the_regression_on_mean_halvings():
    random = np.random.default_rng(3)
    contrasts = draw_contrasts(random, 0.8, (0.2, 0.3), causal=True)
    test = contrast_effect("", contrasts, 0.5, 100.0)
    log2, points = (
        np.array([[f(cell.by_seed(name)[s]) for s in map(str, range(8))] for cell in cells])
        for f, name, cells in (
            (lambda trace: -np.log2(trace), TRACE, [contrasts[0][0], *(b for _, b in contrasts)]),
            (lambda y: 100 * y, PRIMARY_ACCURACY, [contrasts[0][0], *(b for _, b in contrasts)]),
        )
    )
    x_D, y_D = ((one[1:] - one[:1]).mean(1) for one in (log2, points))
    expected = np.linalg.lstsq(x_D[:, None], y_D)[0][0]
    assert test.evidence.startswith(f"{expected:+.2f} (")


@pytest.mark.parametrize("amount", [25, *in_full(FEW)])
def test_a_penalty_that_does_not_move_the_trace_identifies_no_effect(amount):
    arms = doses((0, 1e-5, 1e-4), (0.0, 0.0, 0.0))
    identified = share(
        amount, PENALTY, lambda random: ladder_rows(random, arms), [UNDECIDED, *DECIDED]
    )
    assert identified <= allowed(amount)
    found = judged(random_rows(arms))[PENALTY]
    assert (found.answer, found.p) == (NOT_IDENTIFIED, None)
    assert found.reason.startswith("the contrast is not shown to change the trace")


def test_traces_too_near_for_a_verdict_that_there_is_no_effect():
    """The ratio's interval has to lie above 1.5, so a null is not extrapolated."""
    near, wide = (
        [judged(random_rows(doses((0, 1e-5), (0.0, one)), seed))[PENALTY] for seed in range(8)]
        for one in (0.5, 1.5)
    )
    assert NEGLIGIBLE not in {one.answer for one in near}
    assert [one.answer for one in wide].count(NEGLIGIBLE) > 5


@pytest.mark.parametrize(("probe", "ceiling"), [(PROBE, 1.0), (LATENT, 0.9)])
def test_accuracies_at_their_ceiling_do_not_show_that_an_effect_is_negligible(probe, ceiling):
    """Halving the trace causes a point, but all accuracies are cut off at their ceiling."""
    found = []
    for seed, room in product(range(8), (0.0, 0.05)):
        rows = random_rows(doses((0, 1e-5), (0.0, 1.5), slope=bool(not room)), seed)
        for row in rows:
            accuracy = min(row.values.pop(PROBE) - 0.88 + ceiling, ceiling) - room
            row.values.update({probe: accuracy, "bayes/state_3.latent": ceiling})
        found.append(judged(rows)[PENALTY].answer)
    assert NEGLIGIBLE not in found[::2]
    assert found[1::2].count(NEGLIGIBLE) > 5


def test_penalties_on_two_measures_are_two_claims():
    """Each against strength 0: one has an effect, and the other its reverse."""
    arms = [
        *doses((0, 1e-5, 1e-4), (0.0, 1.5, 2.5), 1.0, **{MEASURE: "hessian_trace"}),
        *doses((1e-2, 1e-1), (1.2, 2.0), -1.0, **{MEASURE: "gauss_newton_trace"}),
    ]
    found = judged(random_rows(arms))
    for measure, answer in (("hessian trace", SUPPORTED), ("gauss newton trace", CONTRADICTED)):
        claim = f"At equal excess loss a trace that a penalty on {measure} lowers raises accuracy"
        assert found[claim].answer == answer


def test_doses_of_several_settings_are_one_claim():
    """Each dose is compared with the baseline of its own setting."""
    arms = [
        Arm({WIDTH: width, STRENGTH: strength}, h + more, h + more, num_params=float(width))
        for width, more in (("16", 0.0), ("32", -1.0))
        for strength, h in (("0", 0.0), ("1e-5", 1.5))
    ]
    found = judged(random_rows(arms))
    assert found[PENALTY].answer == SUPPORTED
    assert "supported" not in found[PENALTY].statistic
    ratio = float(found[PENALTY].statistic.split("differ by ")[1].split("×")[0])
    assert ratio == pytest.approx(2**1.5, rel=0.1)


def test_a_dose_whose_loss_does_not_overlap_is_left_out():
    arms = doses((0, 1e-5, 1e-4), (0.0, 1.5, 2.5), slope=1.0)
    far = [*arms[:2], Arm(arms[2].swept, points=-9.0, halvings=2.5, excess=9.0)]
    found = judged(random_rows(far))[PENALTY]
    assert found.answer == SUPPORTED
    assert "differ by 2." in found.statistic  # 1.5 halvings, not 2.5
    alone = judged(random_rows([far[0], far[2]]))[PENALTY]
    assert (alone.answer, alone.reason) == (NONE, "no pair is matched in excess loss")


def test_doses_without_a_baseline_say_so():
    arms = doses((1e-5, 1e-4), (1.5, 2.5))
    found = judged(random_rows(arms))[PENALTY]
    assert (found.answer, found.reason) == (NONE, "no arm has strength 0, the baseline")


@pytest.mark.parametrize(
    ("slope", "answer"), [(1.0, SUPPORTED), (0.0, NEGLIGIBLE), (-1.0, CONTRADICTED)]
)
def test_label_noise_against_exact_targets_is_a_contrast(slope, answer):
    arms = [
        Arm({TARGETS: targets, RATE: rate}, points=slope * h, halvings=h, excess=excess)
        for rate, excess in (("1e-3", 1.0), ("3e-3", 1.2))
        for targets, h in (("sampled", 1.5), ("exact", 0.0))
    ]
    found = judged(random_rows(arms, seed=1))
    assert [*found] == [NOISE, WITHIN]
    assert found[NOISE].answer == answer


@pytest.mark.parametrize("slope", [12.0, -12.0])
def test_an_association_within_settings_is_found(slope):
    settings = [Arm({"x": str(place)}, points=place) for place in range(3)]
    found = judged(random_rows(settings, slope=slope, noise=0.3))[WITHIN]
    assert found.answer == (SUPPORTED if slope > 0 else CONTRADICTED)
    assert found.statistic.endswith("permutations of 8 seeds of 3 settings")


@pytest.mark.parametrize("amount", [40, *in_full(FEW)])
@pytest.mark.parametrize("seeds", [5, 8])
def test_what_loss_alone_drives_is_no_association_within_settings(amount, seeds):
    """Runs reach losses that differ by 30%, which set accuracy and trace."""
    arms = [Arm({"x": str(place)}, excess=1.0 + place / 10) for place in range(2)]

    def rows(random):
        return ladder_rows(random, arms, seeds, scatter=3.0, noise=1.0, loss_noise=0.02)

    assert share(amount, WITHIN, rows, DECIDED) <= allowed(amount)


def test_few_seeds_allow_no_test_within_settings():
    found = judged(random_rows([Arm({"x": "1"}), Arm({"x": "2"})], seeds=4))[WITHIN]
    assert (found.answer, found.reason) == (
        NONE,
        "it needs 5 seeds of one language, and there are 4 in all",
    )


def test_settings_that_differ_in_several_keys_are_described():
    """What makes a setting flat may make it accurate, however many settings there are."""
    arms = [
        Arm({RATE: str(rate), BATCH: str(batch)}, points=rate - batch, halvings=rate - batch)
        for rate, batch in product(range(4), range(2))
    ]
    found = judged(random_rows(arms, seeds=5, rungs=(1000, 4000)))[ACROSS]
    assert (found.answer, found.p) == (NOT_IDENTIFIED, None)
    assert found.reason == f"flatness differs only with {RATE}, {BATCH}"


def test_one_swept_key_is_named_as_that_with_which_flatness_differs():
    arms = [Arm({RATE: str(place)}, place, place) for place in range(8)]
    found = judged(random_rows(arms, seeds=5, rungs=(1000, 4000)))[ACROSS]
    assert (found.answer, found.p) == (NOT_IDENTIFIED, None)
    assert found.reason == f"flatness differs only with {RATE}"


@pytest.mark.parametrize("amount", [200, *in_full(pytest.param(4000, marks=pytest.mark.slow))])
@pytest.mark.parametrize("scatter", [(0.1, 0.3), (0.5, 0.05)], ids=str)
def test_the_interval_of_an_effect_covers_it(amount, scatter):
    random, covered = np.random.default_rng(6), []
    for _ in range(amount):
        contrasts = draw_contrasts(random, 0.8, scatter, causal=False)
        halvings, gains = (
            np.array([[f(b.by_seed(n)[s], a.by_seed(n)[s]) for s in a.rows] for a, b in contrasts])
            for n, f in (
                (TRACE, lambda b, a: np.log2(a / b)),
                (PRIMARY_ACCURACY, lambda b, a: 100 * (b - a)),
            )
        )
        w_D = halvings.mean(1) / (halvings.mean(1) ** 2).sum()
        covered.append(quotient_interval(w_D @ gains, w_D @ halvings))
    found = share_covering(covered, 0.8)
    print(f"coverage of an effect, scatter {scatter}: {found:.4f}")
    chance = 0.0 if amount >= 4000 else 3 * np.sqrt(0.95 * 0.05 / amount)
    assert 0.93 - chance <= found <= 0.97 + chance


@pytest.mark.parametrize(
    ("points", "answers"),
    [
        ((-1.0, -1.0), (UNDECIDED, NONE)),
        ((-2.0, -2.0), (UNDECIDED, NONE)),
        ((1.0, -1.0), (CONTRADICTED,)),
        ((0.0, 0.0), (NEGLIGIBLE,)),
    ],
    ids=str,
)
def test_doses_whose_gains_cancel_are_not_negligible(points, answers):
    """Doses of -1 and +1 halvings: a hump has slope 0, but each dose changes accuracy."""
    arms = [Arm({STRENGTH: "0.0"})]
    arms += [
        Arm({STRENGTH: text}, points=gain, halvings=halvings)
        for text, gain, halvings in zip(("-1.0", "1.0"), points, (-1.0, 1.0), strict=True)
    ]
    assert judged(random_rows(arms, seeds=8))[PENALTY].answer in answers
