"""Two processes of four devices that make one run, one of which dies or is told to stop."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_sweep import contents, saved_arrays

from jaxflat import checkpoint

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
HEARTBEAT = 8  # seconds
CONFIG_FILE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from sweeps import tiny_config

def get_config(scale=None):
    config = tiny_config()
    config.model.num_layers = 1
    config.mesh.update(dict(data=2, model=4))
    config.training.update(dict(steps_per_call=1, save_every=1))
    config.flatness.measures = ("hessian_trace",)
    config.flatness.by_block = False
    for phase in config.phases.values():
        phase.optimizer.name = "sgd"
        phase.schedule.learning_rate = 0.1
    return config
"""
COMMAND = f"""
import sys
from jaxflat import hosts, main
hosts.HEARTBEAT = {HEARTBEAT}
sys.exit(main.main())
"""


class Processes:
    """One run by as many processes as `num_devices` has entries."""

    def __init__(self, folder: Path, workdir: Path, num_devices: tuple[int, ...], *arguments: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        (folder / "tiny.py").write_text(CONFIG_FILE)
        command = [sys.executable, "-c", COMMAND, f"--config={folder}/tiny.py"]
        self.logs = [folder / f"{workdir.name}-{n}.log" for n in range(len(num_devices))]
        self.started = []
        for number, devices in enumerate(num_devices):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
            }
            if len(num_devices) > 1:
                environment["JAX_COORDINATOR_ADDRESS"] = address
                environment["JAX_NUM_PROCESSES"] = str(len(num_devices))
                environment["JAX_PROCESS_ID"] = str(number)
            with self.logs[number].open("wb") as log:
                self.started.append(
                    subprocess.Popen(
                        [*command, f"--workdir={workdir}", *arguments],
                        cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
                    )  # fmt: skip
                )

    def codes(self) -> list[int]:
        return [process.wait(timeout=500) for process in self.started]


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a run, in processes that do not outlive the test."""
    made = []

    def launch(workdir, num_devices, *arguments):
        made.append(Processes(tmp_path, workdir, num_devices, *arguments))
        return made[-1]

    yield launch
    for process in [process for processes in made for process in processes.started]:
        process.kill()


def wait_for_step(workdir: Path, step: int) -> None:
    while max(checkpoint.steps(workdir / "run" / "recovery"), default=0) < step:
        time.sleep(0.02)


def numbers_of(workdir: Path) -> dict[str, dict[tuple, float]]:
    """Return the losses of the curve and what was measured, by file."""
    found = {}
    for file in sorted((workdir / "run").glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [line for line in lines if "seconds" not in line]
        names = ("phase", "measure", "step", "branch", "projected")
        found[file.stem] = {
            tuple(line.get(name) for name in names): line.get("loss", line.get("mean"))
            for line in kept
        }
    return found


def assert_close(one: Path, other: Path) -> None:
    ours, theirs = numbers_of(one), numbers_of(other)
    for name, tolerance in {"metrics": 1e-5, "evaluation": 1e-5, "flatness": 1e-4}.items():
        assert ours[name].keys() == theirs[name].keys()
        keys = sorted(ours[name], key=str)
        pairs = [[numbers[name][key] for key in keys] for numbers in (ours, theirs)]
        np.testing.assert_allclose(*pairs, rtol=tolerance, err_msg=name)


MEASURED = "--stages=train,flatness"
TRAIN = "--stages=train"


def test_two_processes_compute_what_one_does_and_either_goes_on_from_the_other(launch, tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    runs = launch(both, (4, 4), MEASURED), launch(one, (8,), MEASURED)
    assert runs[0].codes() == [0, 0], runs[0].logs[0].read_text()
    assert runs[1].codes() == [0]
    assert_close(both, one)
    said = [log.read_text() for log in runs[0].logs]
    assert ["[1/1] run" in text for text in said] == [True, False]
    step = both / "run" / "checkpoints" / "16"
    for process in (0, 1):
        assert list((step / f"ocdbt.process_{process}" / "d").iterdir())
    assert len(list((both / "run").glob("events*"))) == 1
    for workdir, num_devices in ((both, (8,)), (one, (4, 4))):
        moved = Path(shutil.copytree(workdir, tmp_path / f"{workdir.name}-moved"))
        for last in ("recovery/16", "checkpoints/16", "projected/16"):
            shutil.rmtree(moved / "run" / last)
        shutil.rmtree(moved / "trunks")
        assert set(launch(moved, num_devices, MEASURED).codes()) == {0}
        assert_close(moved, one)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_and_both_go_on(launch, tmp_path, victim):
    workdir, whole = tmp_path / "killed", tmp_path / "whole"
    processes = launch(workdir, (4, 4), TRAIN)
    wait_for_step(workdir, 4)
    processes.started[victim].kill()
    died = time.monotonic()
    assert processes.started[1 - victim].wait(timeout=HEARTBEAT + 5) != 0
    print(f"ended {time.monotonic() - died:.1f} s after the death")
    assert json.loads((workdir / "run" / "status.json").read_text())["state"] == "running"
    assert launch(workdir, (4, 4), TRAIN).codes() == [0, 0]
    assert launch(whole, (4, 4), TRAIN).codes() == [0, 0]
    assert contents(workdir) == contents(whole)
    jax.tree.map(np.testing.assert_array_equal, saved_arrays(workdir), saved_arrays(whole))


@pytest.mark.parametrize("told", [0, 1])
def test_when_one_is_told_to_stop_both_save_the_same_step(launch, tmp_path, told):
    workdir, whole = tmp_path / "stopped", tmp_path / "whole"
    processes = launch(workdir, (4, 4), TRAIN)
    wait_for_step(workdir, 4)
    processes.started[told].send_signal(signal.SIGTERM)
    assert processes.codes() == [75, 75], [log.read_text() for log in processes.logs]
    assert max(checkpoint.steps(workdir / "run" / "recovery")) < 16
    assert launch(workdir, (4, 4), TRAIN).codes() == [0, 0]
    assert launch(whole, (4, 4), TRAIN).codes() == [0, 0]
    assert contents(workdir) == contents(whole)
