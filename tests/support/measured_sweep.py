"""The folder of a sweep with made-up measurements, which nothing has trained or measured."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxflat.config import Sweep
from jaxflat.runs import stages, trajectory
from jaxflat.storage.files import write_json, write_lines
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps.points import expand
from jaxflat.sweeps.results import write_results
from jaxflat.sweeps.sweep_record import record_sweep

COLUMNS = {
    "losses": ("excess_loss", "loss"),
    "hessian_trace": ("hessian_trace", "hessian_trace/layer_0.mlp", "hessian_trace@embedded"),
    "hessian_density": (),
    "linear_probe": ("bayes/state_2.latent", "linear_probe/state_2.map/16"),
    "belief_state": ("belief_state/state_2",),
}
"""Columns of some measures; one has no number."""


def add_points(config: ConfigDict, sweep: Sweep, workdir: Path) -> None:
    """Add points with made-up numbers for COLUMNS, and write the tables of the sweep."""
    config.flatness.measures = ("hessian_trace", "hessian_density")
    points = expand(config, sweep, workdir)
    record_sweep(config, points, Folder(workdir))
    for point in points:
        random = np.random.default_rng(point.config.seed)
        path = workdir / point.name
        path.mkdir()
        stored = {"config": point.config.to_dict(), "num_params": 100}
        write_json(path / "config.json", stored)
        curve = [{"phase": "pretrain", "step": step, "loss": 1 / step} for step in (2, 4)]
        write_lines(path / "metrics.jsonl", [*curve, curve[1] | {"branch": 2, "loss": 0.1}])
        for measurement in stages.MEASUREMENTS:
            lines = []
            for checkpoint in trajectory.measured_checkpoints(point.config):
                for measure, digest in measurement.digests(point.config).items():
                    line = {"step": checkpoint.step, "projected": int(checkpoint.projected)}
                    line |= {"measure": measure, "settings": digest}
                    numbers = [
                        {
                            "column": column,
                            "mean": float(random.normal()),
                            "sem": float(random.uniform()),
                            "num_samples": 32,
                            "over": "sentences",
                        }
                        for column in COLUMNS[measure]
                    ]
                    lines += [line | number for number in numbers] or [line]
            write_lines(path / f"{measurement.section}.jsonl", lines)
    write_results(Folder(workdir))
