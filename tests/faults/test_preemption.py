"""A signal: nothing that was computed is lost, and what goes on ends as if there had been none."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest
from sweeps import tiny_config

from jaxflat import points, preemption, run, sweep
from jaxflat.flatness import trace_measures
from jaxflat.metrics import Display, write_json
from jaxflat.stages import evaluate, finetune, probe
from jaxflat.stages import train as training

FULL = "JAXFLAT_FAULT_TRIALS" in os.environ
NUM_TRIALS = int(os.environ.get("JAXFLAT_FAULT_TRIALS", "2"))
RESULTS = ("results.csv", *(f"*/{name}.jsonl" for name in ("metrics", *run.MEASUREMENTS)))
WORK = (
    (training, "_advance"),
    (evaluate, "_losses"),
    *((trace_measures, f"hessian_trace_{kind}") for kind in ("terms", "samples")),
    (trace_measures, "fisher_trace_terms"),
    (probe, "_linear_records"),
    (probe, "belief_records"),
    (finetune, "_correct"),
)
CONFIG = """
from sweeps import tiny_config

def get_config(scale=None):
    config = tiny_config()
    config.flatness.update({"embedded_width": 16, "relative_error": 1e-9, "max_rounds": 2})
    config.flatness.update({"num_microbatches": 64, "microbatch_size": 1})
    tuning = {"shots": 8, "num_draws": 2, "batch_size": 4, "epochs": 1, "warmup_steps": 1}
    config.probes.finetune.update(tuning)
    return config
"""


def config_of_every_stage():
    names = {}
    exec(CONFIG, names)
    return names["get_config"]()


def results(workdir: Path) -> dict[str, str]:
    """Return a hash of every result file: what must not depend on where a run was cut off."""
    paths = [path for pattern in RESULTS for path in workdir.glob(pattern)]
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
    }


def leftovers(workdir: Path) -> list[Path]:
    return [*workdir.glob("**/*unfinished*"), *workdir.glob("**/.*")]


@pytest.fixture(autouse=True)
def no_signal(monkeypatch):
    monkeypatch.setattr(preemption, "_received", [])


def signal_at(monkeypatch, work, every=1):
    """Let a signal come in every so many calls of these functions; return the calls."""
    calls = []

    def follow(module, name):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            outcome = function(*args, **kwargs)
            calls.append(name)
            if every and len(calls) % every == 0:
                preemption._received.append(signal.SIGTERM)
            return outcome

        monkeypatch.setattr(module, name, wrapper)

    for module, name in work:
        follow(module, name)
    return calls


def until_done(work) -> int:
    """Do the work again until no signal stops it; return how often one did."""
    for stops in range(1000):
        preemption._received.clear()
        try:
            work()
        except preemption.Preempted:
            continue
        return stops
    raise AssertionError("it gets nowhere")


# In process.


def test_a_measurement_that_was_stopped_goes_on_after_its_last_part(tmp_path, monkeypatch):
    made = []

    def measured(config, directory, snapshot, keep):
        def part(name):
            made.append((snapshot, name))
            preemption._received.append(signal.SIGTERM)
            where = {"step": snapshot.step, "projected": int(snapshot.projected)}
            return [{**where, "measure": name, "mean": 0.1 * len(name), "sem": float("nan")}]

        def rounds():
            return [r for i in "012" for r in keep(f"rounds/{i}", partial(part, i))]

        return keep("first", lambda: part("first")) + keep("rounds", rounds)

    monkeypatch.setitem(run.MEASUREMENTS, "flatness", measured)
    (point,) = points.expand(tiny_config(), [{}], tmp_path)
    point.directory.mkdir()
    path = point.directory / "flatness.jsonl"
    unfinished = point.directory / "flatness.unfinished.json"

    def measure():
        run.measure(point, "flatness", Display(1))
        preemption.check()

    for num_made in (1, 2):
        preemption._received.clear()
        with pytest.raises(preemption.Preempted):
            measure()
        assert len(json.loads(unfinished.read_text())) == len(made) == num_made
    assert not path.exists()
    assert not run.is_done(point, ("flatness",))
    assert until_done(measure) == 4 * 4 - 2
    assert len(made) == len(set(made)) == 4 * 4
    assert not unfinished.exists()
    lines = path.read_text()
    path.unlink()
    monkeypatch.setattr(preemption, "check", lambda: None)
    measure()
    assert path.read_text() == lines


def test_parts_made_under_other_settings_are_dropped(tmp_path, monkeypatch):
    (point,) = points.expand(tiny_config(), [{}], tmp_path)
    point.directory.mkdir()
    write_json(point.directory / "probes.unfinished.json", {"checkpoints/7/one": ["old"]})
    monkeypatch.setitem(
        run.MEASUREMENTS, "probes", lambda *args: args[-1]("one", lambda: [{"step": 7}])
    )
    run.measure(point, "probes", Display(1))
    assert "old" not in (point.directory / "probes.jsonl").read_text()


def advance_without_training(config, phase, state, stop, branch=None):
    return dataclasses.replace(state, step=jnp.asarray(stop, jnp.int32)), 1 / stop


def test_training_that_is_stopped_in_every_call_makes_each_call_once(tmp_path, monkeypatch):
    """On the trunk, in anneals and in the projection; the curve is the same."""
    monkeypatch.setattr(training, "_advance", advance_without_training)
    config = tiny_config()
    config.phases.pretrain.update({"steps": 5, "checkpoint_steps": (3,), "anneal_steps": 5})
    curves, made = [], []
    for every, directory in ((0, tmp_path / "undisturbed"), (1, tmp_path / "stopped")):
        with monkeypatch.context() as patch:
            made.append(signal_at(patch, [(training, "_advance")], every))
            (point,) = points.expand(config, [{}], directory)
            point.directory.mkdir(parents=True)

            def work(point=point):
                training.train(point.config, point.directory, Display(1))
                preemption.check()

            stops = until_done(work)
        assert stops == (len(made[-1]) if every else 0)
        curves.append((point.directory / "metrics.jsonl").read_bytes())
        assert not leftovers(point.directory)
        assert training.is_trained(point.config, point.directory)
    assert curves[0] == curves[1]
    assert len(made[0]) == len(made[1]) == 4 + 3 + 3 + 2


def test_an_anneal_whose_lines_are_gone_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_advance", advance_without_training)
    (point,) = points.expand(tiny_config(), [{}], tmp_path)
    point.directory.mkdir()
    calls = signal_at(monkeypatch, [(training, "_advance")], every=3)  # in the first anneal

    def train():
        training.train(point.config, point.directory, Display(1))

    with pytest.raises(preemption.Preempted):
        train()
    curve = point.directory / "metrics.jsonl"
    lines = curve.read_bytes().splitlines(keepends=True)
    assert [json.loads(line).get("branch") for line in lines] == [None, None, 3]
    curve.write_bytes(b"".join(lines[:2]))
    preemption._received.clear()
    calls.clear()
    until_done(train)
    assert [json.loads(line)["step"] for line in curve.read_bytes().splitlines()][:4] == [
        2,
        3,
        5,
        7,
    ]


@pytest.mark.slow
def test_a_run_stopped_in_every_compiled_call_makes_each_once(tmp_path, monkeypatch):
    """Calls of every stage, rounds of a trace and jobs of fine-tuning too; the same files."""
    calls = []
    for name, every in (("undisturbed", 0), ("stopped", 1 if FULL else 5)):
        with monkeypatch.context() as patch:
            calls.append(signal_at(patch, WORK, every))
            where = tmp_path / name
            stops = until_done(lambda where=where: sweep.run(config_of_every_stage(), [{}], where))
    assert calls[0] == calls[1]
    assert stops == len(calls[1]) // (1 if FULL else 5) > 10
    assert {name for _, name in WORK} == set(calls[0])
    assert results(tmp_path / "undisturbed") == results(tmp_path / "stopped")
    assert not leftovers(tmp_path)


# In processes of their own, as users run it.


def environment() -> dict[str, str]:
    tests = Path(__file__).parents[1]
    paths = (str(tests.parent), str(tests), os.environ.get("PYTHONPATH", ""))
    how = {"COLUMNS": "200", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **how}


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def signalled(where: str, number: int, name: str, *command: object):
    """Run a command that gets a signal at a call; return (the process, seconds until it ended)."""
    driver = Path(__file__).with_name("signalled.py")
    process = python(driver, where, number, name, *command)
    ended = time.monotonic()
    first = process.stderr.partition("\n")[0]
    assert first.startswith("signalled at "), process.stderr
    return process, ended - float(first.split()[-1])


COMMANDS = ("main", "build", "measure", "theory", "benchmark", "report", "status")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_during_the_imports_is_one_line_and_exit_code_75(name):
    process, _ = signalled("rich.table", 1, "SIGINT", f"jaxflat.{name}", "bartlett")
    assert process.returncode == 75
    assert process.stderr.count("\n") == 2  # the driver's own and
    assert process.stderr.splitlines()[1].startswith("SIGINT: stopping")
    assert process.stdout == ""


SCRIPT = """
import hashlib, os, signal, threading, time
from jaxflat import preemption
preemption.install()
def send(*delays):
    for delay in delays:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send, args=({delays}), daemon=True).start()
with preemption.deferred():
    hashlib.pbkdf2_hmac("sha256", b"", b"", {number})  # a call that no handler runs in
    print("saved", flush=True)
    preemption.check()
"""


def test_a_second_signal_ends_a_call_that_would_go_on_for_an_hour():
    process = python("-c", SCRIPT.format(delays="0.1, 1.0", number=2**31 - 1))
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: stopping after the current call" in process.stderr
    assert process.stdout == ""


def test_a_request_that_comes_twice_is_one():
    """`timeout` signals the process and its group."""
    process = python("-c", SCRIPT.format(delays="0.1, 0.0", number=2_000_000))
    assert (process.returncode, process.stdout) == (75, "saved\n")
    assert process.stderr.count("\n") == 1


AGREEING = """
import os, signal, sys
from jaxflat import preemption
preemption.install()
import jax
place = int(sys.argv[2])
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, place)
with preemption.deferred():
    for number in range(100):
        if number == 5 * place + 3:
            os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[place])
        if preemption.requested():
            print("stopped at", number, flush=True)
        preemption.check()
"""


def test_processes_of_one_run_stop_at_the_same_call():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", AGREEING, port]
    how = {"stdout": subprocess.PIPE, "text": True, "env": environment()}
    processes = [subprocess.Popen([*command, place], **how) for place in "01"]
    said = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75]
    assert said == ["stopped at 3"] * 2


PLACES = {
    "jaxflat.sweep": 1,
    "jaxflat.sweep:expand": 1,
    "jaxflat.training.step:train_step": 1,
    "jaxflat.stages.train:_advance": 3,
    "jaxflat.stages.train:_train_aside": 1,
    "jaxflat.checkpoint:save": 1,
    "jaxflat.stages.evaluate:_answers": 2,
    "jaxflat.stages.flatness:sample_microbatches": 4,
    "jaxflat.stages.probe:_featurize": 3,
    "jaxflat.stages.probe:_probe_correct": 2,
    "jaxflat.stages.belief:_errors": 2,
    "jaxflat.stages.finetune:_correct": 4,
    "jaxflat.sweep:gather": 1,
    "jaxflat.analysis.figures:render": 2,
}
"""Imports and loading, tracing for the compiler, training and saving, each measurement, the report;
in the order in which a run gets there, with as many calls as there surely are."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return lambda workdir: ("jaxflat.main", f"--config={path}", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    process = python("-m", *command(workdir))
    assert process.returncode == 0, process.stderr
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(NUM_TRIALS))
def test_a_run_signalled_in_each_stage_ends_as_the_undisturbed_one(
    trial, command, undisturbed, tmp_path
):
    choose = random.Random(trial)
    for where, most in PLACES.items():
        number = choose.randint(1, most)
        name = choose.choice(["SIGTERM", "SIGINT"])
        process, seconds = signalled(where, number, name, *command(tmp_path))
        print(f"trial {trial}: {name} at call {number} of {where}: ended after {seconds:.1f} s")
        assert process.returncode == 75, (where, process.stderr)
        assert "Traceback" not in process.stderr
        assert f"{name}: stopping" in process.stderr
    assert not (tmp_path / "report.html").exists()
    process = python("-m", *command(tmp_path))
    assert process.returncode == 0, process.stderr
    assert results(tmp_path) == results(undisturbed)
    assert (tmp_path / "report.html").exists()
