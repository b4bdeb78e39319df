"""Train one run through its phases; save checkpoints to measure and checkpoints to resume from."""

import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.distributed import sharding
from jaxflat.models import rescaling
from jaxflat.runs import builders, measurements, recovery, shared_prefixes, trajectory
from jaxflat.runs.slots import Call, Outcome, Training
from jaxflat.runs.trajectory import Checkpoint, Phase
from jaxflat.storage.curve import Curve
from jaxflat.storage.leased_folder import Folder
from jaxflat.training.step import TrainState


def train(config: Config, folder: Folder, display: Display) -> Training:
    """Train through the phases, and save a measured checkpoint at the end of each anneal.

    Yields each compiled call and receives its outcome, see `slots.train_together`. All existing
    checkpoints are verified first, and damaged ones are trained again. A recovery checkpoint at a
    branch holds the state before its anneal. So if a process dies in an anneal, the anneal restarts
    from the branch. If a signal stops it, it resumes from the state saved in the folder aside/.
    Phases that another point of the sweep has already trained are copied from it (see
    `shared_prefixes`).

    Raises FloatingPointError if a call's outcome is not finite.
    """
    recovery.mark_damaged_checkpoints(folder)
    if recovery.is_trained(config, folder):
        return
    recovery.delete_after_missing(config, folder)
    shared_prefixes.load_longest(config, folder)
    phases = trajectory.phases(config)
    display.start_stage("train", phases[-1].stop)
    state, curve = recovery.resume(config, folder, phases)
    unsaved = None  # saves the latest state; None if that is saved
    for phase in phases:
        if state.step == phase.start:
            state = recovery.fresh_state(config, _rescaled(config, state.params, phase), phase)
        step, saved_steps = int(state.step), trajectory.recovery_steps(config, phase)
        for stop in trajectory.call_ends(config, phase):
            if stop > step:
                call = Call(config, phase, state, stop, int(state.step), "trunk", unsaved)
                state, loss = yield from _checked_outcome(call, folder)
                curve.add(phase.name, stop, loss, None)
                display.advance_stage(stop, f"train  loss {loss:.4f}")
                unsaved = partial(recovery.save, config, folder, state, curve)
                if stop in saved_steps:
                    unsaved()
                    unsaved = None
                if stop == phase.stop:
                    shared_prefixes.save(config, folder, phase)
            if stop >= step and stop in phase.branches:
                state = sharding.to_memory(state, "pinned_host")
                yield from _anneal(config, folder, phase, state, curve)
                state = sharding.to_memory(state, "device")


def _rescaled(config: Config, params: Any, phase: Phase) -> Any:
    """Return the parameters with which a phase starts, after the rescaling that it asks for."""
    if phase.settings.rescaling == 0:
        return params
    key = builders.purpose_key(config.init_seed, f"rescaling/{phase.name}")
    return _rescaled_at_random(params, key, config.model.head_size, phase.settings.rescaling)


@partial(jax.jit, static_argnums=2)
def _rescaled_at_random(params: Any, key: jax.Array, head_size: int, largest: float) -> Any:
    """Return T theta for a random rescaling T that leaves the features up to one factor.

    An untied decoder would also allow another factor for every channel of the features. A probe
    with an L2 penalty sees these.
    """
    scales = rescaling.random_rescaling(params, key, head_size, largest)
    if "decoder" in params:
        scales["final_norm_D"] = jnp.ones_like(scales["final_norm_D"])
    return rescaling.rescale(scales, params)


def _checked_outcome(call: Call, folder: Folder) -> Generator[Call, Outcome, Outcome]:
    """Return the outcome of a call. Raises FloatingPointError if it is not finite."""
    outcome = yield call
    if not math.isfinite(outcome.loss):
        anneal = f", anneal from step {call.trunk_step}" if call.kind == "anneal" else ""
        last = max((folder / "recovery").steps(), default="none")
        raise FloatingPointError(
            f"loss, parameters or the optimizer's state are not finite in phase {call.phase.name}"
            f"{anneal}, by step {int(outcome.state.step)}; last checkpoint before: {last}"
        )
    return outcome


def _anneal(
    config: Config, folder: Folder, phase: Phase, origin: TrainState, curve: Curve
) -> Training:
    """Branch off a phase, decay the learning rate to 0, and save the result for measuring.

    Where the config asks for it, a projection follows and is saved separately. `origin` is in the
    host's memory, so that devices hold one training state at a time.
    """
    branch = int(origin.step)
    end, stops = branch + phase.settings.anneal_steps, trajectory.anneal_ends(config, phase, branch)
    start = Call(config, phase, origin, branch, branch, "anneal")
    yield from _train_branch(folder, start, curve, stops, Checkpoint(end))
    if branch in phase.projected_branches:
        projection, annealed = trajectory.projection_phase(phase, end), Checkpoint(end)
        state = recovery.fresh_state(
            config, measurements.load_params(config, folder, annealed), projection
        )
        state = sharding.to_memory(state, "pinned_host")
        start = Call(config, projection, state, end, branch, "projection")
        stops, projected = trajectory.call_ends(config, projection), Checkpoint(end, projected=True)
        yield from _train_branch(folder, start, curve, stops, projected)


def _train_branch(
    folder: Folder, start: Call, curve: Curve, stops: Sequence[int], checkpoint: Checkpoint
) -> Training:
    """Train an anneal through `stops`, and save its parameters as `checkpoint`.

    `start` carries the initial state, in the host's memory, and runs no steps. Steps that an
    earlier process recorded in the curve are not repeated: all of them, or those before an
    interruption.
    """
    measured, aside = folder / checkpoint.folder, folder / "aside" / checkpoint.folder
    interrupted = (
        f"aside/{checkpoint.folder}/{checkpoint.step}"  # deleted when the anneal is complete
    )
    has_lines = partial(curve.has, start.phase.name, start.stop)
    if checkpoint.step in measured.steps() and has_lines(stops):
        return folder.delete(interrupted)
    call = start
    if checkpoint.step in aside.steps():
        saved = aside.restore(checkpoint.step, start.state)
        if has_lines(stop for stop in stops if stop <= saved.step):
            call = start._replace(state=saved)
    if call is start:
        curve.forget(start.phase.name, start.stop)
    call = call._replace(state=sharding.to_memory(call.state, "device"))
    for stop in stops:
        if stop > call.state.step:
            state, loss = yield from _checked_outcome(call._replace(stop=stop), folder)
            curve.add(call.phase.name, stop, loss, start.stop)
            save = partial(aside.save, checkpoint.step, state)
            call = call._replace(state=state, save=save)
    measured.save(checkpoint.step, call.state.params)
    folder.delete(interrupted)
