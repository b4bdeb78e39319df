"""Recovery checkpoints: the training state that an interrupted run resumes from."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxflat.config import Config
from jaxflat.distributed import ranks, sharding
from jaxflat.runs import experiment, shared_prefixes, trajectory
from jaxflat.runs.trajectory import Phase, Snapshot
from jaxflat.storage import checkpoint
from jaxflat.storage.curve import Curve
from jaxflat.training.step import TrainState


@ranks.on_rank_0
def is_trained(config: Config, directory: Path) -> bool:
    """Say whether every phase has run and every measured checkpoint exists."""
    finished = trajectory.phases(config)[-1].stop in checkpoint.steps(directory / "recovery")
    return finished and _are_there(directory, trajectory.snapshots(config))


@ranks.on_rank_0
def set_aside_damaged(directory: Path) -> None:
    """Rename each damaged checkpoint of a run, and warn on stderr.

    Training makes it again, bit for bit, from the newest checkpoint before it or from the start.
    """
    for folder in (*shared_prefixes.FOLDERS, "aside/checkpoints", "aside/projected"):
        for line in checkpoint.mark_damaged_steps(directory / folder):
            print(f"warning: {line}; training makes it again", file=sys.stderr)


@ranks.on_rank_0
def go_back(config: Config, directory: Path) -> None:
    """Delete the recovery checkpoints that are later than a missing measured checkpoint."""
    for step in reversed(checkpoint.steps(directory / "recovery")):
        if not _are_there(directory, trajectory.snapshots(config, branched_before=step)):
            checkpoint.delete(directory / "recovery", step)


def resume(config: Config, directory: Path, phases: list[Phase]) -> tuple[TrainState, Curve]:
    """Return the state and curve of the newest recovery checkpoint, or of a fresh start."""
    params = experiment.init_params(config, experiment.make_mesh(config))
    if not (steps := checkpoint.steps(directory / "recovery")):
        return fresh_state(config, params, phases[0]), Curve(directory, 0)
    phase = next(phase for phase in phases if steps[-1] <= phase.stop)
    state = fresh_state(config, params, phase)
    template = {"state": state, "curve_bytes": np.asarray(0, np.int64)}
    stored = checkpoint.restore(directory / "recovery", steps[-1], template)
    return stored["state"], Curve(directory, int(stored["curve_bytes"]))


def save(config: Config, directory: Path, state: TrainState, curve: Curve) -> None:
    """Save the state and the curve's length; delete all but the newest `training.keep` saves."""
    recovery = directory / "recovery"
    tree = {"state": state, "curve_bytes": np.asarray(curve.num_bytes, np.int64)}
    checkpoint.save(recovery, int(state.step), tree)
    for step in checkpoint.steps(recovery)[: -config.training.keep]:
        checkpoint.delete(recovery, step)


@ranks.on_rank_0
def _are_there(directory: Path, snapshots: list[Snapshot]) -> bool:
    folders = {snapshot.folder for snapshot in snapshots}
    found = {folder: checkpoint.steps(directory / folder) for folder in folders}
    return all(snapshot.step in found[snapshot.folder] for snapshot in snapshots)


def fresh_state(config: Config, params: Any, phase: Phase) -> TrainState:
    """Return the state at the start of a phase, placed on the mesh."""
    return sharding.shard_params(experiment.make_mesh(config), experiment.init_state(params, phase))
