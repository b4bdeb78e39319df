"""A point trained in one program with others ends the same, regardless of the other points."""

import csv
import json
import random
import shutil
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxflat.config import chain, param, product
from jaxflat.console import Display
from jaxflat.distributed import leases, preemption
from jaxflat.runs import builders, shared_prefixes, slots, trajectory
from jaxflat.storage.curve import Curve
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps import points, sweep, workers
from tests.support.counts import in_full
from tests.support.signals import signal_in, until_done
from tests.support.sweeps import tiny_config
from tests.sweeps.test_sweep import assert_same, contents, saved_arrays

pytestmark = pytest.mark.slow

RATE = "phases.drift.schedule.learning_rate"
DOSE = "phases.drift.flatness_penalty.strength"
SLOTS = 3


def config_of(together: int):
    config = tiny_config()
    config.training.together = together
    config.flatness.measures = ("fisher_trace",)
    config.phases.pretrain.optimizer.name = (
        "sgd"  # with Adam, rounding decides the step where a gradient is 0
    )
    config.phases.pretrain.schedule.learning_rate = 0.1
    return config


SWEEP = [{"seed": 0}, {"seed": 1, RATE: 3e-2}]


def run(workdir: Path, together: int = SLOTS, sweep_points=SWEEP, **how) -> Path:
    how = {"stages": ("train",)} | how
    assert sweep.run(config_of(together), sweep_points, workdir, **how) == {}
    return workdir


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """Two points trained in one program of three slots."""
    return run(tmp_path_factory.mktemp("team"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same points, each trained in a separate program."""
    return run(tmp_path_factory.mktemp("alone"), together=1)


def curves(workdir: Path) -> dict[str, list[dict]]:
    files = workdir.glob("*/metrics.jsonl")
    return {f.parent.name: [json.loads(s) for s in f.read_text().splitlines()] for f in files}


def assert_close(workdir: Path, other: Path) -> None:
    """All losses, in curves and results, agree to a relative 1e-5."""
    ours, theirs = curves(workdir), curves(other)
    assert ours.keys() == theirs.keys()
    for name, lines in ours.items():
        losses = [[line.pop("loss") for line in found] for found in (lines, theirs[name])]
        assert lines == theirs[name]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    texts = [(folder / "results.csv").read_text() for folder in (workdir, other)]
    rows = [csv.DictReader(text.splitlines()) for text in texts]
    for row, same in zip(*rows, strict=True):
        assert row["point"] == same["point"]
        np.testing.assert_allclose(float(row["loss"]), float(same["loss"]), rtol=1e-5)


def test_a_team_trains_as_each_of_its_points_does_alone(team, alone):
    assert_close(team, alone)
    counts = [len(arrays) for arrays in saved_arrays(team).values()]
    assert len(counts) == 2 * (3 + 1 + 1)  # checkpoints, a projection, the last training state


@pytest.mark.parametrize("block", ["gpt", *in_full("modern")])
def test_a_team_of_causal_models_trains_as_each_does_alone(block, tmp_path):
    causal = {"language.masking": "causal", "model.name": "causal", "model.block": block}
    causal_points = [point | causal for point in SWEEP]
    together = run(tmp_path / "team", sweep_points=causal_points)
    assert_close(together, run(tmp_path / "alone", 1, causal_points))


def test_slots_are_shared_out_over_devices(alone, tmp_path):
    """Each of two slots has separate devices; its batches and parameters are split over two."""
    config = config_of(2)
    config.mesh.update({"data": 2, "model": 2})
    expanded = points.expand(config, SWEEP, tmp_path)
    mesh = builders.make_mesh(expanded[0].config)
    assert dict(mesh.shape) == {"sweep": 2, "data": 2, "model": 2}
    assert sweep.run(config, SWEEP, tmp_path / "parted", stages=("train",)) == {}
    assert_close(tmp_path / "parted", alone)


def test_points_trained_one_by_one_are_those_of_the_team_to_the_bit(team, tmp_path):
    for place in ("1", "0"):
        run(tmp_path, selection=place)
    assert_same(team, tmp_path)


def test_one_that_is_not_finite_leaves_the_others_as_they_are(team, tmp_path):
    with_bad = chain(SWEEP, [{"seed": 2, RATE: 1e30}])
    failures = sweep.run(config_of(SLOTS), with_bad, tmp_path, stages=("train",))
    (reason,) = failures.values()
    assert "not finite in phase drift, by step 12; last checkpoint before: 10" in reason
    bad = points.expand(config_of(SLOTS), with_bad, tmp_path)[2]
    assert json.loads((bad.folder.path / "status.json").read_text())["state"] == "failed"
    assert "FloatingPointError" in (bad.folder.path / "error.txt").read_text()
    for path, content in contents(team).items():
        if path.endswith(".jsonl"):
            assert contents(tmp_path)[path] == content
    trunk = [line["step"] for line in curves(tmp_path)[bad.name] if "branch" not in line]
    assert trunk == list(range(1, 12))


def test_what_another_worker_has_is_left_to_it(team, tmp_path, capsys):
    expanded = points.expand(config_of(SLOTS), chain(SWEEP, [{"seed": 2}]), tmp_path)
    theirs = {point.name: leases.Lease(point.folder.path) for point in expanded}
    with Display(1) as display, ExitStack() as held:
        assert theirs[expanded[2].name].is_available()
        assert held.enter_context(theirs[expanded[2].name].try_acquire())
        workers.train_team(expanded, display)
        assert "training 2 points in one program of 3 slots: " in capsys.readouterr().out
        for point in expanded[:2]:
            shutil.rmtree(point.folder.path / "recovery")
            assert theirs[point.name].is_available()
            assert held.enter_context(theirs[point.name].try_acquire())
        workers.train_team(expanded, display)
    assert "training" not in capsys.readouterr().out
    assert not (expanded[2].folder.path / "metrics.jsonl").exists()
    for name, lines in curves(team).items():
        assert curves(tmp_path)[name] == lines


def test_a_team_that_slept_through_a_takeover_writes_nothing_more(tmp_path, monkeypatch, capsys):
    expanded = points.expand(config_of(SLOTS), SWEEP, tmp_path)
    advance, numbers = slots.run_calls, []

    def sleep_in_the_second_call(calls):
        outcomes = advance(calls)
        numbers.append(len(calls))
        if len(numbers) == 2:
            (held,) = (tmp_path / "locks" / expanded[1].name).glob("[0-9]*")
            held.rename(held.with_name(str(int(held.name) + 1)))  # as another's takeover does
        return outcomes

    monkeypatch.setattr(slots, "run_calls", sleep_in_the_second_call)
    with Display(1) as display:
        workers.train_team(expanded, display)
    assert "taken over by other workers while this one was suspended" in capsys.readouterr().out
    assert numbers == [2, 2]
    assert [len(lines) for lines in curves(tmp_path).values()] == [1, 1]


def test_a_signal_in_a_call_is_seen_when_the_call_ends(tmp_path, monkeypatch):
    """Dispatch returns long before the call does."""

    class Loss:
        def __float__(self):
            preemption._received.append(15)
            return 1.0

    monkeypatch.setattr(preemption, "_received", [])
    monkeypatch.setattr(slots.builders, "train_steps", lambda *_: lambda s, *_: (s, Loss()))
    (point,) = points.expand(config_of(1), [{}], tmp_path)
    (phase, _) = trajectory.phases(point.config)
    saved = []

    def training():
        state = builders.init_state(builders.init_params(point.config), phase)
        call = slots.Call(point.config, phase, state, 2, 0, "trunk")
        yield call
        yield call._replace(save=lambda: saved.append(True))

    with pytest.raises(preemption.Preempted):
        slots.train_together({0: training()}, pytest.fail, [])
    assert saved == [True]


class Killed(BaseException):
    """Simulates kill -9: no code of jaxflat cleans up after it."""


def test_cut_off_at_any_moment_it_ends_with_the_same_bits(team, tmp_path, monkeypatch):
    """Some points of the team have saved more than others at the death."""
    moments, deaths, uneven = random.Random(4), 0, 0

    def or_die(function):
        def wrapper(*arguments, **named):
            result = function(*arguments, **named)
            if moments.random() < 0.12:
                raise Killed
            return result

        return wrapper

    places = [(slots, "run_calls"), (Folder, "save"), (Curve, "add"), (shared_prefixes, "save")]
    for module, name in places:
        monkeypatch.setattr(module, name, or_die(getattr(module, name)))
    while True:
        try:
            run(tmp_path)
        except Killed:
            deaths += 1
            steps = [Folder(p / "recovery").steps() for p in tmp_path.glob("*seed=*")]
            uneven += steps[0] != steps[-1]
            continue
        break
    assert deaths >= 3
    assert uneven
    assert contents(team) == contents(tmp_path)
    arrays, found = saved_arrays(team), saved_arrays(tmp_path)
    assert (
        arrays.keys() <= found.keys()
    )  # a run that died before it deleted a recovery state has more
    jax.tree.map(np.testing.assert_array_equal, arrays, {name: found[name] for name in arrays})


def test_stopped_in_every_call_it_makes_each_once(team, tmp_path, monkeypatch):
    calls = signal_in(monkeypatch, [(slots, "run_calls")])
    stops = until_done(lambda: run(tmp_path))
    lines = next(iter(curves(team).values()))
    assert stops == len(calls) == len(lines)
    assert_same(team, tmp_path)
    assert not [*tmp_path.glob("**/aside"), *tmp_path.glob("**/.*")]


def test_what_differs_in_more_than_seeds_and_schedules_is_another_team():
    def places(sweep_points, together=2):
        expanded = points.expand(config_of(together), sweep_points, Path("unused"))
        return [(point.team, point.slot) for point in expanded]

    seeds = param("seed", range(3))
    widths = product(param("model.width", [8, 16]), seeds)
    found = places(widths)
    assert [slot for _, slot in found] == [0, 1, 0] * 2
    assert len({team for team, _ in found}) == 4
    assert places(param("seed", range(5)))[:3] == places(seeds)
    assert len({team for team, _ in places(product(param(RATE, [1e-3, 1e-2]), seeds), 6)}) == 1
    assert len({team for team, _ in places(seeds, 1)}) == 3
    doses = param(DOSE, [1e-4, 0.0, -1e-5])
    assert [slot for _, slot in places(doses)] == [0, 0, 1]  # 0 is trained by another program
    assert len({team for team, _ in places(doses)}) == 2
    for key, values in (
        ("phases.drift.optimizer.name", ["sgd", "adamw"]),
        ("phases.drift.targets", ["exact", "sampled"]),
        ("language.seed", [0, 1]),
        ("training.save_every", [1, 2]),
    ):
        assert len({team for team, _ in places(param(key, values))}) == 2


def test_stored_sentences_are_those_of_each_point(tmp_path):
    """In a team's call each slot gets the sentences that its point gets alone."""

    def losses(together):
        config = config_of(together)
        config.language.update({"stored_sentences": 64, "data_dir": str(tmp_path / "data")})
        config.phases.pretrain.steps = 100  # calls of two steps
        expanded = points.expand(config, SWEEP, tmp_path)
        (phase, _) = trajectory.phases(expanded[0].config)
        calls = {}
        for slot, point in enumerate(expanded):
            params = builders.init_params(point.config)
            state = builders.init_state(params, phase)
            calls[slot] = slots.Call(point.config, phase, state, 2, 0, "trunk")
        with Display(1) as display:
            slots.corpus.prepare_language(expanded[0].config.language, display)
        if together == 2:
            return [outcome.loss for outcome in slots.run_calls(calls).values()]
        return [slots.run_calls({0: call})[0].loss for call in calls.values()]

    together, alone = losses(2), losses(1)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_a_run_trains_with_its_dtype_and_recomputes_activations(tmp_path):
    """bfloat16 rounds the losses, and recomputed activations leave them as they are."""
    settings = [{"training.compute_dtype": "bfloat16"}, {"training.remat": True}]
    run(tmp_path, 1, [{"seed": 0}, *({"seed": 0} | one for one in settings)])
    losses = {
        name: np.array([line["loss"] for line in lines]) for name, lines in curves(tmp_path).items()
    }
    (plain,) = [one for name, one in losses.items() if "dtype" not in name and "remat" not in name]
    (rounded,) = [one for name, one in losses.items() if "dtype" in name]
    (recomputed,) = [one for name, one in losses.items() if "remat" in name]
    np.testing.assert_allclose(rounded, plain, rtol=0.02)
    np.testing.assert_allclose(recomputed, plain, rtol=1e-5)
    assert np.abs(rounded / plain - 1).max() > 1e-5
