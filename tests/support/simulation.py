"""Simulate many sweeps: of 5 seeds, 3 sizes and 2 checkpoints, or of arms along a ladder."""

from dataclasses import dataclass

import numpy as np

from jaxflat.analysis.results_csv import Row

SEEDS, SIZES, STEPS = 5, 3, 2
TRACE, PROBE = "hessian_trace@embedded_invariant", "linear_probe/state_3.map/4000"
LOSSES = np.array([0.0052, 0.0039])  # of each size's two checkpoints: matched by design


def nested(random, num_sweeps, seed=1.0, run=1.0, checkpoint=1.0):
    """Draw errors with a part per seed, a part per run and a part per checkpoint."""
    shape = (num_sweeps, SEEDS, SIZES, STEPS)
    return (
        seed * random.normal(size=(*shape[:2], 1, 1))
        + run * random.normal(size=(*shape[:3], 1))
        + checkpoint * random.normal(size=shape)
    )


def sweeps(random, num_sweeps, size=0.0, slope=0.0):
    """Draw (log sharpness, accuracy), each num_sweeps x seeds x sizes x checkpoints.

    Values are in units of the noise. Each step in size adds `size` to accuracy and subtracts it
    from log sharpness. Each unit of log sharpness adds `slope` to accuracy.
    """
    steps = np.arange(SIZES)[:, None]
    sharpness = nested(random, num_sweeps) - size * steps
    return sharpness, nested(random, num_sweeps) + size * steps + slope * sharpness


def rows_of(random, sharpness_AxKxC, accuracy_AxKxC):
    """Return one sweep as the rows of its results.csv."""
    rows = []
    for s in range(SEEDS):
        for k, width in enumerate((16, 32, 64)):
            for c in range(STEPS):
                values = {
                    "num_params": 60.0 * width**2,
                    "excess_loss": LOSSES[c] + random.normal(0, 1e-4),
                    "hessian_trace@embedded": 80 * np.exp(0.05 * sharpness_AxKxC[s, k, c]),
                    PROBE: 0.9 + 0.004 * accuracy_AxKxC[s, k, c],
                }
                swept = {"model.width": str(width), "model.name": "transformer"}
                rows.append(Row(f"{width},{s}", swept, str(s), 1000 * (c + 1), True, values))
    return rows


def share_covering(intervals, truth):
    return np.mean([one.low <= truth <= one.high for one in intervals])


def share_off(intervals, null=0.0):
    """Return how often an interval lies entirely on one side of `null`."""
    return np.mean([one.side(null) != 0 for one in intervals])


@dataclass(frozen=True)
class Arm:
    """An arm of a simulated sweep. `points` and `halvings` are its effects at equal excess loss.

    points: of accuracy; halvings: of the trace; excess: a factor of the excess loss.
    """

    swept: dict[str, str]
    points: float = 0.0
    halvings: float = 0.0
    excess: float = 1.0
    num_params: float = 1000.0


def ladder_rows(
    random,
    arms,
    seeds=8,
    rungs=(1000, 2000, 4000, 8000),
    noise=1.0,
    scatter=1.0,
    loss_noise=0.01,
    slope=0.0,
    draw=None,
):
    """Return the rows of runs that are measured along a ladder of checkpoints.

    At the excess loss e, accuracy is 90 - 2 ln(e / 0.01) points, and the trace 100 sqrt(e / 0.01),
    apart from the arm's effects. Accuracy also rises by `slope` points per halving of the trace.
    Accuracy scatters by 0.3 points, and the trace by 0.1 halvings, each between seeds, runs and
    checkpoints. The true excess losses of two runs scatter by 10%, and their measurements by
    `loss_noise`. noise, scatter: factors of the scatter of checkpoints, and of seeds and runs.
    """
    draw = draw or random.normal
    shape = (len(arms), seeds, len(rungs))

    def scattered():
        runs = draw(size=(1, seeds, 1)) + draw(size=(*shape[:2], 1))
        return scatter * runs + noise * draw(size=shape)

    factors, points, halvings = (
        np.array([[[getattr(arm, name)]] for arm in arms])
        for name in ("excess", "points", "halvings")
    )
    steps_K = np.array([[rungs]]) / 1000
    logs_AxSxK = -0.7 * np.log(steps_K) + np.log(factors) + 0.7 * np.log(4.0)  # of e / 0.01
    logs_AxSxK = logs_AxSxK + 0.1 * scatter * random.normal(size=(*shape[:2], 1))
    halvings_AxSxK = halvings + 0.1 * scattered()
    points_AxSxK = points + slope * halvings_AxSxK + 0.3 * scattered()
    traces_AxSxK = 100 * np.exp(0.5 * logs_AxSxK) * 0.5**halvings_AxSxK
    accuracies_AxSxK = 0.9 + 0.01 * (points_AxSxK - 2 * logs_AxSxK)
    losses_AxSxK = 0.01 * np.exp(logs_AxSxK + loss_noise * random.normal(size=shape))
    return [
        Row(
            f"{a},{s}",
            arm.swept,
            str(s),
            step,
            projected=True,
            values={
                "num_params": arm.num_params,
                "excess_loss": float(losses_AxSxK[a, s, k]),
                TRACE: float(traces_AxSxK[a, s, k]),
                PROBE: float(accuracies_AxSxK[a, s, k]),
            },
            last=k == len(rungs) - 1,
        )
        for s in range(seeds)
        for a, arm in enumerate(arms)
        for k, step in enumerate(rungs)
    ]
