"""The plan of a run: its phases and the steps at which checkpoints are measured."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config

MIN_LINES = 50  # of the curve of a phase: one at least every 2% of it
PROJECTION = "/projection"  # ends the names of projections


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
    settings.checkpoint_steps, settings.microbatch_size = (), phase.settings.microbatch_size
    name = f"{phase.name}{PROJECTION}"
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


def call_length(config: Config, num_steps: int) -> int:
    """Return how many of `num_steps` steps a compiled call takes; each call is a line of the curve.

    It depends on no other phase: runs that share their first phases share these lines, too.
    """
    return min(config.training.steps_per_call, max(num_steps // MIN_LINES, 1))


def call_ends(config: Config, phase: Phase) -> list[int]:
    """Return the steps at which compiled calls end; they depend on the config only."""
    regular = range(phase.start, phase.stop, call_length(config, phase.settings.steps))[1:]
    return sorted({*regular, *recovery_steps(config, phase), *phase.branches, phase.stop})


def anneal_ends(config: Config, phase: Phase, branch: int) -> list[int]:
    """Return the steps at which the compiled calls of an anneal end."""
    end = branch + phase.settings.anneal_steps
    return [*range(branch, end, longest_call(config, phase))[1:], *([end] if end > branch else [])]


def longest_call(config: Config, phase: Phase) -> int:
    """Return how many steps the longest compiled call of a phase and its anneals takes."""
    return call_length(config, max(phase.settings.steps, phase.settings.anneal_steps))


def recovery_steps(config: Config, phase: Phase) -> list[int]:
    """Return the steps at which a phase saves a recovery checkpoint: branches among them."""
    chosen = config.training
    regular = range(phase.start, phase.stop, chosen.steps_per_call * chosen.save_every)[1:]
    return sorted({*regular, *phase.branches, phase.stop})


def curve_position(config: Config, line: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the trunk's step when a line of the curve was written, and whether a branch wrote it.

    A projection's line names the end of the anneal that it continues.
    """
    if "branch" not in line:
        return line["step"], False
    name = line["phase"].removesuffix(PROJECTION)
    is_projection = name != line["phase"]
    return line["branch"] - is_projection * config.phases[name].anneal_steps, True
