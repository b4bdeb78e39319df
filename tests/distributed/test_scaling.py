"""What docs/scaling.md says of memory and communication, on a small model."""

from pathlib import Path

import pytest

from jaxflat.runs import builders
from jaxflat.sweeps import points
from tests.support.compiled_step import compiled_step, exchanged
from tests.support.sweeps import tiny_config


@pytest.fixture(scope="module")
def step():
    """Give the number of parameters and the compiled step of a small model on four devices."""
    config = tiny_config()
    config.model.update({"width": 16, "num_layers": 3})  # two in a scan
    config.mesh.data = 4
    [point] = points.expand(config, [{}], Path())
    return builders.num_params(point.config), compiled_step(point.config)


@pytest.mark.slow
def test_devices_exchange_the_gradient_once_a_step(step):
    num_params, compiled = step
    sent = exchanged(compiled)
    assert 4 * num_params <= sent["all-reduce"] < 4 * num_params + 1000
    assert sent["reduce-scatter"] == sent["all-to-all"] == 0


@pytest.mark.slow
def test_every_device_has_the_whole_state(step):
    num_params, compiled = step
    assert compiled.memory_analysis().argument_size_in_bytes > 12 * num_params
