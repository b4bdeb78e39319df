"""Measured numbers as lines on disk, and the checkpoints they are measured on."""

from pathlib import Path
from typing import Any

from jaxflat import checkpoint, experiment
from jaxflat.config import Config
from jaxflat.flatness import Estimate
from jaxflat.trajectory import Snapshot

Record = dict[str, Any]


def record(snapshot: Snapshot, measure: str, estimate: Estimate) -> Record:
    """Return an estimate as a JSON-ready record."""
    return {
        "step": snapshot.step,
        "projected": int(snapshot.projected),
        "measure": measure,
        "mean": float(estimate.mean),
        "sem": float(estimate.sem),
        "num_samples": estimate.num_samples,
        "over": estimate.over,
    }


def load_params(config: Config, directory: Path, snapshot: Snapshot) -> Any:
    """Return the parameters of a measured checkpoint, placed on the mesh.

    A model without phases of training has its initial ones.
    """
    mesh = experiment.make_mesh(config)
    template = experiment.init_params(config, mesh)
    if not config.phase_order:
        return template
    return checkpoint.restore(directory / snapshot.folder, snapshot.step, template)
