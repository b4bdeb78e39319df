"""A worker for the tests: the command itself, on points whose measurements only take a moment.

    python worker.py --workdir=DIR

The environment says how many points there are (WORKER_POINTS), how many seconds a measurement takes
(WORKER_SECONDS), how long a silent lock is left alone (WORKER_LEASE), and which seed fails
(WORKER_FAILS). Every measurement that is made leaves a line in DIR/made.jsonl.
"""

import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.append(str(Path(__file__).parents[1]))

from sweeps import tiny_config

from jaxflat import locks, main, metrics, run
from jaxflat.config import param


def get_config(scale=None):
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    config.phases.pretrain.checkpoint_steps = (3, 6, 8, 10)
    return config


def get_sweep(scale=None):
    return param("seed", range(int(os.environ["WORKER_POINTS"])))


def measure(config, directory, snapshot, *_):
    """Take a moment, and return a record of this process."""
    metrics.append_line(
        directory.parent / "made.jsonl",
        {"pid": os.getpid(), "point": directory.name, "step": snapshot.step},
    )
    time.sleep(float(os.environ["WORKER_SECONDS"]))
    if str(config.seed) == os.environ.get("WORKER_FAILS"):
        raise RuntimeError("out of luck")
    measured = {"step": snapshot.step, "projected": 0, "measure": "accuracy"}
    return [measured | {"mean": config.seed, "sem": 0.0, "num_samples": 2, "over": "seeds"}]


if __name__ == "__main__":
    run.MEASUREMENTS["probes"] = measure
    locks.LEASE = float(os.environ["WORKER_LEASE"])
    locks.BEAT = locks.LEASE / 6
    sys.exit(main.main([f"--config={__file__}", "--stages=probes", *sys.argv[1:]]))
