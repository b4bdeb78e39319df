"""The state from which a run resumes: save it, restore it, and rename damaged checkpoints."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxflat.config import Config
from jaxflat.distributed import ranks, sharding
from jaxflat.runs import builders, shared_prefixes, trajectory
from jaxflat.runs.trajectory import Checkpoint, Phase
from jaxflat.storage import checkpoints
from jaxflat.storage.curve import Curve
from jaxflat.training.step import TrainState


@ranks.on_rank_0
def is_trained(config: Config, directory: Path) -> bool:
    """Return whether every phase has run and every measured checkpoint exists."""
    finished = trajectory.phases(config)[-1].stop in checkpoints.steps(directory / "recovery")
    return finished and _all_exist(directory, trajectory.measured_checkpoints(config))


@ranks.on_rank_0
def mark_damaged_checkpoints(directory: Path) -> None:
    """Rename each damaged checkpoint of a run, and warn on stderr.

    Training then repeats its steps, bit for bit, from the last intact recovery checkpoint before
    it, or from the start.
    """
    for folder in (*shared_prefixes.FOLDERS, "aside/checkpoints", "aside/projected"):
        for line in checkpoints.mark_damaged_steps(directory / folder):
            print(f"warning: {line}; training repeats its steps", file=sys.stderr)


@ranks.on_rank_0
def delete_after_missing(config: Config, directory: Path) -> None:
    """Delete the recovery checkpoints that come after a missing measured checkpoint."""
    for step in reversed(checkpoints.steps(directory / "recovery")):
        if not _all_exist(directory, trajectory.measured_checkpoints(config, branched_before=step)):
            checkpoints.delete(directory / "recovery", step)


def resume(config: Config, directory: Path, phases: list[Phase]) -> tuple[TrainState, Curve]:
    """Return the state and curve of the last recovery checkpoint, or of a new run."""
    params = builders.init_params(config, builders.make_mesh(config))
    if not (steps := checkpoints.steps(directory / "recovery")):
        return fresh_state(config, params, phases[0]), Curve(directory, 0)
    phase = next(phase for phase in phases if steps[-1] <= phase.stop)
    state = fresh_state(config, params, phase)
    template = {"state": state, "curve_bytes": np.asarray(0, np.int64)}
    stored = checkpoints.restore(directory / "recovery", steps[-1], template)
    return stored["state"], Curve(directory, int(stored["curve_bytes"]))


def save(config: Config, directory: Path, state: TrainState, curve: Curve) -> None:
    """Save the state and the curve's length; keep the newest `training.keep` such checkpoints."""
    recovery = directory / "recovery"
    tree = {"state": state, "curve_bytes": np.asarray(curve.num_bytes, np.int64)}
    checkpoints.save(recovery, int(state.step), tree)
    for step in checkpoints.steps(recovery)[: -config.training.keep]:
        checkpoints.delete(recovery, step)


@ranks.on_rank_0
def _all_exist(directory: Path, measured_checkpoints: list[Checkpoint]) -> bool:
    folders = {checkpoint.folder for checkpoint in measured_checkpoints}
    steps = {folder: checkpoints.steps(directory / folder) for folder in folders}
    return all(checkpoint.step in steps[checkpoint.folder] for checkpoint in measured_checkpoints)


def fresh_state(config: Config, params: Any, phase: Phase) -> TrainState:
    """Return the state at the start of a phase, placed on the mesh."""
    return sharding.shard_params(builders.make_mesh(config), builders.init_state(params, phase))
