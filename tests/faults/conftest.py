"""Inject random faults, in a number of trials that tests.support.counts sets."""

import random

import pytest

from tests.support.counts import FAULT_TRIALS


def pytest_generate_tests(metafunc):
    if "trial" in metafunc.fixturenames:
        metafunc.parametrize("trial", range(FAULT_TRIALS))
    for name in {"disk_trial", "signal_trial"} & set(metafunc.fixturenames):
        metafunc.parametrize(name, range(-(-FAULT_TRIALS // 3)))
    if "worker_trial" in metafunc.fixturenames:
        metafunc.parametrize("worker_trial", range(-(-FAULT_TRIALS // 6)))


@pytest.fixture
def chance(trial):
    """Return the random numbers of a trial."""
    return random.Random(trial)
