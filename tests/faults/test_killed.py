"""kill -9 at random moments: the same command resumes and ends with the same bits."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tests.support.counts import FAULT_TRIALS
from tests.support.sweeps import tiny_config
from tests.sweeps.test_sweep import assert_same

DEATHS = FAULT_TRIALS // 2


def saving_continually() -> ConfigDict:
    config = tiny_config()
    config.training.save_every = 1
    config.flatness.measures = ("fisher_trace",)  # every start compiles what it measures
    return config


@pytest.fixture
def start(tmp_path):
    """Return a function that starts the command in a separate process."""
    config_file = tmp_path / "killed.py"
    config_file.write_text(
        "from tests.faults import test_killed\n\n"
        "def get_config(scale=None):\n    return test_killed.saving_continually()\n"
    )
    # As in conftest.py, compile quickly: otherwise death would almost always find it compiling.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "jaxflat.main", f"--config={config_file}"]

    def start(workdir: Path) -> subprocess.Popen:
        with (tmp_path / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [*command, f"--workdir={workdir}"],
                cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    return start


def die_until_done(start, workdir: Path, moments: random.Random, duration: float) -> int:
    """Kill and restart the command at random moments until it ends; return the number of kills."""
    for deaths in range(1000):
        process = start(workdir)
        try:
            assert process.wait(moments.uniform(0.3, 1.0) * duration) == 0
            return deaths
        except subprocess.TimeoutExpired:
            process.kill()
            if process.wait() == 0:  # it ended just before the kill
                return deaths
            assert process.returncode == -9
    raise AssertionError("it never ends")


@pytest.mark.slow
@pytest.mark.timeout(0)  # dozens of deaths in `make full`
def test_a_run_that_is_killed_at_random_moments_ends_bitwise_like_one_left_alone(start, tmp_path):
    for folder in ("first", "undisturbed"):  # the first compiles
        begin = time.monotonic()
        assert start(tmp_path / folder).wait() == 0
    duration = time.monotonic() - begin
    seed = random.randrange(2**32)
    print(f"moments of death from seed {seed}; a run takes {duration:.1f} s")
    moments, deaths, number = random.Random(seed), 0, 0
    while deaths < DEATHS:
        deaths += die_until_done(start, tmp_path / str(number), moments, duration)
        assert_same(tmp_path / str(number), tmp_path / "undisturbed")
        number += 1
    print(f"{deaths} deaths in {number} runs")
