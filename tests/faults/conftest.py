"""Faults come at random: a tenth of the trials by default, all of them by `make faults`."""

import os
import random

import pytest

TRIALS = int(os.environ.get("JAXFLAT_FAULT_TRIALS", "6"))


def pytest_generate_tests(metafunc):
    if "trial" in metafunc.fixturenames:
        metafunc.parametrize("trial", range(TRIALS))
    if "disk_trial" in metafunc.fixturenames:
        metafunc.parametrize("disk_trial", range(-(-TRIALS // 3)))
    if "worker_trial" in metafunc.fixturenames:
        metafunc.parametrize("worker_trial", range(-(-TRIALS // 6)))


@pytest.fixture
def chance(trial):
    """What is random in a trial."""
    return random.Random(trial)
