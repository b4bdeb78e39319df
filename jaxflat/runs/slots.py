"""Train several runs in one program, with the same compiled (vmapped) call for all of them.

A team is up to `training.together` points that differ only in seeds, schedules and strengths other
than 0 of their flatness penalties. Each has a slot. The program always computes every slot. If a
run is absent, or at another call, its slot computes a copy of another run. So a run's bits do not
depend on the runs in the other slots.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxflat.config import Config
from jaxflat.config.sweeps import SEEDS
from jaxflat.distributed import leases, preemption, sharding
from jaxflat.languages.batches import Source
from jaxflat.runs import builders, corpus
from jaxflat.runs.languages import make_language
from jaxflat.runs.trajectory import Phase, longest_call
from jaxflat.storage.leased_folder import Folder
from jaxflat.training.step import TrainState

KINDS = ("anneal", "projection", "trunk")
"""The calls of a run from one step of a phase: its anneal, its projection, the next steps."""


class Call(NamedTuple):
    """A compiled call that a run requests: the steps of a phase from state.step to `stop`.

    trunk_step: the step of the trunk from which the call starts or branches off. kind: one of
    KINDS. save: saves the state, or None if it is already saved.
    """

    config: Config
    phase: Phase
    state: TrainState
    stop: int
    trunk_step: int
    kind: str
    save: Callable[[], object] | None = None

    @property
    def position(self) -> tuple[int, int, int, str]:
        """The position of the call in a run: calls are made in this order.

        The phase's name separates branches of one step: a phase may end where the next one begins.
        """
        return self.trunk_step, KINDS.index(self.kind), self.stop, self.phase.name


class Outcome(NamedTuple):
    """The state after a call, and its mean loss in nats."""

    state: TrainState
    loss: float


Training = Generator[Call, Outcome, None]


def assign_slots(configs: Iterable[Config]) -> list[tuple[str, int]]:
    """Return the (team, slot) of each run. Teams are filled in the order of `configs`."""
    counts, team_slots = Counter[str](), []
    for config in configs:
        shared = json.loads(config.to_json())
        for key in SEEDS:
            del shared[key]
        for phase in shared["phases"].values():
            del phase["schedule"]
            penalty = phase["flatness_penalty"]
            penalty["strength"] = penalty["strength"] != 0
        digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()
        team, slot = divmod(counts[digest], config.training.together)
        counts[digest] += 1
        team_slots.append((f"{digest}/{team}", slot))
    return team_slots


def train_together(
    trainings: Mapping[int, Training],
    fail: Callable[[int, Exception], object],
    folders: Sequence[Folder],
) -> None:
    """Run trainings, given by slot, to their ends; call `fail(slot, error)` for each that fails.

    The earliest requested call is made first, for all runs that request it. So runs that were
    interrupted at different steps catch up and then share calls. Raises Preempted after a signal,
    once every unsaved state is saved. Raises LeaseLost if another worker has taken over one of the
    runs' folders; then nothing more is written to any of them.
    """
    calls: dict[int, Call] = {}
    outcomes: dict[int, Any] = dict.fromkeys(trainings)  # None starts a generator
    while outcomes or calls:
        for slot in list(outcomes):
            try:
                calls[slot] = trainings[slot].send(outcomes.pop(slot))
            except StopIteration:
                pass
            except leases.LeaseLost:
                raise
            except Exception as error:
                fail(slot, error)
        preemption.stop_if_requested(lambda: [call.save() for call in calls.values() if call.save])
        first = min((call.position for call in calls.values()), default=None)
        due = {slot: calls.pop(slot) for slot in sorted(calls) if calls[slot].position == first}
        try:
            outcomes = run_calls(due) if due else {}
        except Exception as error:  # for example, out of memory
            for slot in due:
                fail(slot, error)
        for folder in folders:
            folder.assert_owned()


def run_calls(calls: Mapping[int, Call]) -> dict[int, Outcome]:
    """Make the same call of several runs, given by slot, and return their outcomes."""
    config, phase, _, stop, trunk_step, kind, _ = next(iter(calls.values()))
    mesh, num_slots = builders.make_mesh(config), config.training.together
    steps = builders.train_steps(config, phase.settings, mesh)
    schedule_start = trunk_step if kind == "anneal" else phase.start
    arguments = {slot: _arguments(call) for slot, call in calls.items()}
    language = make_language(config.language)
    if num_slots == 1:
        ((slot, (state, stored, key, schedule, strength)),) = arguments.items()
        source = Source(language, stored)
        results = {slot: steps(state, source, key, schedule, schedule_start, stop, strength)}
    else:
        state, *others = next(iter(arguments.values()))
        empty = [slot for slot in range(num_slots) if slot not in arguments]
        arguments |= {slot: (jax.tree.map(jnp.copy, state), *others) for slot in empty}
        by_argument = zip(*(arguments[slot] for slot in range(num_slots)), strict=True)
        together = _steps_together(steps, mesh)
        states, losses = together(
            *by_argument, language=language, schedule_start=schedule_start, stop=stop
        )
        results = {slot: (states[slot], losses[slot]) for slot in calls}
    losses = sharding.to_host({slot: loss for slot, (_, loss) in results.items()})
    return {slot: Outcome(state, float(losses[slot])) for slot, (state, _) in results.items()}


def _arguments(call: Call) -> tuple[Any, ...]:
    """Return (state, stored sentences or None, key, schedule, strength or None) of a call."""
    config, phase = call.config, call.phase
    return (
        call.state,
        _stored_sentences(config, phase, int(call.state.step)),
        builders.purpose_key(config.data_seed, f"train/{phase.name}"),
        builders.schedule(phase.settings, anneal=call.kind == "anneal"),
        phase.settings.flatness_penalty.strength or None,
    )


def _stored_sentences(config: Config, phase: Phase, step: int) -> Any:
    """Return the stored sentences for the call that starts at `step`, or None if none are stored.

    Every call gets as many as the longest call needs, so that one shape is compiled once.
    """
    if not config.language.stored_sentences:
        return None
    sizes = (step, longest_call(config, phase), phase.settings.batch_size)
    stored = corpus.stored_sentences(config.language, config.data_seed, *sizes)
    mesh = builders.make_mesh(config)
    return sharding.shard_examples(mesh, stored, axis=1, over=sharding.RUN_AXES)


@functools.cache
def _steps_together(steps: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return the compiled steps of all slots, divided along the mesh's "sweep" axis.

    Each argument that differs between slots, such as the state or the key, is a sequence over
    slots, where `steps` takes a single value.
    """

    def slot_steps(differs: tuple[Any, ...], language: Any, schedule_start: int, stop: int) -> Any:
        state, stored, key, schedule, strength = differs
        return steps(state, Source(language, stored), key, schedule, schedule_start, stop, strength)

    over_slots = jax.vmap(slot_steps, in_axes=(0, None, None, None), spmd_axis_name="sweep")

    def together(
        states: Sequence[TrainState],
        *rest: Sequence[Any],
        language: Any,
        schedule_start: int,
        stop: int,
    ) -> tuple[list[TrainState], jax.Array]:
        differs = tuple(_stack(values) for values in (states, *rest))
        stacked, losses_R = over_slots(differs, language, schedule_start, stop)
        states = _unstack(stacked, len(states))
        shardings = [builders.state_shardings(mesh, state) for state in states]
        return jax.lax.with_sharding_constraint(states, shardings), losses_R

    return jax.jit(together, donate_argnums=0)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(stacked: Any, number: int) -> list[Any]:
    leaves, structure = jax.tree.flatten(stacked)
    return [structure.unflatten([leaf[i] for leaf in leaves]) for i in range(number)]
