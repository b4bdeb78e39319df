"""Training through the phases, leaving checkpoints to measure and one to recover from."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxflat import checkpoint, experiment, preemption, sharding, trajectory
from jaxflat.config import Config
from jaxflat.corpus import stored_sentences
from jaxflat.languages.batches import Source
from jaxflat.metrics import Curve, Display
from jaxflat.stages import trunks
from jaxflat.training.step import TrainState
from jaxflat.trajectory import Phase, Snapshot


def is_trained(config: Config, directory: Path) -> bool:
    """Say whether every phase has run and every measured checkpoint is there."""
    finished = trajectory.phases(config)[-1].stop in checkpoint.steps(directory / "recovery")
    return finished and _are_there(directory, trajectory.snapshots(config))


def train(config: Config, directory: Path, display: Display) -> None:
    """Train through the phases, leaving a measured checkpoint at the end of each anneal.

    A recovery checkpoint at a branch is from before its anneal, which is run again on resuming
    unless a signal cut it off: that leaves a state of its own. Phases that another point of the
    sweep has begun with are taken from there (see `trunks`).
    """
    trunks.start_from(config, directory)
    phases = trajectory.phases(config)
    display.start_stage("train", phases[-1].stop)
    state, curve = _resume(config, directory, phases)
    preemption.check()
    for phase in phases:
        if state.step == phase.start:
            state = _replicated(config, experiment.init_state(state.params, phase))
        step = int(state.step)
        for number, stop in enumerate(_call_ends(config, phase), start=1):
            if stop > step:
                state, loss = _advance(config, phase, state, stop)
                curve.add(phase.name, stop, loss, None)
                display.advance_stage(stop, f"train  loss {loss:.4f}")
                due = number % config.training.save_every == 0
                last = stop in phase.branches or stop == phase.stop
                if due or last or preemption.requested():
                    _save_recovery(directory, state, curve)
                    if stop == phase.stop:
                        trunks.keep(config, directory, phase)
                    preemption.check()
            if stop >= step and stop in phase.branches:
                _anneal(config, directory, phase, state, curve)
    curve.close()


def _resume(config: Config, directory: Path, phases: list[Phase]) -> tuple[TrainState, Curve]:
    """Return the state and the curve of the last recovery checkpoint, or of a fresh start."""
    recovery = directory / "recovery"
    params = experiment.init_params(config)
    for step in reversed(checkpoint.steps(recovery)):
        phase = next(phase for phase in phases if step <= phase.stop)
        state = _replicated(config, experiment.init_state(params, phase))
        template = {"state": state, "curve_bytes": np.asarray(0, np.int64)}
        stored = checkpoint.restore(recovery, step, template)
        if _are_there(directory, trajectory.snapshots(config, branched_before=step)):
            return stored["state"], Curve(directory, int(stored["curve_bytes"]))
    state = experiment.init_state(params, phases[0])
    return _replicated(config, state), Curve(directory, 0)


def _save_recovery(directory: Path, state: TrainState, curve: Curve) -> None:
    recovery, step = directory / "recovery", int(state.step)
    tree = {"state": state, "curve_bytes": np.asarray(curve.num_bytes, np.int64)}
    checkpoint.save(recovery, step, tree)
    checkpoint.keep_only(recovery, step)


def _advance(
    config: Config, phase: Phase, state: TrainState, stop: int, branch: int | None = None
) -> tuple[TrainState, float]:
    """Train to `stop` in one compiled call, on the trunk or on the anneal that left at `branch`."""
    mesh = experiment.make_mesh(config)
    model, masking = experiment.make_model(config), config.language.masking
    steps = experiment.train_steps(model, phase.settings, masking, mesh)
    schedule = experiment.schedule(phase.settings, anneal=branch is not None)
    first = phase.start if branch is None else branch
    source = _source(config, phase, int(state.step))
    key = experiment.purpose_key(config.data_seed, f"train/{phase.name}")
    state, loss = steps(state, source, key, schedule, first, stop)
    if not math.isfinite(loss):
        where = phase.name if branch is None else f"{phase.name}, in the anneal from step {branch}"
        raise FloatingPointError(
            f"step {int(state.step)} of phase {where} made parameters that are not finite"
        )
    return state, float(loss)


def _source(config: Config, phase: Phase, step: int) -> Source:
    """Return what the call that starts at `step` takes its sentences from.

    Of stored sentences it gets as many as the longest call needs: one shape, compiled once.
    """
    language = experiment.make_language(config.language)
    if not config.language.stored_sentences:
        return Source(language)
    num_steps, batch_size = config.training.steps_per_call, phase.settings.batch_size
    sizes = (step, num_steps, batch_size)
    stored = stored_sentences(config.language, config.data_seed, *sizes)
    return Source(language, sharding.shard_examples(experiment.make_mesh(config), stored, axis=1))


def _anneal(config: Config, directory: Path, phase: Phase, trunk: TrainState, curve: Curve) -> None:
    """Branch off the trunk, decay the learning rate to 0, and keep the outcome for measuring."""
    branch, num_steps = int(trunk.step), phase.settings.anneal_steps
    end, length = branch + num_steps, config.training.steps_per_call
    stops = (*range(branch + length, end, length), *([end] if num_steps else []))
    state = jax.tree.map(lambda x: x.copy(), trunk)
    _train_aside(config, directory, phase, state, curve, stops, Snapshot(end), branch)
    if branch in phase.projected_branches:
        params = checkpoint.restore(directory / Snapshot(end).folder, end, trunk.params)
        _project(config, directory, trajectory.projection(phase, end), params, curve)


def _project(config: Config, directory: Path, projection: Phase, params: Any, curve: Curve) -> None:
    """Train a measured checkpoint through its projection, and keep the outcome beside it."""
    state = _replicated(config, experiment.init_state(params, projection))
    twin = Snapshot(projection.start, projected=True)
    stops = _call_ends(config, projection)
    _train_aside(config, directory, projection, state, curve, stops, twin)


def _train_aside(
    config: Config,
    directory: Path,
    phase: Phase,
    state: TrainState,
    curve: Curve,
    stops: Sequence[int],
    snapshot: Snapshot,
    branch: int | None = None,
) -> None:
    """Train through `stops` aside from the trunk, and keep the outcome as `snapshot`.

    What was done before, as the curve's next lines tell, is not done again: all of it, or up to
    the state that a signal left.
    """
    unfinished = directory / f"{snapshot.folder}_{snapshot.step}.unfinished"
    is_there = snapshot.step in checkpoint.steps(directory / snapshot.folder)
    if not (is_there and curve.skip(len(stops))):
        for stop in checkpoint.steps(unfinished)[-1:]:
            if curve.skip(stops.index(stop) + 1):
                state = checkpoint.restore(unfinished, stop, state)
        for stop in stops:
            if stop > state.step:
                state, loss = _advance(config, phase, state, stop, branch)
                curve.add(phase.name, stop, loss, phase.start if branch is None else branch)
                if stop < stops[-1] and preemption.requested():
                    checkpoint.save(unfinished, stop, state)
                    checkpoint.keep_only(unfinished, stop)
                    preemption.check()
        checkpoint.save(directory / snapshot.folder, snapshot.step, state.params)
    shutil.rmtree(unfinished, ignore_errors=True)
    preemption.check()


def _are_there(directory: Path, snapshots: list[Snapshot]) -> bool:
    folders = {snapshot.folder for snapshot in snapshots}
    found = {folder: checkpoint.steps(directory / folder) for folder in folders}
    return all(snapshot.step in found[snapshot.folder] for snapshot in snapshots)


def _call_ends(config: Config, phase: Phase) -> list[int]:
    """Return the steps at which compiled calls end: a function of the config alone."""
    regular = range(phase.start, phase.stop, config.training.steps_per_call)[1:]
    return sorted({*regular, *phase.branches, phase.stop})


def _replicated(config: Config, state: TrainState) -> TrainState:
    return sharding.replicate(experiment.make_mesh(config), state)
