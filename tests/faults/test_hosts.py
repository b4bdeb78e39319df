"""One run in two processes of four devices each: a process is killed or gets a signal."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxflat.storage.leased_folder import Folder
from tests.support.counts import in_full

pytestmark = pytest.mark.slow

HEARTBEAT = 8  # seconds
TOLERANCES = {"metrics": 1e-5, "evaluation": 1e-5, "flatness": 1e-4, "probes": 1e-4}
MEASURED, TRAIN = "--stages=train,flatness,probes", "--stages=train"
CONFIG_FILE = """
from jaxflat.config import param
from tests.support.sweeps import tiny_config

def get_sweep(seeds):
    return param("seed", range(int(seeds))) or [{}]

def get_config(seeds):
    config = tiny_config()
    config.mesh.update(dict(data=2, model=4))
    config.training.update(dict(steps_per_call=1, save_every=1))
    config.flatness.measures = ("hessian_trace",)
    config.flatness.by_block = False
    # Few sentences, or a head as large as the width, leave directions of a head without a gradient.
    # Rounding would then decide how far invariant traces rescale these.
    config.flatness.update({"num_microbatches": 4, "microbatch_size": 64})
    config.model.head_size = 4
    finetuned = dict(shots=16, num_draws=4, epochs=1, batch_size=8, warmup_steps=1)
    config.probes.finetune.update(finetuned)  # as many jobs as devices
    for phase in config.phases.values():
        phase.optimizer.update(dict(name="sgd", sgd=dict(momentum=0.5)))
        phase.schedule.learning_rate = 0.1
    return config
"""
COMMAND = f"""
import faulthandler, os, signal, sys
faulthandler.register(signal.SIGUSR1)
from jaxflat import main
from jaxflat.distributed import preemption, ranks, sharding
from jaxflat.runs import stages
preemption.install_handlers()
sharding.set_up_devices()
ranks.SILENCE_LIMIT = {HEARTBEAT}
sharding.LARGE = 1  # both processes divide moments
if os.environ.get("JAX_PROCESS_ID") in os.environ.get("FAILING", "").split():
    evaluation, *others = stages.MEASUREMENTS
    stages.MEASUREMENTS = (evaluation._replace(measure=lambda *_: 1 / 0), *others)
sys.exit(main.main())
"""


class Processes:
    """One run in several processes; `num_devices` gives the number of devices of each."""

    def __init__(self, folder: Path, workdir: Path, num_devices, *arguments: str, seeds: int = 0):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        (folder / "tiny.py").write_text(CONFIG_FILE)
        command = [sys.executable, "-c", COMMAND, f"--config={folder}/tiny.py:{seeds}"]
        self.logs = [folder / f"{workdir.name}-{n}.log" for n in range(len(num_devices))]
        self.started = []
        for number, devices in enumerate(num_devices):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "PYTHONHASHSEED": str(number),  # sets are in another order in each process
                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
            }
            if len(num_devices) > 1:
                environment["JAX_COORDINATOR_ADDRESS"] = address
                environment["JAX_NUM_PROCESSES"] = str(len(num_devices))
                environment["JAX_PROCESS_ID"] = str(number)
            with self.logs[number].open("wb") as log:
                output = {"stdout": log, "stderr": subprocess.STDOUT}
                whole = [*command, f"--workdir={workdir}", *arguments]
                process = subprocess.Popen(whole, cwd=folder, env=environment, **output)
            self.started.append(process)

    def codes(self) -> list[int]:
        """Return the exit codes; if a process hangs, fail with what all of them wait for."""
        deadline = time.monotonic() + 300
        try:
            return [process.wait(deadline - time.monotonic()) for process in self.started]
        except subprocess.TimeoutExpired:
            for process in self.started:
                process.send_signal(signal.SIGUSR1)
            time.sleep(2)
            said = [log.read_text()[-5000:] for log in self.logs]
            pytest.fail("no end after 300 s:\n" + "\n--- the next process\n".join(said))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def launch(folder):
    """Return a function that starts a run, in processes that do not outlive the tests."""
    made = []

    def launch(workdir, num_devices, *arguments, seeds=0):
        made.append(Processes(folder, workdir, num_devices, *arguments, seeds=seeds))
        return made[-1]

    yield launch
    for process in [process for processes in made for process in processes.started]:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def both(launch, folder):
    """The work directory and the output of an undisturbed run in two processes of four devices."""
    processes = launch(folder / "both", (4, 4), MEASURED)
    assert processes.codes() == [0, 0], processes.logs[0].read_text()
    return folder / "both", [log.read_text() for log in processes.logs]


@pytest.fixture(scope="module")
def alone(launch, folder):
    """The work directory of a run in one process of eight devices."""
    assert launch(folder / "alone", (8,), MEASURED).codes() == [0]
    return folder / "alone"


def begun(launch, workdir: Path) -> Processes:
    """Return two processes that have trained some steps of a run."""
    processes = launch(workdir, (4, 4), TRAIN)
    while max(Folder(workdir / "run" / "recovery").steps(), default=0) < 4:
        time.sleep(0.02)
    return processes


def numbers_of(point: Path) -> dict[str, dict[tuple, float]]:
    """Return the losses of the curve and the measured numbers, by file."""
    found = {}
    for file in sorted(point.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [line for line in lines if "seconds" not in line]
        names = ("phase", "measure", "column", "step", "branch", "projected")
        found[file.stem] = {
            tuple(line.get(name) for name in names): line.get("loss", line.get("mean"))
            for line in kept
        }
    return found


def assert_close(one: Path, other: Path, files: Sequence[str] = tuple(TOLERANCES)) -> None:
    ours, theirs = numbers_of(one), numbers_of(other)
    for name in files:
        tolerance = TOLERANCES[name]
        assert ours[name].keys() == theirs[name].keys()
        keys = sorted(ours[name], key=str)
        pairs = [[numbers[name][key] for key in keys] for numbers in (ours, theirs)]
        np.testing.assert_allclose(*pairs, rtol=tolerance, err_msg=name)


def arrays_of(step: Path):
    """Return the tree of a checkpoint that other devices have saved."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(step).item_metadata.tree
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored
        )
        return checkpointer.restore(step, template)


def assert_same_training(workdir: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        assert (workdir / "run" / name).read_bytes() == (other / "run" / name).read_bytes()
    for path in sorted((other / "run").glob("*/[0-9]*")):
        same = workdir / path.relative_to(other)
        jax.tree.map(np.testing.assert_array_equal, arrays_of(path), arrays_of(same))


def assert_goes_on(launch, workdir: Path, other: Path) -> None:
    """The same command resumes and ends with the same bits as the undisturbed run."""
    assert launch(workdir, (4, 4), TRAIN).codes() == [0, 0]
    assert_same_training(workdir, other)


def test_two_processes_compute_what_one_does(alone, both):
    workdir, said = both
    assert_close(workdir / "run", alone / "run")
    assert ["[1/1] run" in text for text in said] == [True, False]
    assert len(list((workdir / "run").glob("events*"))) == 1


def test_a_team_is_trained_by_both(launch, folder, both):
    """Its slots are on devices of both processes; it contains the seed of the other tests."""
    workdir = folder / "team"
    shares = [f"--config.{key}=2" for key in ("training.together", "mesh.data", "mesh.model")]
    processes = launch(workdir, (4, 4), TRAIN, *shares, seeds=2)
    assert processes.codes() == [0, 0]
    assert "training 2 points in one program of 2 slots: seed=0" in processes.logs[0].read_text()
    (point,) = workdir.glob("seed=0*")
    assert_close(point, both[0] / "run", ("metrics", "evaluation"))


def test_each_process_writes_its_parts_and_one_manifest_names_them(both):
    step = both[0] / "run" / "checkpoints" / "16"
    Folder(step.parent).verify(16)
    named = json.loads((step / "manifest.json").read_text())["files"]
    for process in (0, 1):
        (file, *_) = (step / f"ocdbt.process_{process}" / "d").iterdir()
        assert file.relative_to(step).as_posix() in named


@pytest.mark.parametrize("after", [(8,), (4, 4)])
def test_a_run_moves_between_processes(launch, folder, alone, both, after):
    """Its last phase is trained again from the recovery checkpoint before it."""
    workdir = folder / f"moved-to-{len(after)}"
    shutil.copytree(both[0] if after == (8,) else alone, workdir)
    for last in ("recovery/16", "checkpoints/16", "projected/16"):
        shutil.rmtree(workdir / "run" / last)
    assert set(launch(workdir, after, TRAIN).codes()) == {0}
    assert_close(workdir / "run", both[0] / "run", ("metrics", "evaluation"))


@pytest.mark.parametrize("victim", [1, *in_full(0)])
def test_when_one_is_killed_the_other_ends_and_both_go_on(launch, folder, both, victim):
    workdir = folder / f"killed-{victim}"
    processes = begun(launch, workdir)
    processes.started[victim].kill()
    died = time.monotonic()
    assert processes.started[1 - victim].wait(timeout=HEARTBEAT + 5) != 0
    print(f"ended {time.monotonic() - died:.1f} s after the death")
    assert json.loads((workdir / "run" / "status.json").read_text())["state"] == "running"
    assert_goes_on(launch, workdir, both[0])


@pytest.mark.parametrize("told", [1, *in_full(0)])
def test_when_one_is_told_to_stop_both_save_the_same_step(launch, folder, both, told):
    workdir = folder / f"stopped-{told}"
    processes = begun(launch, workdir)
    processes.started[told].send_signal(signal.SIGTERM)
    assert processes.codes() == [75, 75], [log.read_text() for log in processes.logs]
    assert max(Folder(workdir / "run" / "recovery").steps()) < 16
    assert_goes_on(launch, workdir, both[0])


@pytest.mark.parametrize("failing", ["0 1", "1", *in_full("0")])
def test_only_what_all_processes_come_to_fails_a_point(launch, folder, both, monkeypatch, failing):
    workdir = Path(shutil.copytree(both[0], folder / f"failing-{failing}"))
    (workdir / "run" / "evaluation.jsonl").unlink()
    monkeypatch.setenv("FAILING", failing)
    codes = launch(workdir, (4, 4), TRAIN).codes()
    status = json.loads((workdir / "run" / "status.json").read_text())
    if failing == "0 1":
        assert codes == [3, 3]
        assert status["reason"] == "ZeroDivisionError: division by zero"
    else:
        assert 0 not in codes
        assert status["state"] == "running"
