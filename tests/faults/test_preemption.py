"""A signal loses no finished work, and the resumed run ends as if there had been no signal."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxflat.console import Display
from jaxflat.distributed import preemption
from jaxflat.flatness import Estimate
from jaxflat.runs import recovery, run, slots
from jaxflat.runs.measurements import Measurement
from jaxflat.sweeps import points, sweep
from tests.support.signals import COMPILED, signal_in, until_done
from tests.support.sweeps import every_stage, tiny_config
from tests.sweeps.test_sweep import contents

CONFIG = """
from tests.support.sweeps import every_stage

def get_config(_):
    return every_stage()
"""


def leftovers(workdir: Path) -> list[Path]:
    return [*workdir.glob("**/*unfinished*"), *workdir.glob("**/aside"), *workdir.glob("**/.*")]


@pytest.fixture(autouse=True)
def no_signal(monkeypatch):
    monkeypatch.setattr(preemption, "_received", [])


@pytest.fixture
def point(tmp_path):
    config = tiny_config()
    config.phases.pretrain.update({"steps": 3, "checkpoint_steps": (3,), "anneal_steps": 3})
    config.phases.drift.update({"steps": 2, "checkpoint_steps": (2,)})
    config.phases.drift.projection.checkpoint_steps = (2,)
    (point,) = points.expand(config, [{}], tmp_path)
    assert point.folder.lease.is_available()
    with point.folder.lease.try_acquire():
        point.folder.make()
        yield point


# In this process.


def test_an_interrupted_measurement_resumes_after_its_last_part(point):
    made, signals = [], [signal.SIGTERM]

    def measure(config, folder, checkpoint, measures, partial_results):
        def part(name):
            made.append((checkpoint, name))
            preemption._received.extend(signals)
            return 0.1 * len(name)

        for name in measures:
            values = [
                partial_results.value(f"{name}/{i}", partial(part, f"{name}/{i}")) for i in "012"
            ]
            estimate = Estimate(jnp.float32(sum(values)), jnp.float32(jnp.nan), 3, "seeds")
            yield name, partial_results.estimates(name, partial(dict, {name: estimate}))

    def settings(config):
        return {"first": 1, "second": [2]}

    measurement = Measurement("flatness", "flatness", settings, measure)
    path = point.folder.path / "flatness.jsonl"
    update = partial(measurement.measure_missing, point.config, point.folder, Display(1))
    with pytest.raises(preemption.Preempted):
        update()
    assert not path.exists()
    assert not measurement.is_done(point.config, point.folder)
    assert until_done(update) == 3 * 6 - 1
    assert measurement.is_done(point.config, point.folder)
    assert len(made) == len(set(made)) == 3 * 6
    assert not leftovers(point.folder.path)
    lines = path.read_text()
    path.unlink()
    signals.clear()
    preemption._received.clear()
    update()
    assert path.read_text() == lines


def test_parts_measured_under_other_settings_are_dropped(point):
    def measure(config, folder, checkpoint, measures, partial_results):
        value = jnp.float32(partial_results.value("one", lambda: 1.0))
        yield "accuracy", {"accuracy": Estimate(value, value, 2, "seeds")}

    measurement = Measurement("probes", "probes", lambda config: {"accuracy": 1}, measure)
    for digest, expected in (("another", 1.0), (measurement.digests(point.config), 2.0)):
        stored = {"settings": digest, "checkpoints/6": {"one": 2.0}}
        point.folder.write_json("probes.unfinished.json", stored)
        measurement.measure_missing(point.config, point.folder, Display(1))
        first = json.loads((point.folder.path / "probes.jsonl").read_text().splitlines()[0])
        assert (first["step"], first["mean"]) == (6, expected)
        (point.folder.path / "probes.jsonl").unlink()


@pytest.fixture
def no_training(monkeypatch):
    def advance(calls):
        ((slot, call),) = calls.items()
        state = dataclasses.replace(call.state, step=jnp.asarray(call.stop, jnp.int32))
        return {slot: slots.Outcome(state, 1 / call.stop)}

    monkeypatch.setattr(slots, "run_calls", advance)


def train(point):
    run.train_points([point], Display(1), pytest.fail)


def steps_of(point) -> list[int]:
    lines = (point.folder.path / "metrics.jsonl").read_bytes().splitlines()
    return [json.loads(line)["step"] for line in lines]


CURVE = [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
"""Where calls end: trunk, anneal of 3 steps from there, drift, projection of 3 steps from there."""


@pytest.mark.slow
def test_training_that_is_stopped_in_every_call_makes_each_call_once(
    point, no_training, monkeypatch
):
    calls = signal_in(monkeypatch, [(slots, "run_calls")])
    assert until_done(partial(train, point)) == len(calls) == len(CURVE)
    assert steps_of(point) == sorted(CURVE)
    assert recovery.is_trained(point.config, point.folder)
    assert not leftovers(point.folder.path)


@pytest.mark.parametrize("lost", ["lines", "state"])
@pytest.mark.slow
def test_an_anneal_of_which_something_is_lost_is_trained_again(
    point, no_training, monkeypatch, capsys, lost
):
    with monkeypatch.context() as patch:
        signal_in(patch, [(slots, "run_calls")], every=4)  # in the anneal
        with pytest.raises(preemption.Preempted):
            train(point)
    assert steps_of(point) == CURVE[:4]
    if lost == "lines":
        curve = point.folder.path / "metrics.jsonl"
        curve.write_bytes(b"".join(curve.read_bytes().splitlines(keepends=True)[:3]))
    else:
        (point.folder.path / "aside/checkpoints/6/_METADATA").write_bytes(b"")
    calls = signal_in(monkeypatch, [(slots, "run_calls")], every=0)
    preemption._received.clear()
    train(point)
    assert len(calls) == len(CURVE) - 3
    assert steps_of(point) == sorted(CURVE)
    assert ("aside/checkpoints/6: _METADATA" in capsys.readouterr().err) == (lost == "state")


@pytest.mark.slow
def test_a_run_stopped_in_every_compiled_call_makes_each_once(tmp_path, monkeypatch):
    calls = []
    for name, every in (("undisturbed", 0), ("stopped", 1)):
        with monkeypatch.context() as patch:
            calls.append(signal_in(patch, COMPILED, every))
            stops = until_done(partial(sweep.run, every_stage(), [{}], tmp_path / name))
    assert {name for _, name in COMPILED} - {"hessian_trace_terms"} == set(calls[0])
    assert calls[0] == calls[1]
    assert stops == len(calls[1])
    assert contents(tmp_path / "undisturbed") == contents(tmp_path / "stopped")
    assert not leftovers(tmp_path)


def test_a_signal_is_obeyed_at_once_where_no_work_has_to_be_saved():
    done = []
    preemption._announced.set()
    with pytest.raises(preemption.Preempted, match="SIGINT"):
        done.append(preemption._handle(signal.SIGINT, None))
    preemption._received.clear()
    with pytest.raises(preemption.Preempted, match="SIGTERM"), preemption.defer_signals():
        done.append(preemption._handle(signal.SIGTERM, None))
    assert done == [None]


# In separate processes, as users run it.


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    how = {"COLUMNS": "200", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    environment = os.environ | how
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


SCRIPT = """
import hashlib, os, signal, threading, time
from jaxflat.distributed import preemption
preemption.install_handlers()
def send(*delays):
    for delay in delays:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send, args=({delays}), daemon=True).start()
with preemption.defer_signals():
    hashlib.pbkdf2_hmac("sha256", b"", b"", {number})  # no signal handler runs during this call
    preemption.stop_if_requested(lambda: print("saved", flush=True))
"""


def test_a_second_signal_ends_a_call_that_would_go_on_for_an_hour():
    process = python("-c", SCRIPT.format(delays="0.1, 1.0", number=2**31 - 1))
    assert process.returncode == 128 + signal.SIGTERM
    assert process.stderr.startswith("SIGTERM: stopping after the current call")
    assert process.stdout == ""


def test_a_request_that_comes_twice_is_one():
    """`timeout` sends the signal to the process and to its group."""
    process = python("-c", SCRIPT.format(delays="0.1, 0.0", number=2_000_000))
    assert (process.returncode, process.stdout) == (75, "saved\n")
    assert process.stderr.count("\n") == 1


PLACES = {
    "jaxflat.sweeps.sweep": 1,
    "jaxflat.training.step:train_step": 1,
    "jaxflat.runs.slots:run_calls": 11,
    "jaxflat.storage.leased_folder:Folder.save": 5,
    "jaxflat.runs.measure_loss:_model_losses": 3,
    "jaxflat.runs.measure_flatness:sample_microbatches": 12,
    "jaxflat.runs.measure_probes:_featurize": 3,
    "jaxflat.runs.measure_belief_states:_errors": 3,
    "jaxflat.runs.measure_finetuning:_correct": 12,
    "jaxflat.analysis.page.figures:render": 2,
}
"""Imports, tracing for the compiler, training, saving, each measurement, the report; and as many
calls as there are at least."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return lambda workdir: ("jaxflat.main", f"--config={path}", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    process = python("-m", *command(workdir))
    assert process.returncode == 0, process.stderr
    return contents(workdir)


@pytest.mark.slow
def test_a_run_signalled_in_any_stage_ends_as_the_undisturbed_one(
    command, undisturbed, tmp_path, signal_trial
):
    choose = random.Random(signal_trial)
    where, most = list(PLACES.items())[(3 * signal_trial + 2) % len(PLACES)]
    number, name = choose.randint(1, most), choose.choice(["SIGTERM", "SIGINT"])
    process = python("-m", "tests.support.signalled", where, number, name, *command(tmp_path))
    ended = time.monotonic()
    assert process.returncode == 75, process.stderr
    lines = process.stderr.splitlines()
    (sent,) = (line for line in lines if line.startswith("signalled at "))
    seconds = ended - float(sent.removeprefix("signalled at "))
    which = f"trial {signal_trial}: {name} at call {number} of {where}"
    print(f"\n{which}: ended after {seconds:.1f} s")
    assert any(line.startswith(f"{name}: stopping") for line in lines)
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "report.html").exists()
    process = python("-m", *command(tmp_path))
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path) == undisturbed
    assert (tmp_path / "report.html").exists()
    shutil.rmtree(tmp_path)
