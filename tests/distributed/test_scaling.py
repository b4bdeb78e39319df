"""What docs/scaling.md says of memory and communication, on a small model."""

from pathlib import Path

import pytest

from jaxflat.distributed import sharding
from jaxflat.runs import builders
from jaxflat.sweeps import points
from tests.support.compiled_step import compiled_step, exchanged
from tests.support.sweeps import tiny_config


def step_on_four_devices():
    """Return the number of parameters and the compiled step of a small model."""
    config = tiny_config()
    config.model.update({"width": 16, "num_layers": 3})  # two in a scan
    config.mesh.data = 4
    [point] = points.expand(config, [{}], Path())
    return builders.num_params(point.config), compiled_step(point.config)


@pytest.mark.slow
def test_devices_with_whole_moments_exchange_the_gradient_once_a_step():
    num_params, compiled = step_on_four_devices()
    sent = exchanged(compiled)
    assert 4 * num_params <= sent["all-reduce"] < 4 * num_params + 1000
    assert sent["reduce-scatter"] == sent["all-to-all"] == 0
    assert compiled.memory_analysis().argument_size_in_bytes > 12 * num_params


@pytest.fixture
def _every_array_is_large(monkeypatch):
    """Steps are traced anew, because the threshold is in them."""
    monkeypatch.setattr(sharding, "LARGE", 1)
    builders._train_steps.cache_clear()
    yield
    builders._train_steps.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("_every_array_is_large", "fully_optimized")
def test_devices_with_parts_of_the_moments_exchange_the_updates_too():
    num_params, compiled = step_on_four_devices()
    sent = exchanged(compiled)
    assert 4 * num_params <= sent["all-reduce"] < 4 * num_params + 1000
    assert 4 * num_params - 100 < sent["all-gather"] < 4 * num_params + 1000
    assert sent["reduce-scatter"] == sent["all-to-all"] == 0
    assert compiled.memory_analysis().argument_size_in_bytes < 6.5 * num_params
