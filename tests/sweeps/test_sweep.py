"""A sweep as its users treat it: interrupted, extended, remeasured, and given bad input."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from jaxflat.analysis.comparison import read_comparison
from jaxflat.config import Sweep, arm, chain, param, product
from jaxflat.config.validation import InputError
from jaxflat.console import Display
from jaxflat.measure import __main__ as measure
from jaxflat.measure.subjects import run_subject
from jaxflat.sweeps import sweep, workers
from tests.support.counts import FULL
from tests.support.signals import COMPILED, signal_in, until_done
from tests.support.sweeps import tiny_config, tiny_sweep

# Everything that a run's numbers are in; timing.jsonl and the TensorBoard events hold clocks.
RESULTS = ("metrics.jsonl", "evaluation.jsonl", "flatness.jsonl", "probes.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("sweep")
    assert sweep.run(tiny_config(), tiny_sweep(), workdir) == {}
    return workdir


def small_config() -> ConfigDict:
    """One program trains both phases, and the one measure is soon compiled."""
    config = tiny_config()
    config.phases.drift.targets = "exact"
    config.phases.drift.optimizer.name = "adamw"
    config.flatness.update({"measures": ("fisher_trace",), "invariant": False})
    return config


def small_sweep() -> Sweep:
    """A point of one width, and the lookup table."""
    widths = param("model.width", [8])
    return chain(product(param("seed", [0]), widths), tiny_sweep()[-1:])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("small")
    assert sweep.run(small_config(), small_sweep(), workdir) == {}
    return workdir


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(workdir: Path) -> dict[str, bytes]:
    """Return every result file of a work directory, as bytes; sweep.json without its command."""
    names = [*workdir.glob("*.csv"), *(path for n in RESULTS for path in workdir.glob(f"*/{n}"))]
    found = {str(path.relative_to(workdir)): path.read_bytes() for path in names}
    for path in workdir.glob("sweep.json"):
        record = json.loads(path.read_text()) | {"command": ""}
        found["sweep.json"] = json.dumps(record).encode()
    return found


def saved_arrays(workdir: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return every array of measured parameters, and of each point's last training state.

    A run that is stopped keeps other states before the last one.
    """
    found = {}
    with ocp.StandardCheckpointer() as checkpointer:
        folders = ("checkpoints", "projected")
        paths = [path for name in folders for path in workdir.glob(f"*/{name}/*")]
        for folder in workdir.glob("*/recovery"):
            paths.append(max(folder.glob("[0-9]*"), key=lambda path: int(path.name)))
        for path in sorted(paths):
            leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path))
            arrays = {jax.tree_util.keystr(where): np.asarray(leaf) for where, leaf in leaves}
            found[str(path.relative_to(workdir))] = arrays
    return found


def assert_same(workdir: Path, other: Path) -> None:
    """Results, parameters and optimizer states are bitwise the same."""
    assert contents(workdir) == contents(other)
    arrays, others = saved_arrays(workdir), saved_arrays(other)
    assert arrays.keys() == others.keys()
    assert sum(len(leaves) for leaves in arrays.values()) > 100
    jax.tree.map(np.testing.assert_array_equal, arrays, others)


def modified(workdir: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(workdir.glob(pattern))}


def test_a_small_sweep_is_measured_at_every_checkpoint(small):
    lines = (small / "results.csv").read_text().splitlines()
    header, *rows = [line.split(",") for line in lines]
    assert len(rows) == 4 + 1
    assert {"excess_loss", "fisher_trace", "linear_probe/state_2.map/16"} <= set(header)
    assert all(row[header.index("excess_loss")] for row in rows)


@pytest.mark.slow
def test_every_point_is_measured_at_every_checkpoint(finished):
    lines = (finished / "results.csv").read_text().splitlines()
    header, *rows = [line.split(",") for line in lines]
    # Two seeds of two widths with three checkpoints and a projection, and one lookup table.
    assert len(rows) == 2 * 2 * 4 + 1
    for name in ("excess_loss", "hessian_trace@embedded", "fisher_trace_sem", "seed", "num_params"):
        assert name in header
    assert {"linear_probe/state_2.map/16", "bayes/state_2.latent"} <= set(header)
    assert not [name for name in header if name.startswith(("finetune", "linear_probe_projected"))]
    table = dict(zip(header, rows[-1], strict=True))
    assert table["excess_loss"] == "0.0"
    assert table["hessian_trace"] == ""
    assert float(table["belief_state/state_2"]) <= 1


@pytest.mark.parametrize(
    ("made", "folder", "arguments"),
    [
        ("small", "projected", ["--measures=fisher_trace"]),
        pytest.param("finished", "checkpoints", [], marks=pytest.mark.slow),
        pytest.param("finished", "projected", [], marks=pytest.mark.slow),
    ],
)
def test_the_command_measures_a_checkpoint_as_its_run_did(
    made, folder, arguments, request, tmp_path
):
    workdir = request.getfixturevalue(made)
    point = next(path.parent for path in sorted(workdir.glob("*width=8*/checkpoints")))
    step = max(int(path.name) for path in (point / "checkpoints").iterdir())
    file = tmp_path / "measured.json"
    assert (
        measure.main([f"--checkpoint={point}/{folder}/{step}", f"--json={file}", *arguments]) == 0
    )
    measured = json.loads(file.read_text())["measured"]
    lines = [json.loads(line) for line in (point / "flatness.jsonl").read_text().splitlines()]
    lines = [r for r in lines if (r["step"], r["projected"]) == (step, int(folder == "projected"))]
    lines = [r for r in lines if "@embedded" not in r["column"]]
    assert {line["column"] for line in lines} == measured.keys() - {"loss"}
    assert "fisher_trace/layer_last.mlp" in measured
    for line in lines:
        found = measured[line["column"]]
        for name in ("mean", "sem", "num_samples", "over"):
            assert found[name] == line[name], line["column"]


def test_the_command_measures_again_with_another_seed(small, tmp_path):
    point = next(path.parent for path in sorted(small.glob("*width=8*/checkpoints")))
    file, values = tmp_path / "measured.json", []
    for seed in ((), ("--seed=5",)):
        how = (f"--json={file}", "--measures=fisher_trace", *seed)
        assert measure.main([f"--checkpoint={point}/checkpoints/16", *how]) == 0
        values.append(json.loads(file.read_text())["measured"]["fisher_trace"]["mean"])
    own, other = values
    assert other != own
    assert abs(other / own - 1) < 0.5  # other sentences and draws


def test_the_command_measures_all_checkpoints_on_the_same_draws(small, tmp_path):
    point = next(path.parent for path in sorted(small.glob("*width=8*/checkpoints")))
    steps = sorted(int(path.name) for path in (point / "checkpoints").iterdir())
    file = tmp_path / "measured.json"
    how = ("--measures=fisher_trace", f"--json={file}")
    assert measure.main([f"--checkpoint={point}/checkpoints/*", *how]) == 0
    lines = json.loads(file.read_text())["checkpoints"]
    assert [line["step"] for line in lines] == steps
    assert len({line["measured"]["fisher_trace"]["mean"] for line in lines}) == len(steps) > 1
    for same_draws in (True, False):
        drawn = [
            run_subject(point / "checkpoints" / str(step), {}, same_draws=same_draws).problem
            for step in steps[:2]
        ]
        tokens = [np.asarray(problem.sample(0).inputs_BxT) for problem in drawn]
        assert (tokens[0] == tokens[1]).all() == same_draws
        assert (drawn[0].key == drawn[1].key).all() == same_draws
        assert drawn[0].num_examples < drawn[1].num_examples


@pytest.mark.parametrize("seed", range(3 if FULL else 1))
@pytest.mark.slow
def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(
    finished, tmp_path, monkeypatch, seed
):
    """Cut off at random moments, as by kill -9: no cleanup code of ours gets to run."""
    moments = random.Random(seed)
    advance = Display.advance_stage

    class Killed(BaseException):
        pass

    def advance_or_die(self, *arguments):
        advance(self, *arguments)
        if moments.random() < 0.1:
            raise Killed

    monkeypatch.setattr(Display, "advance_stage", advance_or_die)
    deaths = 0
    while True:
        try:
            sweep.run(tiny_config(), tiny_sweep(), tmp_path)
        except Killed:
            deaths += 1
            continue
        break
    assert deaths >= 3
    assert_same(tmp_path, finished)


@pytest.mark.slow
def test_preempted_run_saves_says_so_and_goes_on(finished, tmp_path, monkeypatch):
    calls = signal_in(monkeypatch, COMPILED, every=17)

    def run():
        if calls:
            statuses = [json.loads(path.read_text()) for path in tmp_path.glob("*/status.json")]
            assert [status["state"] for status in statuses].count("preempted") == 1
        assert sweep.run(tiny_config(), tiny_sweep(), tmp_path) == {}

    assert until_done(run) == len(calls) // 17 > 5
    assert contents(tmp_path) == contents(finished)


@pytest.mark.slow
def test_new_seeds_train_only_themselves(copy, capsys, monkeypatch):
    spent = []
    monkeypatch.setattr(Display, "add_seconds", lambda self, name, *_: spent.append(name))
    before = modified(copy, "*/checkpoints/*/*") | modified(copy, "*/*.jsonl")
    old = {path for path in before if path.name != "timing.jsonl"}
    assert sweep.run(tiny_config(), tiny_sweep(num_seeds=3), copy) == {}
    after = modified(copy, "*/checkpoints/*/*") | modified(copy, "*/*.jsonl")
    assert {path: after[path] for path in old} == {path: before[path] for path in old}
    assert len((copy / "results.csv").read_text().splitlines()) == 1 + 3 * 2 * 4 + 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "excess_loss" in line]
    new = [name for line in lines if "(ETA" in line for name in spent if name in line]
    assert (len(lines), new) == (6 + 1, spent)  # only what takes time here tells how much is left
    assert all("seed=2" in name for name in spent)


@pytest.mark.slow
def test_new_measurement_settings_measure_again_and_train_nothing(copy):
    parts = ("*/checkpoints/*/*", "*/projected/*/*", "*/probes.jsonl")
    before = [modified(copy, part) for part in parts]
    flatness = contents(copy)
    config = tiny_config()
    config.flatness.labels = "data"  # the same shapes, so nothing is compiled again
    assert sweep.run(config, tiny_sweep(), copy) == {}
    assert [modified(copy, part) for part in parts] == before
    changed = {name for name, text in contents(copy).items() if text != flatness[name]}
    # sweep.json says what each point's measurements depend on.
    assert {Path(n).name for n in changed} == {
        *("flatness.jsonl", "measurements.csv", "results.csv", "sweep.json")
    }
    assert len(changed) == 4 + 3


@pytest.mark.slow
def test_checkpoints_are_fine_tuned_and_projected_when_that_is_asked_for(copy):
    config = tiny_config()
    config.probes.projected_dimension = 4
    tuning = {"shots": 8, "batch_size": 4, "epochs": 1, "warmup_steps": 1}
    config.probes.finetune.update(tuning)
    before = modified(copy, "*/checkpoints/*/*")
    assert sweep.run(config, tiny_sweep(), copy, stages=("probes",), selection="0,4") == {}
    assert modified(copy, "*/checkpoints/*/*") == before
    header, *rows = [line.split(",") for line in (copy / "results.csv").read_text().splitlines()]
    *trained, table = [dict(zip(header, row, strict=True)) for row in rows]
    for name in ("finetune/state_2.map", "finetune/state_2.latent"):
        assert [0 <= float(row[name]) <= 1 for row in trained[:3]] == [True] * 3
        assert all(float(row[f"{name}_sem"]) >= 0 for row in trained[:3])
        assert table[name] == trained[-1][name] == ""
    for row in (*trained[:3], table):
        assert 0 <= float(row["linear_probe_projected/state_2.map/16"]) <= 1


def test_another_training_config_in_an_old_folder_is_refused(small):
    before = modified(small, "**/*")
    config = small_config()
    config.phases.pretrain.batch_size = 16
    with pytest.raises(InputError, match=r"phases\.pretrain\.batch_size=8.*batch_size=16"):
        sweep.run(config, small_sweep(), small)
    assert modified(small, "**/*") == before


def test_an_unnamed_sweep_gets_names_and_new_ones_and_trains_nothing(small, tmp_path, monkeypatch):
    workdir = Path(shutil.copytree(small, tmp_path / "copy"))
    monkeypatch.setattr(workers, "run_point", lambda point, *_: pytest.fail(point.name))
    measured = modified(workdir, "*/*.jsonl") | modified(workdir, "*/checkpoints/*/*")
    header, *rows = (small / "results.csv").read_text().splitlines()
    table = {"model.name": "lookup_table", "phase_order": ()}
    for trained, exact in (("SAM", "exact"), ("[SAM] & co", "lookup")):
        # The width of the trained point is now left out: it is the config's.
        listed = product(param("seed", [0]), chain(arm(trained, {}), arm(exact, table)))
        assert sweep.run(small_config(), listed, workdir) == {}
        names = [trained] * (len(rows) - 1) + [exact]
        new = [row.replace(",", f",{name},", 1) for name, row in zip(names, rows, strict=True)]
        lines = [header.replace(",", ",arm,", 1), *new]
        assert (workdir / "results.csv").read_text().splitlines() == lines
        comparison = read_comparison(workdir)
        assert [*comparison.arms, *(cell.arm for cell in comparison.controls)] == [trained, exact]
    assert {path: path.stat().st_mtime_ns for path in measured} == measured
    assert sorted(path.name for path in workdir.iterdir()) == sorted(
        path.name for path in small.iterdir()
    )


@pytest.mark.slow
def test_a_failing_point_leaves_the_others_alone(finished, tmp_path, monkeypatch):
    run_point = workers.run_point

    def fail_on_width_16(point, *arguments):
        if point.config.model.width == 16:
            raise RuntimeError("out of luck")
        run_point(point, *arguments)

    monkeypatch.setattr(workers, "run_point", fail_on_width_16)
    failures = sweep.run(tiny_config(), tiny_sweep(), tmp_path)
    assert set(failures.values()) == {"RuntimeError: out of luck"}
    assert len(failures) == 2
    monkeypatch.setattr(workers, "run_point", run_point)
    assert sweep.run(tiny_config(), tiny_sweep(), tmp_path) == {}
    assert contents(tmp_path) == contents(finished)


@pytest.mark.slow
def test_a_point_that_diverges_says_where_and_what_is_left(tmp_path):
    config = tiny_config()
    config.phases.drift.schedule.learning_rate = 1e30
    (reason,) = sweep.run(config, [{"seed": 0}], tmp_path, stages=("train",)).values()
    assert "are not finite in phase drift, by step 12; last checkpoint before: 10" in reason
