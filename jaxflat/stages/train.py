"""Training through the phases, leaving checkpoints to measure and some to recover from."""

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxflat import checkpoint, experiment, hosts, locks, preemption, sharding, trajectory
from jaxflat.config import Config
from jaxflat.corpus import stored_sentences
from jaxflat.languages.batches import Source
from jaxflat.metrics import Curve, Display
from jaxflat.stages import recovery, trunks
from jaxflat.training.step import TrainState
from jaxflat.trajectory import Phase, Snapshot


def train(config: Config, directory: Path, display: Display) -> None:
    """Train through the phases, leaving a measured checkpoint at the end of each anneal.

    A recovery checkpoint at a branch is from before its anneal, which is run again on resuming
    unless a signal cut it off: that leaves its state in aside/. Phases that another point of the
    sweep has begun with are taken from there (see `trunks`).
    """
    recovery.go_back(config, directory)
    trunks.start_from(config, directory)
    phases = trajectory.phases(config)
    display.start_stage("train", phases[-1].stop)
    state, curve = recovery.resume(config, directory, phases)
    for phase in phases:
        if state.step == phase.start:
            state = recovery.fresh_state(config, state.params, phase)
        step = int(state.step)
        for number, stop in enumerate(trajectory.call_ends(config, phase), start=1):
            if stop > step:
                state, loss = _advance(config, phase, state, stop)
                curve.add(phase.name, stop, loss, None)
                display.advance_stage(stop, f"train  loss {loss:.4f}")
                due = number % config.training.save_every == 0
                save = partial(recovery.save, config, directory, state, curve)
                if saved := due or stop in phase.branches or stop == phase.stop:
                    save()
                if stop == phase.stop:
                    trunks.keep(config, directory, phase)
                preemption.check(None if saved else save)
            if stop >= step and stop in phase.branches:
                _anneal(config, directory, phase, state, curve)


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
        where = phase.name if branch is None else f"{phase.name}, anneal from step {branch}"
        raise FloatingPointError(
            f"loss, parameters or the optimizer's state are not finite in phase {where}, by step "
            f"{int(state.step)}"
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
    state = recovery.fresh_state(config, params, projection)
    stops, twin = (
        trajectory.call_ends(config, projection),
        Snapshot(projection.start, projected=True),
    )
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
    """Train aside from the trunk through `stops`, and keep the outcome as `snapshot`.

    What an earlier process did of it, as the curve's next lines tell, is not done again: all, or
    up to the state that a signal left.
    """
    aside = directory / "aside" / snapshot.folder
    if snapshot.step in checkpoint.steps(directory / snapshot.folder) and curve.skip(len(stops)):
        return _forget(aside / str(snapshot.step))
    if snapshot.step in checkpoint.steps(aside):
        left = checkpoint.restore(aside, snapshot.step, state)
        if curve.skip(stops.index(int(left.step)) + 1):
            state = left
    for stop in stops:
        if stop > state.step:
            state, loss = _advance(config, phase, state, stop, branch)
            curve.add(phase.name, stop, loss, phase.start if branch is None else branch)
            preemption.check(partial(checkpoint.save, aside, snapshot.step, state))
    checkpoint.save(directory / snapshot.folder, snapshot.step, state.params)
    _forget(aside / str(snapshot.step))


@hosts.first
def _forget(left: Path) -> None:
    """Delete the state that a signal left of an anneal or projection which is complete now."""
    locks.check()
    shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):  # that of another is there
        left.parent.rmdir()
        left.parent.parent.rmdir()
