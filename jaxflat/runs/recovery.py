"""Save the state from which a run resumes, restore it, and rename damaged checkpoints."""

import sys
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxflat.config import Config
from jaxflat.runs import builders, shared_prefixes, trajectory
from jaxflat.runs.trajectory import Checkpoint, Phase
from jaxflat.storage.curve import Curve
from jaxflat.storage.leased_folder import Folder
from jaxflat.training.step import TrainState


def is_trained(config: Config, folder: Folder) -> bool:
    """Return whether every phase has run and every measured checkpoint exists."""
    finished = trajectory.phases(config)[-1].stop in (folder / "recovery").steps()
    return finished and _all_exist(folder, trajectory.measured_checkpoints(config))


def mark_damaged_checkpoints(folder: Folder) -> None:
    """Rename each damaged checkpoint of a run, and warn on stderr.

    Training then repeats its steps, bit for bit, from the last intact recovery checkpoint before
    it, or from the start.
    """
    for name in (*shared_prefixes.FOLDERS, "aside/checkpoints", "aside/projected"):
        for line in (folder / name).mark_damaged_steps():
            warning = f"warning: {line}; training repeats its steps"
            folder.on_rank_0(print, warning, file=sys.stderr)


def delete_after_missing(config: Config, folder: Folder) -> None:
    """Delete the recovery checkpoints that come after a missing measured checkpoint."""
    for step in reversed((folder / "recovery").steps()):
        if not _all_exist(folder, trajectory.measured_checkpoints(config, branched_before=step)):
            (folder / "recovery").delete_step(step)


def resume(config: Config, folder: Folder, phases: list[Phase]) -> tuple[TrainState, Curve]:
    """Return the state and curve of the last recovery checkpoint, or of a new run."""
    params = builders.init_params(config, builders.make_mesh(config))
    position = partial(trajectory.curve_position, config)
    if not (steps := (folder / "recovery").steps()):
        return fresh_state(config, params, phases[0]), Curve(folder, position=position)
    phase = next(phase for phase in phases if steps[-1] <= phase.stop)
    state = fresh_state(config, params, phase)
    template = {"state": state, "curve_bytes": np.asarray(0, np.int64)}
    stored = (folder / "recovery").restore(steps[-1], template)
    return stored["state"], Curve(folder, int(stored["curve_bytes"]), steps[-1], position)


def save(config: Config, folder: Folder, state: TrainState, curve: Curve) -> None:
    """Save the state and the curve's length; keep the newest `training.keep` such checkpoints."""
    recovery = folder / "recovery"
    tree = {"state": state, "curve_bytes": np.asarray(curve.num_bytes, np.int64)}
    recovery.save(int(state.step), tree)
    for step in recovery.steps()[: -config.training.keep]:
        recovery.delete_step(step)


def _all_exist(folder: Folder, measured_checkpoints: list[Checkpoint]) -> bool:
    steps = {name: (folder / name).steps() for name in ("checkpoints", "projected")}
    return all(checkpoint.step in steps[checkpoint.folder] for checkpoint in measured_checkpoints)


def fresh_state(config: Config, params: Any, phase: Phase) -> TrainState:
    """Return the state at the start of a phase, placed on the mesh."""
    state = builders.init_state(params, phase)
    return jax.device_put(state, builders.state_shardings(builders.make_mesh(config), state))
