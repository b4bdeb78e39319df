"""Draw made-up results of a sweep around a known truth.

At a checkpoint with excess loss e, a run of arm a has, in natural logarithms and in points,

    log trace = log 100 + arm + size log2(P_a / P_0) + dose d_a + excess log(e / 0.003) + error
    accuracy  = 90 + arm + size log2(P_a / P_0) + excess log(e / 0.003)
                - slope log2(trace / 100) + outlier + error

where arm a has P_a parameters and the first arm has P_0. So halving the trace causes `slope` points
of accuracy. An error of measurement changes only the value in which it is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from jaxflat.analysis.results_csv import OF_LANGUAGE, Row

ACCURACY, TRACE, EXCESS = 90.0, 100.0, 0.003  # the values without effects; points, -, nats
TASKS, SHOTS = ("state_3", "state_6"), (200, 4000)
PROBES = ("linear_probe", "linear_probe_projected")
SHARPNESS_COLUMNS = tuple(f"hessian_trace{at}" for at in ("", "@embedded", "@embedded_invariant"))


@dataclass(frozen=True)
class SyntheticArm:
    """Runs that differ only in their seed, and the effects planted in them.

    Each run is measured at `steps`, where its excess losses are `excess_losses` (nats) up to noise;
    `projected` says so for each step, "()" for none. Seeds of several parts ("0/1/2") are crossed.
    `accuracy` (points) and `log_trace` are effects of the arm, and `dose` multiplies the effect of
    a dose. `rescaling` is the logarithm of embedded over invariant trace. Probes see each number of
    labelled sentences in `shots`. All `sharpness_columns` have the trace of the equations. Without
    `has_optimum` no row has its excess loss. `name` is the arm's name, "" for none.
    """

    swept: Mapping[str, str]
    seeds: Sequence[str]
    steps: Sequence[int]
    excess_losses: Sequence[float]
    num_params: float = 1e4
    projected: Sequence[bool] = ()
    accuracy: float = 0.0
    log_trace: float = 0.0
    dose: float = 0.0
    rescaling: float = 0.0
    shots: Sequence[int] = SHOTS
    sharpness_columns: Sequence[str] = SHARPNESS_COLUMNS
    has_optimum: bool = True
    name: str = ""


@dataclass(frozen=True)
class Noise:
    """Standard deviations of normal errors: one draw an arm, a seed (for all arms), a run and a
    checkpoint.

    Crossed seeds share the draws of their parts: a run's error is the sum of one draw for each part
    that varies, and has the given standard deviation.
    """

    setting: float = 0.0
    seed: float = 0.0
    run: float = 0.0
    measurement: float = 0.0


@dataclass(frozen=True)
class PlantedTruth:
    """Effects, as in the equations of this file, and noise.

    By default there is no effect, and the noise is typical of the shipped sweeps. A run is an
    outlier with `outlier_probability`: `outlier` points are added to its accuracies.
    """

    slope: float = 0.0
    size_accuracy: float = 0.0
    size_log_trace: float = 0.0
    excess_accuracy: float = 0.0
    excess_log_trace: float = 0.0
    dose_log_trace: float = 0.0
    outlier_probability: float = 0.0
    outlier: float = 0.0
    accuracy: Noise = field(default=Noise(seed=0.4, run=0.4, measurement=0.1))
    log_trace: Noise = field(default=Noise(seed=0.05, run=0.1, measurement=0.02))
    log_excess: Noise = field(default=Noise(run=0.05, measurement=0.01))


@dataclass(frozen=True)
class SyntheticSweep:
    """The rows, and the planted values of the A arms at equal excess loss, without outliers."""

    rows: list[Row]
    accuracy_A: np.ndarray  # points
    log_trace_A: np.ndarray


def draw_sweep(
    arms: Sequence[SyntheticArm], truth: PlantedTruth, random: np.random.Generator
) -> SyntheticSweep:
    """Draw one sweep; the same generator state gives the same rows."""
    seeds = list(dict.fromkeys(seed for arm in arms for seed in arm.seeds))
    noises = (truth.log_excess, truth.log_trace, truth.accuracy)
    shared = [dict(zip(seeds, _by_seed(random, seeds, n.seed), strict=True)) for n in noises]
    rows: list[Row] = []
    accuracy_A, log_trace_A = np.zeros(len(arms)), np.zeros(len(arms))
    for a, arm in enumerate(arms):
        size = np.log2(arm.num_params / arms[0].num_params)
        log_trace_A[a] = (
            arm.log_trace
            + truth.size_log_trace * size
            + truth.dose_log_trace * arm.dose
            + truth.log_trace.setting * random.normal()
        )
        own = arm.accuracy + truth.size_accuracy * size + truth.accuracy.setting * random.normal()
        accuracy_A[a] = own - truth.slope * log_trace_A[a] / np.log(2)
        parts = [
            np.array([found[seed] for seed in arm.seeds]) + _by_seed(random, arm.seeds, noise.run)
            for found, noise in zip(shared, noises, strict=True)
        ]
        excess_Sx1, trace_Sx1, accuracy_Sx1 = (part[:, None] for part in parts)
        excess_Sx1 = excess_Sx1 + truth.log_excess.setting * random.normal()
        log_excess_SxK = np.log(arm.excess_losses)[None, :] + excess_Sx1
        relative_SxK = log_excess_SxK - np.log(EXCESS)
        log_trace_SxK = log_trace_A[a] + trace_Sx1 + truth.excess_log_trace * relative_SxK
        outliers_Sx1 = random.random((len(arm.seeds), 1)) < truth.outlier_probability
        accuracy_SxK = own + accuracy_Sx1 + truth.excess_accuracy * relative_SxK
        accuracy_SxK += truth.outlier * outliers_Sx1 - truth.slope * log_trace_SxK / np.log(2)
        true = (log_excess_SxK, np.log(TRACE) + log_trace_SxK, ACCURACY + accuracy_SxK)
        measured = (
            values + noise.measurement * random.normal(size=values.shape)
            for values, noise in zip(true, noises, strict=True)
        )
        rows += _rows(arm, truth, *measured)
    return SyntheticSweep(rows, accuracy_A, log_trace_A)


def _by_seed(random: np.random.Generator, seeds: Sequence[str], deviation: float) -> np.ndarray:
    """Return an error for each seed: the sum of one draw for each part of a seed that varies."""
    errors_S, num_parts = np.zeros(len(seeds)), 0
    for part_S in zip_longest(*(seed.split("/") for seed in seeds), fillvalue=""):
        names, of_seed_S = np.unique(part_S, return_inverse=True)
        if len(names) > 1 or len(seeds) == 1:
            errors_S += random.normal(size=len(names))[of_seed_S]
            num_parts += 1
    return deviation * errors_S / max(num_parts, 1) ** 0.5


def _rows(
    arm: SyntheticArm,
    truth: PlantedTruth,
    log_excess_SxK: np.ndarray,
    log_trace_SxK: np.ndarray,
    accuracy_SxK: np.ndarray,
) -> list[Row]:
    """Return a row for each seed and checkpoint, as `read_results` would."""
    excess_SxK, invariant_SxK = np.exp(log_excess_SxK), np.exp(log_trace_SxK)
    embedded_SxK = invariant_SxK * np.exp(arm.rescaling)
    text, rows = ",".join(arm.swept.values()), []
    kinds = [*arm.projected] or [False] * len(arm.steps)
    probes = [(probe, task, shots) for probe in PROBES for task in TASKS for shots in arm.shots]
    for s, seed in enumerate(arm.seeds):
        for k, step in enumerate(arm.steps):
            excess, accuracy = float(excess_SxK[s, k]), float(accuracy_SxK[s, k]) / 100
            values = {"num_params": float(arm.num_params), "loss": 2.5 + excess}
            if arm.has_optimum:
                values |= {"optimal_loss": 2.5, "excess_loss": excess}
                values["excess_loss_sem"] = truth.log_excess.measurement * excess
            for name in arm.sharpness_columns:
                trace_SxK = invariant_SxK if name.endswith("_invariant") else embedded_SxK
                values[name] = trace = float(trace_SxK[s, k])
                values[f"{name}_sem"] = truth.log_trace.measurement * trace
            for probe, task, shots in probes:
                name = f"{probe}/{task}.map/{shots}"
                values[name] = accuracy - 0.08 * (shots == min(arm.shots))
                values[f"{name}_sem"] = truth.accuracy.measurement / 100
            last = kinds[k] not in kinds[k + 1 :]
            language = seed.partition(OF_LANGUAGE)[2]
            about = f"{text},{seed}", dict(arm.swept), seed, step, kinds[k]
            rows.append(Row(*about, values, last, language, arm.name))
    return rows
