"""Several runs trained by one program: each compiled call serves a whole team.

A team is `training.together` points that differ only in seeds and schedules; each has a slot. The
program always computes all slots. A slot whose run is missing, or is at another call, computes a
copy of another run. So a run's bits do not depend on which runs share its program.
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
from jaxflat.distributed import leases, preemption, sharding
from jaxflat.languages.batches import Source
from jaxflat.runs import corpus, experiment
from jaxflat.runs.languages import make_language
from jaxflat.runs.trajectory import Phase
from jaxflat.training.step import TrainState

KINDS = ("anneal", "projection", "trunk")
"""What a run does from a step of its phase, in this order."""


class Call(NamedTuple):
    """A compiled call that a run asks for: the steps of a phase from state.step to `stop`.

    trunk: the step of the phase that the run has reached. kind: one of KINDS. save: saves the
    state, unless it is saved already.
    """

    config: Config
    phase: Phase
    state: TrainState
    stop: int
    trunk: int
    kind: str
    save: Callable[[], object] | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """The position of the call in its run."""
        return self.trunk, KINDS.index(self.kind), self.stop


class Outcome(NamedTuple):
    """The state after a call, and its mean loss in nats."""

    state: TrainState
    loss: float


Training = Generator[Call, Outcome, None]


def places(configs: Iterable[Config]) -> list[tuple[str, int]]:
    """Return the (team, slot) of each run; teams are filled in the order of the runs."""
    counts, found = Counter[str](), []
    for config in configs:
        alike = json.loads(config.to_json())
        for key in ("seed", "data_seed", "init_seed", "probe_seed"):
            del alike[key]
        for phase in alike["phases"].values():
            del phase["schedule"]
        digest = hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()
        team, lane = divmod(counts[digest], config.training.together)
        counts[digest] += 1
        found.append((f"{digest}/{team}", lane))
    return found


def drive(trainings: Mapping[int, Training], fail: Callable[[int, Exception], object]) -> None:
    """Run trainings, given by their slots, to their ends; call `fail` for each that fails.

    The earliest call comes first, in one program for all runs that ask for it. So runs that were
    interrupted at different steps meet again. After a signal it saves all unsaved states and raises
    Preempted.
    """
    calls: dict[int, Call] = {}
    outcomes: dict[int, Any] = dict.fromkeys(trainings)  # None starts a generator
    while outcomes or calls:
        for lane in list(outcomes):
            try:
                calls[lane] = trainings[lane].send(outcomes.pop(lane))
            except StopIteration:
                pass
            except leases.LeaseLost:
                raise
            except Exception as error:
                fail(lane, error)
        preemption.stop_if_requested(lambda: [call.save() for call in calls.values() if call.save])
        first = min((call.place for call in calls.values()), default=None)
        due = {lane: calls.pop(lane) for lane in sorted(calls) if calls[lane].place == first}
        try:
            outcomes = advance(due) if due else {}
        except Exception as error:  # for example: out of memory
            for lane in due:
                fail(lane, error)


def advance(calls: Mapping[int, Call]) -> dict[int, Outcome]:
    """Run the same call of several runs, given by their slots."""
    config, phase, _, stop, trunk, kind, _ = next(iter(calls.values()))
    mesh, num_lanes = experiment.make_mesh(config), config.training.together
    model, masking = experiment.make_model(config), config.language.masking
    steps = experiment.train_steps(model, phase.settings, masking, mesh)
    first = trunk if kind == "anneal" else phase.start
    asked = {lane: _arguments(call) for lane, call in calls.items()}
    language = make_language(config.language)
    if num_lanes == 1:
        ((lane, (state, stored, key, schedule)),) = asked.items()
        made = {lane: steps(state, Source(language, stored), key, schedule, first, stop)}
    else:
        state, *others = next(iter(asked.values()))
        missing = [lane for lane in range(num_lanes) if lane not in asked]
        asked |= {lane: (jax.tree.map(jnp.copy, state), *others) for lane in missing}
        every = zip(*(asked[lane] for lane in range(num_lanes)), strict=True)
        together = _steps_together(steps, mesh)
        states, losses = together(*every, language=language, first=first, stop=stop)
        made = {lane: (states[lane], losses[lane]) for lane in calls}
    return {lane: Outcome(state, float(loss)) for lane, (state, loss) in made.items()}


def _arguments(call: Call) -> tuple[Any, ...]:
    """Return (state, stored sentences if any, key, schedule) of a call."""
    config, phase = call.config, call.phase
    return (
        call.state,
        _stored(config, phase, int(call.state.step)),
        experiment.purpose_key(config.data_seed, f"train/{phase.name}"),
        experiment.schedule(phase.settings, anneal=call.kind == "anneal"),
    )


def _stored(config: Config, phase: Phase, step: int) -> Any:
    """Return the stored sentences of the call that starts at `step`, or None if none are stored.

    There are as many as the longest call needs, so that one shape is compiled.
    """
    if not config.language.stored_sentences:
        return None
    sizes = (step, config.training.steps_per_call, phase.settings.batch_size)
    stored = corpus.stored_sentences(config.language, config.data_seed, *sizes)
    mesh = experiment.make_mesh(config)
    return sharding.shard_examples(mesh, stored, axis=1, over=sharding.RUN_AXES)


@functools.cache
def _steps_together(steps: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return the compiled steps of all slots, which the mesh's "sweep" axis shares.

    They take a sequence over slots for each argument of `steps` that differs between runs.
    """

    def of_lane(differs: tuple[Any, ...], language: Any, first: int, stop: int) -> Any:
        state, stored, key, schedule = differs
        return steps(state, Source(language, stored), key, schedule, first, stop)

    over_lanes = jax.vmap(of_lane, in_axes=(0, None, None, None), spmd_axis_name="sweep")

    def together(
        states: Sequence[TrainState], *rest: Sequence[Any], language: Any, first: int, stop: int
    ) -> tuple[list[TrainState], jax.Array]:
        differs = tuple(_stacked(lanes) for lanes in (states, *rest))
        stacked, losses_L = over_lanes(differs, language, first, stop)
        parts = _parts(stacked, len(states))
        where = sharding.param_shardings(mesh, parts)
        return jax.lax.with_sharding_constraint(parts, where), losses_L

    return jax.jit(together, donate_argnums=0)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _parts(stacked: Any, number: int) -> list[Any]:
    leaves, structure = jax.tree.flatten(stacked)
    return [structure.unflatten([leaf[i] for leaf in leaves]) for i in range(number)]
