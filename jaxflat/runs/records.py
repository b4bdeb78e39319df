"""Measured numbers as lines on disk, and the checkpoints they are measured on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxflat.config import Config
from jaxflat.distributed import preemption, ranks
from jaxflat.flatness import Estimate
from jaxflat.runs import experiment
from jaxflat.runs.trajectory import Snapshot
from jaxflat.storage import checkpoint
from jaxflat.storage.files import write_json

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


def keeping(path: Path, snapshot: Snapshot) -> preemption.Keep:
    """Return what keeps the parts of a checkpoint's measurement, in `path` where a signal comes."""
    measured = f"{snapshot.folder}/{snapshot.step}"
    parts = _stored_parts(path).get(measured, {})

    def keep(name: str, make: Callable[[], Any]) -> Any:
        if name not in parts:
            parts[name] = make()  # which may keep parts of its own
            preemption.stop_if_requested(lambda: write_json(path, {measured: parts}))
        return parts[name]

    return keep


@ranks.on_rank_0
def _stored_parts(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
