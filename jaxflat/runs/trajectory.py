"""The plan of a run: its phases and the steps at which checkpoints are measured."""

import math
from typing import NamedTuple

from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config


class Phase(NamedTuple):
    """A phase of a run; `start` and `stop` count the optimizer steps of the whole run."""

    name: str
    settings: Config
    start: int
    stop: int

    @property
    def branches(self) -> tuple[int, ...]:
        """The steps at which measured checkpoints branch off."""
        return tuple(self.start + step for step in self.settings.checkpoint_steps)

    @property
    def projected_branches(self) -> tuple[int, ...]:
        """The branches whose checkpoints also get a projection."""
        return tuple(self.start + step for step in self.settings.projection.checkpoint_steps)


class Checkpoint(NamedTuple):
    """A measured checkpoint: its step, and whether it is the result of a projection."""

    step: int
    projected: bool = False

    @property
    def folder(self) -> str:
        """The folder of the parameters in the run's folder: <folder>/<step>."""
        return "projected" if self.projected else "checkpoints"


def phases(config: Config) -> list[Phase]:
    """Return the run's phases in order."""
    run_phases, start = [], 0
    for name in config.phase_order:
        settings = config.phases[name]
        run_phases.append(Phase(name, settings, start, start + settings.steps))
        start += settings.steps
    return run_phases


def projection_phase(phase: Phase, step: int) -> Phase:
    """Return the projection of a phase's checkpoint, as a phase that starts at its step.

    AdamW starts from a new state and trains on exact targets. The learning rate decays to 0 over
    all steps. This removes the noise of the phase: the parameters return to the bottom of the
    valley along which it moved.
    """
    chosen, settings = phase.settings.projection, base_config.phase()
    settings.update({"targets": "exact", "steps": chosen.steps, "batch_size": chosen.batch_size})
    schedule = {"learning_rate": chosen.learning_rate, "decay_steps": chosen.steps}
    settings.schedule.update({**schedule, "warmup_steps": 0})
    settings.checkpoint_steps = ()
    name = f"{phase.name}/projection"
    return Phase(name, FrozenConfigDict(settings), step, step + chosen.steps)


def measured_checkpoints(config: Config, branched_before: float = math.inf) -> list[Checkpoint]:
    """Return the measured checkpoints that branch off before a given step.

    A run without phases has one measured checkpoint, at step 0.
    """
    if not config.phase_order:
        return [Checkpoint(0)]
    return [
        Checkpoint(branch + phase.settings.anneal_steps, projected)
        for phase in phases(config)
        for branch in phase.branches
        if branch < branched_before
        for projected in (False, True)[: 1 + (branch in phase.projected_branches)]
    ]


def sentences_seen(config: Config, checkpoint: Checkpoint) -> int:
    """Return the number of sentences that trained a checkpoint, anneal and projection included."""
    seen = 0
    for phase in phases(config):
        for branch in phase.branches:
            if branch + phase.settings.anneal_steps == checkpoint.step:
                seen += (checkpoint.step - phase.start) * phase.settings.batch_size
                chosen = phase.settings.projection
                return seen + checkpoint.projected * chosen.steps * chosen.batch_size
        seen += phase.settings.steps * phase.settings.batch_size
    return 0


def call_ends(config: Config, phase: Phase) -> list[int]:
    """Return the steps at which compiled calls end; they depend on the config only."""
    regular = range(phase.start, phase.stop, config.training.steps_per_call)[1:]
    return sorted({*regular, *phase.branches, phase.stop})
