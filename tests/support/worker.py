"""A worker for the tests: the command itself, on points whose measurements only take a moment.

It runs in a process that is forked from one that has imported everything: that takes a moment too.
"""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jaxflat import main
from jaxflat.config import param
from jaxflat.distributed import leases, preemption
from jaxflat.flatness import Estimate
from jaxflat.runs import checks, stages
from jaxflat.runs.measurements import Measurement
from jaxflat.sweeps import sweep  # noqa: F401 (before the fork)
from tests.support.sweeps import tiny_config

RATE = "phases.drift.schedule.learning_rate"
DIVERGES = 1e30
PATIENCE = 600  # seconds, on a machine that has other things to do


@dataclass(frozen=True)
class Settings:
    """Points: pairs with the same first phase, and one that diverges. Times in seconds."""

    num_points: int
    stages: str = "probes"
    measuring: float = 0.05
    lease: float = 30.0
    fails: bool = False  # whether measuring the third point does


def get_config(scale=None):
    return tiny_config()


def get_sweep(num_points=None):
    arms = [{"seed": i // 2, RATE: (1e-3, 1e-2)[i % 2]} for i in range(int(num_points) - 1)]
    return [*arms, *(point | {RATE: DIVERGES} for point in param("seed", [0]))]


def work(workdir: Path, log: Path, settings: Settings) -> None:
    """Run the command, and exit with its code; what it prints goes to `log`."""

    def measure(config, folder, checkpoint, measures, partial_results):
        time.sleep(settings.measuring)
        rate = config.phases.drift.schedule.learning_rate
        if rate == DIVERGES:
            raise FloatingPointError("not finite")
        if settings.fails and (config.seed, rate) == (1, 1e-3):
            raise RuntimeError("out of luck")
        yield "accuracy", {"accuracy": Estimate(config.seed, 0.0, 2, "seeds")}

    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    preemption.install_handlers()
    probes = Measurement("probes", "probes", lambda config: {"accuracy": None}, measure)
    stages.MEASUREMENTS = (*stages.MEASUREMENTS[:2], probes)
    if settings.stages == "probes":
        checks.check_config = lambda _: None  # seconds of compiling
    leases.EXPIRY, leases.HEARTBEAT, leases.POLL = settings.lease, settings.lease / 10, 0.2
    config = f"--config={__file__}:{settings.num_points}"
    sys.exit(main.main([config, f"--stages={settings.stages}", f"--workdir={workdir}"]))


class Worker:
    """A process that does this."""

    def __init__(self, workdir: Path, settings: Settings):
        workdir.mkdir(exist_ok=True)
        self.log = workdir / f"log_{len(list(workdir.glob('log_*')))}.txt"
        self.log.touch()  # the next worker's has another name
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["tests.support.worker"])
        self.process = forks.Process(target=work, args=(workdir, self.log, settings))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send(self, number: int) -> None:
        """Send a signal; no matter whether it has ended."""
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def ends_with(self, code: int) -> str:
        """Return what it printed, when it has ended with this exit code."""
        self.process.join(PATIENCE)
        assert self.process.exitcode == code, self.printed()
        assert "Traceback" not in self.printed(), self.printed()
        return self.printed()


def holders(workdir: Path) -> dict[str, int]:
    """Return the process number of the owner of each point that has one."""
    found = {}
    for path in workdir.glob("locks/*=*/*"):
        try:
            token, process = json.loads(path.read_text().partition("\n")[0])
            if path.name == str(token):
                found[path.parent.name] = process[3]
        except (FileNotFoundError, ValueError):  # it is being renamed, or has no owner yet
            pass
    return found
