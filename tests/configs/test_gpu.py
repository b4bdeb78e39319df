"""The scale `gpu` of every shipped config: points of minutes on one accelerator, by arithmetic."""

from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from rich.console import Console

from jaxflat.config import Config, loading
from jaxflat.runs import builders, memory, trajectory
from jaxflat.runs.run import Point
from jaxflat.sweeps import points

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.py"))
MOST_FLOPS = 1.6e16  # as use_gpu_sizes says
BATCH = 1024  # sentences, but not of plain SGD: its batch decides the drift
SAM, PENALTY = 2, 4  # gradients that a step takes, about


@pytest.fixture
def trained_points(request, monkeypatch) -> list[Point]:
    if request.param == "generated_text":  # its reviews are not here
        monkeypatch.setattr("jaxflat.runs.checks.check_config", lambda config: None)
    config, listed = loading.load(f"{CONFIGS}/{request.param}.py:gpu")
    expanded = points.expand(config, listed, Path("unused"))
    return [point for point in expanded if point.config.phase_order]


every_config = pytest.mark.parametrize("trained_points", SHIPPED, indirect=True)


def training_flops(config: Config) -> float:
    """Return 6 FLOPs for each word of training and each parameter that is in no embedding."""
    params = jax.eval_shape(lambda: builders.init_params(config))
    embeddings = sum(leaf.size for name, leaf in params.items() if "embedding" in name)
    length, num_words = config.language[config.language.name].length, 0
    for phase in trajectory.phases(config):
        settings = phase.settings
        steps = settings.steps + len(phase.branches) * settings.anneal_steps
        gradients = PENALTY if settings.flatness_penalty.strength else 1
        gradients *= SAM if settings.optimizer.name == "sam" else 1
        num_words += gradients * steps * settings.batch_size * length
    return 6.0 * (builders.num_params(config) - embeddings) * num_words


def on_one_accelerator(config: Config) -> Config:
    """Return the config with whole batches, which accelerators take at once, on one device."""
    whole = {f"phases.{name}.microbatch_size": p.batch_size for name, p in config.phases.items()}
    return FrozenConfigDict(loading.override(ConfigDict(config), {"mesh.data": 1, **whole}))


@pytest.mark.slow
@every_config
def test_a_point_is_small_enough_for_minutes(trained_points):
    assert len({point.config.seed for point in trained_points}) >= 3
    for config in {point.config for point in trained_points}:
        assert 1e6 <= builders.num_params(config) <= 5e7
        assert training_flops(config) <= MOST_FLOPS
        for phase in trajectory.phases(config):
            settings = phase.settings
            assert settings.optimizer.name == "sgd" or settings.batch_size == BATCH


@pytest.mark.slow
@every_config
def test_the_largest_model_fits_80_gb(trained_points):
    largest = max(trained_points, key=lambda point: point.config.model.width)
    config = on_one_accelerator(largest.config)
    step = memory.step_memory(config)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(memory.table([(largest.name, config, step)]))
    assert f"{builders.num_params(config):,}" in capture.get()
    needed = (step.total if step else 0) + memory.moment_bytes(config)  # no texts, no step
    assert 0 < needed < 70 * memory.GIB
