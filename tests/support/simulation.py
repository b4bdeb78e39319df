"""Simulates many sweeps of the default design: 5 seeds, 3 sizes, 2 checkpoints each."""

import numpy as np

from jaxflat.analysis.results_csv import Row

SEEDS, SIZES, STEPS = 5, 3, 2
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
                    "linear_probe/state_3.map/4000": 0.9 + 0.004 * accuracy_AxKxC[s, k, c],
                }
                swept = {"model.width": str(width), "model.name": "transformer"}
                rows.append(Row(f"{width},{s}", swept, str(s), 1000 * (c + 1), True, values))
    return rows


def share_covering(intervals, truth):
    return np.mean([one.low <= truth <= one.high for one in intervals])


def share_off(intervals, null=0.0):
    """Return how often an interval lies entirely on one side of `null`."""
    return np.mean([one.side(null) != 0 for one in intervals])
