"""Made-up sweeps of known truth, on which verdicts are counted: mostly ones without an effect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log

from jaxflat.analysis.synthetic import Noise, PlantedTruth, SyntheticArm
from jaxflat.analysis.verdicts import ACCURACY, EFFECT, LABEL_NOISE

STEPS, LADDER = (1000, 1400, 2000, 2800), (0.0080, 0.0056, 0.0040, 0.0028)  # nats
FIVE, EIGHT = tuple("01234"), tuple("01234567")
CROSSED = tuple(f"0/{data}/{init}" for data in range(5) for init in range(5))
HALVINGS = {"0.0": 0.0, "1e-05": 0.5, "0.0001": 1.0}  # of the trace, by the penalty's strength
NULL = PlantedTruth()
# Doses continue from one checkpoint a seed and share its noise.
DOSED = replace(NULL, dose_log_trace=-log(2), accuracy=Noise(seed=0.4, run=0.2, measurement=0.1))
NOISY = replace(DOSED, accuracy=Noise(seed=0.4, run=0.3, measurement=0.1))


@dataclass(frozen=True)
class Scenario:
    """Arms and the truth about them, see `draw_sweep`; and the declared kind of primary claim."""

    name: str
    arms: Sequence[SyntheticArm]
    truth: PlantedTruth
    primary: str = ACCURACY


def scenarios() -> list[Scenario]:
    """Return the rows of the table of false verdicts, in order."""
    sizes, five = _sizes(FIVE), _settings(5)
    noisy_loss = Noise(run=0.1, measurement=0.01)
    driven = replace(NULL, excess_accuracy=-2.0, excess_log_trace=1.0, log_excess=noisy_loss)
    wide = Noise(seed=0.05, run=0.3, measurement=0.02)
    raised = replace(NULL, slope=1.0, size_accuracy=1.0, size_log_trace=0.2, log_trace=wide)
    return [
        Scenario("nothing differs: 3 widths", sizes, NULL),
        Scenario("settings differ by 2 sd: 5 settings", five, _setting_sd(2)),
        Scenario("settings differ by 4 sd: 5 settings", five, _setting_sd(4)),
        Scenario("settings differ by 2 sd: 8 settings", _settings(8), _setting_sd(2)),
        Scenario("settings differ by 4 sd: 8 settings", _settings(8), _setting_sd(4)),
        Scenario("one of 5 settings is less accurate", _one_worse(five), _setting_sd(0, 2)),
        Scenario("loss drives both: 5 settings", _at_unequal_losses(five), driven),
        Scenario("crossed data and init seeds: 3 widths", _sizes(CROSSED), NULL),
        Scenario("flatter is better, size raises both", sizes, raised),
        Scenario("outliers: 3 widths", sizes, _with_outliers(NULL)),
        Scenario("rescaled only: 3 widths", _rescaled(sizes), NULL),
        Scenario("label noise changes nothing", _label_noise(), NULL, LABEL_NOISE),
        Scenario("doses, slope 0", _doses(), DOSED, EFFECT),
        Scenario("doses, slope 0, outliers", _doses(), _with_outliers(DOSED), EFFECT),
        Scenario(
            "doses, slope 0, doses raise the loss",
            _at_unequal_losses(_doses()),
            replace(DOSED, excess_accuracy=-2.0, excess_log_trace=0.5),
            EFFECT,
        ),
        Scenario("doses, slope 0.5", _doses(), replace(DOSED, slope=0.5), EFFECT),
        Scenario("doses, slope -0.5", _doses(), replace(DOSED, slope=-0.5), EFFECT),
        Scenario("doses, slope 1", _doses(), replace(DOSED, slope=1.0), EFFECT),
        Scenario("two penalties, slopes 0 and 0.5; two controls", _penalties(), NOISY, EFFECT),
    ]


def _arm(swept: Mapping[str, str], seeds: Sequence[str]) -> SyntheticArm:
    return SyntheticArm(swept, seeds, STEPS, LADDER)


def _sizes(seeds: Sequence[str]) -> list[SyntheticArm]:
    key, widths = "model.width", (16, 32, 64)
    return [replace(_arm({key: str(w)}, seeds), num_params=60.0 * w**2) for w in widths]


def _settings(count: int) -> list[SyntheticArm]:
    """Return settings of one size that differ in learning rate and batch size."""
    rate, batch = "phases.pretrain.schedule.learning_rate", "phases.pretrain.batch_size"
    grid = [(r, b) for r in ("0.001", "0.003") for b in ("16", "64", "256", "1024")]
    return [_arm({rate: r, batch: b}, FIVE) for r, b in grid[:count]]


def _doses() -> list[SyntheticArm]:
    key = "phases.dial.flatness_penalty.strength"
    return [replace(_arm({key: text}, EIGHT), dose=dose) for text, dose in HALVINGS.items()]


def _penalties() -> list[SyntheticArm]:
    """Return two penalties that halve the trace, one without an effect, and controls that do not.

    The slope of the second penalty is exactly the margin of a negligible effect.
    """
    section = "phases.dial.flatness_penalty"

    def penalty(measure: str, strength: str, **planted: float) -> SyntheticArm:
        swept = {f"{section}.measure": measure, f"{section}.strength": strength}
        return replace(_arm(swept, EIGHT), **planted)

    return [
        penalty("", "0.0"),
        penalty("gauss_newton_trace", "0.0001", dose=1.0),
        penalty("hessian_max_eigenvalue", "0.001", dose=1.0, accuracy=0.5),
        penalty("parameter_norm", "3e-05"),
        penalty("feature_rank", "0.003"),
    ]


def _label_noise() -> list[SyntheticArm]:
    """Return arms whose projected checkpoints have the same loss at start and end."""
    arms = [_arm({"phases.continue.targets": text}, FIVE) for text in ("sampled", "exact")]
    same = {"excess_losses": (0.003,) * len(STEPS), "projected": (True,) * len(STEPS)}
    return [replace(arm, **same) for arm in arms]


def _setting_sd(factor: float, of_trace: float | None = None) -> PlantedTruth:
    """Return a truth in which settings differ by multiples of the standard deviation of runs."""
    of_trace = factor if of_trace is None else of_trace
    accuracy = replace(NULL.accuracy, setting=factor * NULL.accuracy.run)
    log_trace = replace(NULL.log_trace, setting=of_trace * NULL.log_trace.run)
    return replace(NULL, accuracy=accuracy, log_trace=log_trace)


def _with_outliers(truth: PlantedTruth) -> PlantedTruth:
    """Return a truth with outliers of -5 standard deviations of runs."""
    return replace(truth, outlier_probability=0.2, outlier=-5 * truth.accuracy.run)


def _one_worse(arms: Sequence[SyntheticArm]) -> list[SyntheticArm]:
    return [*arms[:-1], replace(arms[-1], accuracy=-5 * NULL.accuracy.run)]


def _rescaled(arms: Sequence[SyntheticArm]) -> list[SyntheticArm]:
    return [replace(arm, rescaling=0.4 * a) for a, arm in enumerate(arms)]


def _at_unequal_losses(arms: Sequence[SyntheticArm]) -> list[SyntheticArm]:
    """Return the arms with excess losses raised by 1.1 from each arm to the next."""
    return [
        replace(arm, excess_losses=tuple(1.1**a * e for e in arm.excess_losses))
        for a, arm in enumerate(arms)
    ]
