"""Points that one program trains at once are what they are alone, whoever is trained with them."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from signals import signal_in, until_done
from sweeps import tiny_config
from test_sweep import assert_same, contents, saved_arrays

from jaxflat import attempts, checkpoint, experiment, locks, points, sweep, trajectory
from jaxflat.config import chain, param, product
from jaxflat.metrics import Display
from jaxflat.stages import lanes

RATE = "phases.drift.schedule.learning_rate"
LANES = 3


def config_of(together: int):
    config = tiny_config()
    config.training.together = together
    config.flatness.measures = ("fisher_trace",)
    config.phases.pretrain.optimizer.name = "sgd"  # of Adam, noise where a gradient is 0 decides
    config.phases.pretrain.schedule.learning_rate = 0.1
    return config


SWEEP = [{"seed": 0}, {"seed": 1, RATE: 3e-2}]


def run(workdir: Path, together: int = LANES, sweep_points=SWEEP, **how) -> Path:
    how = {"stages": ("train",)} | how
    assert sweep.run(config_of(together), sweep_points, workdir, **how) == {}
    return workdir


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """Two points trained at once, in a program of three lanes."""
    return run(tmp_path_factory.mktemp("team"))


def curves(workdir: Path) -> dict[str, list[dict]]:
    files = workdir.glob("*/metrics.jsonl")
    return {f.parent.name: [json.loads(s) for s in f.read_text().splitlines()] for f in files}


def assert_close(workdir: Path, other: Path) -> None:
    """All losses, of curves and of results, are the same to 1e-5 of their value."""
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


def test_a_team_trains_as_each_of_its_points_does_alone(team, tmp_path):
    assert_close(team, run(tmp_path / "alone", together=1))
    counts = [len(arrays) for arrays in saved_arrays(team).values()]
    assert len(counts) == 2 * (3 + 1 + 2)  # checkpoints, a twin, and two to recover from


@pytest.mark.slow
def test_lanes_are_shared_out_over_devices(tmp_path):
    """Two lanes on devices of their own; their batches, and their parameters, on two each."""
    config = config_of(2)
    config.mesh.update({"data": 2, "model": 2})
    expanded = points.expand(config, SWEEP, tmp_path)
    mesh = experiment.make_mesh(expanded[0].config)
    assert dict(mesh.shape) == {"sweep": 2, "data": 2, "model": 2}
    assert sweep.run(config, SWEEP, tmp_path / "parted", stages=("train",)) == {}
    assert_close(tmp_path / "parted", run(tmp_path / "alone", together=1))


def test_points_trained_one_by_one_are_those_of_the_team_to_the_bit(team, tmp_path):
    for place in ("1", "0"):
        run(tmp_path, selection=place)
    assert_same(team, tmp_path)


def test_one_that_is_not_finite_leaves_the_others_as_they_are(team, tmp_path):
    with_bad = chain(SWEEP, [{"seed": 2, RATE: 1e30}])
    failures = sweep.run(config_of(LANES), with_bad, tmp_path, stages=("train",))
    (reason,) = failures.values()
    assert "not finite in phase drift, by step 12; last checkpoint before: 10" in reason
    bad = points.expand(config_of(LANES), with_bad, tmp_path)[2]
    assert json.loads((bad.directory / "status.json").read_text())["state"] == "failed"
    assert "FloatingPointError" in (bad.directory / "error.txt").read_text()
    for path, content in contents(team).items():
        if path.endswith(".jsonl"):
            assert contents(tmp_path)[path] == content
    assert {line["phase"] for line in curves(tmp_path)[bad.name]} == {"pretrain"}


def test_what_another_worker_has_is_left_to_it(team, tmp_path):
    others = chain(SWEEP, [{"seed": 2}])
    expanded = points.expand(config_of(LANES), others, tmp_path)
    point_locks = {point.name: locks.Lock(point.directory) for point in expanded}
    theirs = locks.Lock(expanded[2].directory)
    with theirs.taken() as taken, Display(1) as display:
        assert taken
        attempts.train_team(expanded, point_locks, display)
    assert not (expanded[2].directory / "metrics.jsonl").exists()
    for name, lines in curves(team).items():
        assert curves(tmp_path)[name] == lines


def test_cut_off_at_any_moment_it_ends_with_the_same_bits(team, tmp_path, monkeypatch):
    """Some points of the team have then saved more than others."""
    moments, deaths = random.Random(0), 0
    advance = Display.advance_stage

    class Killed(BaseException):
        pass

    def advance_or_die(self, *arguments):
        advance(self, *arguments)
        if moments.random() < 0.3:
            raise Killed

    monkeypatch.setattr(Display, "advance_stage", advance_or_die)
    uneven = 0
    while True:
        try:
            run(tmp_path)
        except Killed:
            deaths += 1
            steps = [checkpoint.steps(p / "recovery") for p in tmp_path.glob("*seed=*")]
            uneven += steps[0] != steps[-1]
            continue
        break
    assert deaths >= 3
    assert uneven
    assert_same(team, tmp_path)


def test_stopped_in_every_call_it_makes_each_once(team, tmp_path, monkeypatch):
    calls = signal_in(monkeypatch, [(lanes, "advance")])
    stops = until_done(lambda: run(tmp_path))
    lines = next(iter(curves(team).values()))
    assert stops == len(calls) == len(lines)
    assert_same(team, tmp_path)
    assert not [*tmp_path.glob("**/aside"), *tmp_path.glob("**/.*")]


def test_what_differs_in_more_than_seeds_and_schedules_is_another_team():
    def places(sweep_points, together=2):
        expanded = points.expand(config_of(together), sweep_points, Path("unused"))
        return [(point.team, point.lane) for point in expanded]

    seeds = param("seed", range(3))
    widths = product(param("model.width", [8, 16]), seeds)
    found = places(widths)
    assert [lane for _, lane in found] == [0, 1, 0] * 2
    assert len({team for team, _ in found}) == 4
    assert places(param("seed", range(5)))[:3] == places(seeds)
    assert len({team for team, _ in places(product(param(RATE, [1e-3, 1e-2]), seeds), 6)}) == 1
    assert len({team for team, _ in places(seeds, 1)}) == 3
    for key, values in (
        ("phases.drift.optimizer.name", ["sgd", "adamw"]),
        ("phases.drift.targets", ["exact", "sampled"]),
        ("language.seed", [0, 1]),
        ("training.save_every", [1, 2]),
    ):
        assert len({team for team, _ in places(param(key, values))}) == 2


def test_stored_sentences_are_those_of_each_point(tmp_path):
    """A call of a team gets for each lane what the point gets alone."""

    def losses(together):
        config = config_of(together)
        config.language.update({"stored_sentences": 64, "data_dir": str(tmp_path / "data")})
        expanded = points.expand(config, SWEEP, tmp_path)
        (phase, _) = trajectory.phases(expanded[0].config)
        calls = {}
        for lane, point in enumerate(expanded):
            params = experiment.init_params(point.config)
            state = experiment.init_state(params, phase)
            calls[lane] = lanes.Call(point.config, phase, state, 2, 0, "trunk")
        with Display(1) as display:
            lanes.corpus.prepare(expanded[0].config.language, display)
        if together == 2:
            return [outcome.loss for outcome in lanes.advance(calls).values()]
        return [lanes.advance({0: call})[0].loss for call in calls.values()]

    together, alone = losses(2), losses(1)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-3
