"""A run's phases and its measured checkpoints, counted in optimizer steps of the run."""

import math
from typing import NamedTuple

from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config


class Phase(NamedTuple):
    """A phase of a run, in the run's own count of optimizer steps."""

    name: str
    settings: Config
    start: int
    stop: int

    @property
    def branches(self) -> tuple[int, ...]:
        """The steps at which a measured checkpoint branches off."""
        return tuple(self.start + step for step in self.settings.checkpoint_steps)

    @property
    def projected_branches(self) -> tuple[int, ...]:
        """The branches whose checkpoint also gets an exact anneal."""
        return tuple(self.start + step for step in self.settings.projection.checkpoint_steps)


class Snapshot(NamedTuple):
    """A measured checkpoint: its step, and whether it is the exact anneal of that step."""

    step: int
    projected: bool = False

    @property
    def folder(self) -> str:
        """Where the parameters are, below the run's folder: <folder>/<step>."""
        return "projected" if self.projected else "checkpoints"


def phases(config: Config) -> list[Phase]:
    """Return the run's phases in order."""
    made, start = [], 0
    for name in config.phase_order:
        settings = config.phases[name]
        made.append(Phase(name, settings, start, start + settings.steps))
        start += settings.steps
    return made


def projection(phase: Phase, step: int) -> Phase:
    """Return the exact anneal of a phase's checkpoint, as a phase that starts at its step.

    It runs a fresh AdamW on exact targets, the learning rate decaying linearly to 0. That moves the
    parameters back to the bottom of the valley along which the phase has moved.
    """
    chosen, settings = phase.settings.projection, base_config.phase()
    settings.update({"targets": "exact", "steps": chosen.steps, "batch_size": chosen.batch_size})
    schedule = {"learning_rate": chosen.learning_rate, "decay_steps": chosen.steps}
    settings.schedule.update({**schedule, "warmup_steps": 0})
    settings.checkpoint_steps = ()
    name = f"{phase.name}/projection"
    return Phase(name, FrozenConfigDict(settings), step, step + chosen.steps)


def snapshots(config: Config, branched_before: float = math.inf) -> list[Snapshot]:
    """Return the measured checkpoints that branch off before a given step.

    A run without phases has one, at step 0.
    """
    if not config.phase_order:
        return [Snapshot(0)]
    return [
        Snapshot(branch + phase.settings.anneal_steps, projected)
        for phase in phases(config)
        for branch in phase.branches
        if branch < branched_before
        for projected in (False, True)[: 1 + (branch in phase.projected_branches)]
    ]


def sentences_seen(config: Config, snapshot: Snapshot) -> int:
    """Return how many sentences trained a checkpoint, its anneal and exact anneal included."""
    seen = 0
    for phase in phases(config):
        for branch in phase.branches:
            if branch + phase.settings.anneal_steps == snapshot.step:
                seen += (snapshot.step - phase.start) * phase.settings.batch_size
                chosen = phase.settings.projection
                return seen + snapshot.projected * chosen.steps * chosen.batch_size
        seen += phase.settings.steps * phase.settings.batch_size
    return 0


def call_ends(config: Config, phase: Phase) -> list[int]:
    """Return the steps at which compiled calls end: a function of the config alone."""
    regular = range(phase.start, phase.stop, config.training.steps_per_call)[1:]
    return sorted({*regular, *phase.branches, phase.stop})
