"""Train through the phases; save checkpoints to measure and checkpoints to resume from."""

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
from jaxflat.runs.trajectory import Checkpoint, Phase
from jaxflat.storage import checkpoints
from jaxflat.storage.curve import Curve
from jaxflat.training.step import TrainState


def train(config: Config, directory: Path, display: Display) -> Training:
    """Train through the phases, and save a measured checkpoint at the end of each anneal.

    Yields each compiled call and receives its outcome, see `slots.train_together`. All existing
    checkpoints are verified first, and damaged ones are trained again. A recovery checkpoint at a
    branch holds the state before its anneal, so a resumed run repeats the anneal. The exception is
    an anneal that a signal interrupted: it resumes from its state in aside/. Phases that another
    point of the sweep has already trained are copied from it (see `shared_prefixes`).

    Raises FloatingPointError if a call's outcome is not finite.
    """
    recovery.mark_damaged_checkpoints(directory)
    if recovery.is_trained(config, directory):
        return
    recovery.delete_after_missing(config, directory)
    shared_prefixes.load_longest(config, directory)
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
                state, loss = yield from _checked_outcome(call, directory)
                curve.add(phase.name, stop, loss, None)
                display.advance_stage(stop, f"train  loss {loss:.4f}")
                due = number % config.training.save_every == 0
                save = partial(recovery.save, config, directory, state, curve)
                if due or stop in phase.branches or stop == phase.stop:
                    save = save()
                if stop == phase.stop:
                    shared_prefixes.save(config, directory, phase)
            if stop >= step and stop in phase.branches:
                yield from _anneal(config, directory, phase, state, curve)


def _checked_outcome(call: Call, directory: Path) -> Generator[Call, Outcome, Outcome]:
    """Return the outcome of a call. Raises FloatingPointError if it is not finite."""
    outcome = yield call
    if not math.isfinite(outcome.loss):
        anneal = f", anneal from step {call.trunk_step}" if call.kind == "anneal" else ""
        last = max(checkpoints.steps(directory / "recovery"), default="none")
        raise FloatingPointError(
            f"loss, parameters or the optimizer's state are not finite in phase {call.phase.name}"
            f"{anneal}, by step {int(outcome.state.step)}; last checkpoint before: {last}"
        )
    return outcome


def _anneal(
    config: Config, directory: Path, phase: Phase, origin: TrainState, curve: Curve
) -> Training:
    """Branch off a phase, decay the learning rate to 0, and save the result for measuring.

    Where the config asks for it, a projection follows and is saved separately.
    """
    branch, num_steps = int(origin.step), phase.settings.anneal_steps
    end, length = branch + num_steps, config.training.steps_per_call
    stops = (*range(branch + length, end, length), *([end] if num_steps else []))
    state = jax.tree.map(lambda x: x.copy(), origin)
    start = Call(config, phase, state, branch, branch, "anneal")
    yield from _train_branch(directory, start, curve, stops, Checkpoint(end))
    if branch in phase.projected_branches:
        params = checkpoints.restore(directory / Checkpoint(end).folder, end, origin.params)
        projection = trajectory.projection_phase(phase, end)
        state = recovery.fresh_state(config, params, projection)
        start = Call(config, projection, state, end, branch, "projection")
        stops, annealed = trajectory.call_ends(config, projection), Checkpoint(end, projected=True)
        yield from _train_branch(directory, start, curve, stops, annealed)


def _train_branch(
    directory: Path, start: Call, curve: Curve, stops: Sequence[int], checkpoint: Checkpoint
) -> Training:
    """Train an anneal through `stops`, and save its parameters as `checkpoint`.

    `start`: an empty call that holds the starting state. Work that an earlier process recorded in
    the curve's next lines is skipped: all of it, or the part before an interruption.
    """
    aside = directory / "aside" / checkpoint.folder
    if checkpoint.step in checkpoints.steps(directory / checkpoint.folder) and curve.skip(
        len(stops)
    ):
        return _delete_interrupted(aside / str(checkpoint.step))
    call = start
    if checkpoint.step in checkpoints.steps(aside):
        saved = checkpoints.restore(aside, checkpoint.step, start.state)
        if curve.skip(stops.index(int(saved.step)) + 1):
            call = start._replace(state=saved)
    for stop in stops:
        if stop > call.state.step:
            state, loss = yield from _checked_outcome(call._replace(stop=stop), directory)
            curve.add(call.phase.name, stop, loss, start.stop)
            save = partial(checkpoints.save, aside, checkpoint.step, state)
            call = call._replace(state=state, save=save)
    checkpoints.save(directory / checkpoint.folder, checkpoint.step, call.state.params)
    _delete_interrupted(aside / str(checkpoint.step))


@ranks.on_rank_0
def _delete_interrupted(folder: Path) -> None:
    """Delete the state that an interruption saved of an anneal; the anneal is now complete."""
    leases.assert_owned()
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another anneal has its state there
        folder.parent.rmdir()
        folder.parent.parent.rmdir()
