"""Train a run through its phases; save checkpoints to measure and checkpoints to resume from."""

import math
import shutil
from collections.abc import Generator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import jax

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.distributed import leases, ranks
from jaxflat.runs import recovery, shared_prefixes, trajectory
from jaxflat.runs.slots import Call, Outcome, Training
from jaxflat.runs.trajectory import Phase, Snapshot
from jaxflat.storage import checkpoint
from jaxflat.storage.curve import Curve
from jaxflat.training.step import TrainState


def train(config: Config, directory: Path, display: Display) -> Training:
    """Train through the phases, and save a measured checkpoint at the end of each anneal.

    A generator: it yields each compiled call and receives its outcome, see `slots.drive`. It first
    verifies all existing checkpoints, and trains damaged ones again. The recovery checkpoint of a
    branch is older than its anneal. A resumed run therefore repeats the anneal, unless a signal
    interrupted it and left its state in aside/. A prefix that another point of the sweep has
    trained is copied, see `shared_prefixes`.
    """
    recovery.set_aside_damaged(directory)
    if recovery.is_trained(config, directory):
        return
    recovery.go_back(config, directory)
    shared_prefixes.start_from(config, directory)
    phases = trajectory.phases(config)
    display.start_stage("train", phases[-1].stop)
    state, curve = recovery.resume(config, directory, phases)
    save = None
    for phase in phases:
        if state.step == phase.start:
            state = recovery.fresh_state(config, state.params, phase)
        step = int(state.step)
        for number, stop in enumerate(trajectory.call_ends(config, phase), start=1):
            if stop > step:
                call = Call(config, phase, state, stop, int(state.step), "trunk", save)
                state, loss = yield from _made(call, directory)
                curve.add(phase.name, stop, loss, None)
                display.advance_stage(stop, f"train  loss {loss:.4f}")
                due = number % config.training.save_every == 0
                save = partial(recovery.save, config, directory, state, curve)
                if due or stop in phase.branches or stop == phase.stop:
                    save = save()
                if stop == phase.stop:
                    shared_prefixes.keep(config, directory, phase)
            if stop >= step and stop in phase.branches:
                yield from _anneal(config, directory, phase, state, curve)


def _made(call: Call, directory: Path) -> Generator[Call, Outcome, Outcome]:
    """Return the outcome of a call. Raises FloatingPointError if it is not finite."""
    outcome = yield call
    if not math.isfinite(outcome.loss):
        anneal = f", anneal from step {call.trunk}" if call.kind == "anneal" else ""
        last = max(checkpoint.steps(directory / "recovery"), default="none")
        raise FloatingPointError(
            f"loss, parameters or the optimizer's state are not finite in phase {call.phase.name}"
            f"{anneal}, by step {int(outcome.state.step)}; last checkpoint before: {last}"
        )
    return outcome


def _anneal(
    config: Config, directory: Path, phase: Phase, trunk: TrainState, curve: Curve
) -> Training:
    """Branch off the phase, decay the learning rate to 0, and save the result for measuring."""
    branch, num_steps = int(trunk.step), phase.settings.anneal_steps
    end, length = branch + num_steps, config.training.steps_per_call
    stops = (*range(branch + length, end, length), *([end] if num_steps else []))
    state = jax.tree.map(lambda x: x.copy(), trunk)
    start = Call(config, phase, state, branch, branch, "anneal")
    yield from _train_aside(directory, start, curve, stops, Snapshot(end))
    if branch in phase.projected_branches:
        params = checkpoint.restore(directory / Snapshot(end).folder, end, trunk.params)
        projection = trajectory.projection(phase, end)
        state = recovery.fresh_state(config, params, projection)
        start = Call(config, projection, state, end, branch, "projection")
        stops, twin = trajectory.call_ends(config, projection), Snapshot(end, projected=True)
        yield from _train_aside(directory, start, curve, stops, twin)


def _train_aside(
    directory: Path, start: Call, curve: Curve, stops: Sequence[int], snapshot: Snapshot
) -> Training:
    """Train a branch through `stops`, and save the result as `snapshot`.

    start: an empty call with the state at the branch. Steps whose lines are already in the curve
    are skipped: all of them, or those up to the state that an interruption saved.
    """
    aside = directory / "aside" / snapshot.folder
    if snapshot.step in checkpoint.steps(directory / snapshot.folder) and curve.skip(len(stops)):
        return _forget(aside / str(snapshot.step))
    call = start
    if snapshot.step in checkpoint.steps(aside):
        left = checkpoint.restore(aside, snapshot.step, start.state)
        if curve.skip(stops.index(int(left.step)) + 1):
            call = start._replace(state=left)
    for stop in stops:
        if stop > call.state.step:
            state, loss = yield from _made(call._replace(stop=stop), directory)
            curve.add(call.phase.name, stop, loss, start.stop)
            save = partial(checkpoint.save, aside, snapshot.step, state)
            call = call._replace(state=state, save=save)
    checkpoint.save(directory / snapshot.folder, snapshot.step, call.state.params)
    _forget(aside / str(snapshot.step))


@ranks.on_rank_0
def _forget(left: Path) -> None:
    """Delete the saved state of an interrupted anneal that is now complete."""
    leases.assert_owned()
    shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):  # another anneal has saved its state there
        left.parent.rmdir()
        left.parent.parent.rmdir()
