"""Lines of measurements: a setting outdates only the lines of the measures that depend on it."""

import csv
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxflat.config import MEASURES
from jaxflat.flatness import Estimate, Measured, TraceTerms
from jaxflat.runs import builders, measure_flatness, measure_probes, stages
from jaxflat.runs.measurements import PartialResults
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.files import read_lines, write_json, write_lines
from jaxflat.sweeps import points, sweep
from tests.runs.test_measure_flatness import CHEAP
from tests.support.counts import in_full
from tests.support.sweeps import tiny_config


def small_config():
    """Return a config of one phase and one measured checkpoint."""
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    config.phases.pretrain.update({"steps": 4, "anneal_steps": 2, "checkpoint_steps": (4,)})
    config.flatness.update_from_flattened_dict(CHEAP)
    config.flatness.microbatch_size = 8
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False})
    config.flatness.invariant = False
    return config


class Reads:
    """Replaces a config section, and records which of its keys are read."""

    def __init__(self, section, noted=None):
        self._section, self._noted = section, set() if noted is None else noted

    def __getattr__(self, key):
        self._noted.add(key)
        return getattr(self._section, key)

    __getitem__ = __getattr__


class WithReads:
    """Replaces a config; one of its sections is a Reads."""

    def __init__(self, config, name):
        self._config, self._name, self.noted = config, name, set()

    def __getattr__(self, key):
        section = getattr(self._config, key)
        return Reads(section, self.noted) if key == self._name else section


QUICK = ("worst_sharpness",)  # to compile
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MEASURES if name not in QUICK]


@pytest.mark.parametrize(
    "measure",
    [
        *QUICK,
        *SLOW[::3],
        *in_full(*(measure for i, measure in enumerate(SLOW) if i % 3)),
    ],
)
def test_a_measure_of_flatness_reads_only_the_keys_that_its_lines_depend_on(tmp_path, measure):
    config = small_config()
    config.flatness.update({"measures": (measure,), "invariant": True})
    (point,) = points.expand(config, [{}], tmp_path)
    watched = WithReads(point.config, "flatness")
    params = builders.init_params(point.config)
    problems = measure_flatness.Problems(watched, params, Checkpoint(6))
    found = measure_flatness.measure_problems(problems, measure, PartialResults())
    jax.block_until_ready([estimate.mean for estimate in found.values()])
    declared = measure_flatness.settings(point.config)[measure].keys() - {"probe_seed"}
    # Only traces have groups: other measures are the same with and without `by_block`.
    assert watched.noted - {"by_block"} <= declared
    assert ("by_block" in declared) == (measure in ("hessian_trace", "fisher_trace"))


# Below, quick functions replace the measures of flatness.


@pytest.fixture(scope="module")
def measured() -> Iterator[list[str]]:
    """Replace all measures of flatness by quick ones; return the names of those called."""
    calls = []

    def quick(name, problem, settings):
        calls.append(name)
        mean = jax.random.normal(problem.key) * settings.num_probes
        return Measured({name: Estimate(mean, jnp.abs(mean), 2, "sentences")})

    def quick_round(name, problem, settings, i):
        calls.append(name)
        terms_n = jax.random.normal(problem.key, (4,)) * settings.num_probes
        return TraceTerms({"all": terms_n}, jnp.ones(4), "sentences")

    with pytest.MonkeyPatch.context() as patch:
        for name in MEASURES:
            patch.setitem(measure_flatness.MEASURES, name, partial(quick, name))
        patch.setattr(measure_flatness, "draw_trace_round", quick_round)
        yield calls


@pytest.fixture(scope="module")
def finished(tmp_path_factory, measured) -> Path:
    workdir = tmp_path_factory.mktemp("measured")
    assert sweep.run(small_config(), [{}], workdir) == {}
    return workdir


@pytest.fixture
def copy(finished, measured, tmp_path) -> Path:
    measured.clear()
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def lines_of(workdir: Path, section: str) -> list[dict]:
    return list(read_lines(workdir / "run" / f"{section}.jsonl"))


def test_another_measure_recomputes_no_trace(copy, measured):
    before = lines_of(copy, "flatness")
    config = small_config()
    config.flatness.measures = ("hessian_trace", "hessian_eigenvalues")
    assert sweep.run(config, [{}], copy, stages=("flatness",)) == {}
    assert measured == ["hessian_eigenvalues"]
    after = lines_of(copy, "flatness")
    assert after[: len(before)] == before
    assert {line["measure"] for line in after[len(before) :]} == {"hessian_eigenvalues"}
    header = (copy / "results.csv").read_text().partition("\n")[0].split(",")
    assert {"hessian_trace", "hessian_eigenvalues"} <= set(header)


def test_a_key_of_one_measure_leaves_the_others(copy, measured):
    config = small_config()
    config.flatness.measures = ("hessian_trace", "gradient_noise")
    assert sweep.run(config, [{}], copy, stages=("flatness",)) == {}
    before = lines_of(copy, "flatness")
    measured.clear()
    config.flatness.num_probes = 2
    assert sweep.run(config, [{}], copy, stages=("flatness",)) == {}
    assert measured == ["hessian_trace"]
    kept = [line for line in before if line["measure"] == "gradient_noise"]
    after = lines_of(copy, "flatness")
    assert after[: len(kept)] == kept
    assert {line["measure"] for line in after[len(kept) :]} == {"hessian_trace"}


def test_measures_that_are_not_asked_for_leave_the_results(copy, measured):
    config = small_config()
    config.flatness.measures = ("gradient_noise",)
    config.probes.belief_state = False
    assert sweep.run(config, [{}], copy) == {}
    assert measured == ["gradient_noise"]
    header = (copy / "results.csv").read_text().partition("\n")[0].split(",")
    assert not [name for name in header if name.startswith(("hessian", "belief"))]
    assert {"gradient_noise", "linear_probe/state_2.map/16"} <= set(header)


def written_by_version_0_1(workdir: Path) -> Path:
    """Rewrite a work directory as version 0.1: settings are in status.json, not in the lines."""
    stored = json.loads((workdir / "sweep.json").read_text())
    for point in stored["points"]:
        status = json.loads((workdir / point["name"] / "status.json").read_text())
        for section, recorded in point["measured"].items():
            path = workdir / point["name"] / f"{section}.jsonl"
            keys = ("step", "projected", "column", "mean", "sem", "num_samples", "over")
            lines = [{key: line[key] for key in keys} for line in read_lines(path)]
            write_lines(path, [{"measure": line.pop("column"), **line} for line in lines])
            del recorded["measures"]
        del point["settings"]
        write_json(
            workdir / point["name"] / "status.json", status | {"measured": point["measured"]}
        )
    write_json(workdir / "sweep.json", stored)
    return workdir


def test_a_work_directory_of_version_0_1_opens(copy, finished, monkeypatch):
    written_by_version_0_1(copy)
    before = {section: lines_of(copy, section) for section in ("evaluation", "flatness", "probes")}
    with monkeypatch.context() as patch:
        for measurement in stages.MEASUREMENTS:
            patch.setattr(type(measurement), "measure_missing", pytest.fail)
        assert sweep.run(small_config(), [{}], copy) == {}
    assert before == {section: lines_of(copy, section) for section in before}
    assert (copy / "results.csv").read_text() == (finished / "results.csv").read_text()
    config = small_config()
    config.flatness.num_probes = 2
    assert sweep.run(config, [{}], copy) == {}
    assert lines_of(copy, "probes") == before["probes"]
    assert all("settings" in line for line in lines_of(copy, "flatness"))


def test_measures_of_probes_are_those_that_are_asked_for(tmp_path):
    config = small_config()
    config.probes.update({"projected_dimension": 4, "belief_state": False})
    (point,) = points.expand(config, [{}], tmp_path)
    settings = measure_probes.settings(point.config)
    assert list(settings) == ["linear_probe", "linear_probe_projected"]
    assert "projected_dimension" not in settings["linear_probe"]


def test_lines_of_measures_that_are_not_asked_for_remain_in_case_they_are_again(copy, measured):
    config = small_config()
    config.flatness.update({"measures": ("gradient_noise",), "num_probes": 2})
    assert sweep.run(config, [{}], copy) == {}
    assert sweep.run(small_config(), [{}], copy) == {}
    assert measured == ["gradient_noise"]


def test_a_finished_measurement_deletes_the_parts_of_an_interrupted_one(copy):
    left = copy / "run" / "flatness.unfinished.json"
    write_json(left, {"settings": {}, "checkpoints/6": {}})
    assert sweep.run(small_config(), [{}], copy) == {}
    assert not left.exists()


def test_a_line_without_an_estimate_has_no_column(copy, monkeypatch):
    monkeypatch.setitem(measure_flatness.MEASURES, "gradient_noise", lambda *_: Measured({}))
    config = small_config()
    config.flatness.measures = ("gradient_noise",)
    for _ in range(2):
        assert sweep.run(config, [{}], copy) == {}
        assert "gradient_noise" not in (copy / "results.csv").read_text()


def test_a_value_that_is_not_finite_is_kept_and_named(copy, monkeypatch, capsys):
    def measure(*_):
        return Measured({"gradient_noise": Estimate(jnp.asarray(jnp.nan), jnp.zeros(()), 2, "x")})

    monkeypatch.setitem(measure_flatness.MEASURES, "gradient_noise", measure)
    config = small_config()
    config.flatness.measures = ("gradient_noise",)
    assert sweep.run(config, [{}], copy, stages=("flatness",)) == {}
    warning = "warning: run: gradient_noise is nan at checkpoints/6; the report leaves it out"
    assert warning in capsys.readouterr().out
    with (copy / "results.csv").open() as file:
        assert [row["gradient_noise"] for row in csv.DictReader(file)] == ["nan"]


def test_a_learning_coefficient_without_a_value_says_why(copy, monkeypatch, capsys):
    name = "local_learning_coefficient"
    names = (name, f"{name}/r_hat", f"{name}/effective_samples")

    def measure(*_):
        numbers = (Estimate(jnp.asarray(x), jnp.zeros(()), 4, "x") for x in (jnp.nan, 1.25, 31.0))
        return Measured(dict(zip(names, numbers, strict=True)))

    monkeypatch.setitem(measure_flatness.MEASURES, name, measure)
    config = small_config()
    config.flatness.measures = (name,)
    assert sweep.run(config, [{}], copy, stages=("flatness",)) == {}
    warning = (
        "is nan at checkpoints/6 (R-hat 1.250, 31 effective samples); the report leaves it out"
    )
    assert warning in " ".join(capsys.readouterr().out.split())
