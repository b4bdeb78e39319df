"""Shapes for accelerators, and one device against eight: what the suite cannot see by size.

The paper's points are traced, never allocated; programs are lowered for GPUs and TPUs from here.
"""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict, FrozenConfigDict
from rich.console import Console

from jaxflat.config import loading
from jaxflat.distributed import sharding
from jaxflat.flatness import MEASURES, hessian_trace_terms
from jaxflat.languages.batches import Source, sampled_batch
from jaxflat.models.blocks import is_stacked
from jaxflat.probes.linear import LabelledFeatures, linear_probe_correct
from jaxflat.runs import builders, memory, trajectory
from jaxflat.runs.languages import make_language
from jaxflat.runs.measure_flatness import make_problem
from jaxflat.runs.run import Point
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.sweeps import points
from tests.support.compiled_step import compiled_step
from tests.support.sweeps import tiny_config

ROOT = Path(__file__).parents[2]


@cache
def paper_points() -> list[Point]:
    config, listed = loading.load(f"{ROOT}/configs/model_size_sweep.py:paper")
    return points.expand(config, listed, Path("unused"))


def resolved(num_devices: int = 1, name: str = "transformer") -> FrozenConfigDict:
    config = tiny_config()
    config.model.name = name
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.mesh.data = num_devices
    return FrozenConfigDict(config)


@pytest.mark.slow
def test_every_paper_point_has_a_row_of_memory_and_no_array():
    names, configs = zip(*((point.name, point.config) for point in paper_points()), strict=True)
    console = Console(width=200, record=True)
    with console.capture() as capture:
        rows = zip(names, configs, memory.step_memories(configs), strict=True)
        console.print(memory.table([*rows]))
    for point in paper_points():
        assert f" {point.name} " in capture.get()


@pytest.mark.slow
def test_adamw_holds_three_floats_a_parameter_up_to_the_papers_largest_model():
    by_width = {p.config.model.width: p.config for p in paper_points() if p.config.phase_order}
    for config in by_width.values():
        num_params = builders.num_params(config)
        step = memory.step_memory(config)
        counters = 2 * 4  # int32: the optimizer's count of updates and the run's step
        assert step.state == 3 * 4 * num_params + counters
        assert step.gradient == 2 * 4 * num_params  # one is the sum over microbatches
    assert builders.num_params(by_width[max(by_width)]) > 7e8


@pytest.mark.parametrize(("width", "num_layers", "num_params"), [(768, 1, 1e7), (1584, 3, 1.35e8)])
@pytest.mark.slow
def test_lstms_of_the_papers_sizes_have_a_table_of_memory(width, num_layers, num_params):
    config = ConfigDict(resolved())
    config.language.hmm.update({"num_states": 100, "num_words": 200, "length": 16})
    config.model.update({"name": "lstm", "width": width, "num_layers": num_layers})
    config.phases.pretrain.batch_size = 4096
    config = FrozenConfigDict(config)
    assert builders.num_params(config) == pytest.approx(num_params, rel=0.1)
    step = memory.step_memory(config)
    assert step.state == 3 * 4 * builders.num_params(config) + 2 * 4
    console = Console(width=200)
    with console.capture() as capture:
        console.print(memory.table([("point", config, step)]))
    assert f"{builders.num_params(config):,}" in capture.get()


@pytest.mark.parametrize(
    ("width", "num_layers", "microbatch_size", "remat"),
    [(32, 6, 0, False), (96, 4, 64, False), (64, 12, 64, True)],
)
@pytest.mark.slow
def test_predicted_memory_is_near_that_of_the_compiled_step(
    width, num_layers, microbatch_size, remat, monkeypatch
):
    """XLA's plan for a CPU: what a step needs besides the state, 20% more or less."""
    monkeypatch.setattr(builders, "CACHED_TOKENS", 10**9)  # as on an accelerator
    config = ConfigDict(resolved())
    config.phase_order = ("pretrain",)
    config.training.remat = remat
    config.model.update({"width": width, "num_layers": num_layers, "head_size": 16})
    config.language.hmm.length = config.language.hmm.min_length = 32
    config.phases.pretrain.update({"batch_size": 256, "microbatch_size": microbatch_size})
    config.phases.pretrain.targets = "sampled"
    config = FrozenConfigDict(config)
    planned = compiled_step(config).memory_analysis().temp_size_in_bytes
    step = memory.step_memory(config)
    predicted = step.total - step.state
    assert predicted == pytest.approx(planned, rel=0.2)


@pytest.mark.slow
def test_predicted_memory_of_devices_that_divide_moments_is_near_the_compiled_steps(monkeypatch):
    """The whole of it, on each of eight devices."""
    monkeypatch.setattr(builders, "CACHED_TOKENS", 10**9)  # as on an accelerator
    monkeypatch.setattr(sharding, "LARGE", 1)
    config = ConfigDict(resolved(num_devices=8))
    config.phase_order = ("pretrain",)
    config.model.update({"width": 192, "num_layers": 6, "head_size": 16})
    config.language.hmm.length = config.language.hmm.min_length = 32
    config.phases.pretrain.update({"batch_size": 64, "microbatch_size": 32, "targets": "sampled"})
    config = FrozenConfigDict(config)
    planned = compiled_step(config).memory_analysis()
    predicted = memory.step_memory(config).on_each_device(config)
    total = planned.argument_size_in_bytes + planned.temp_size_in_bytes
    assert predicted == pytest.approx(total, rel=0.2)


def told(config):
    config = FrozenConfigDict(config)
    return memory.advice(config, memory.step_memory(config))


@pytest.mark.slow
def test_a_penalty_on_the_whole_batch_is_not_told_to_divide_it(monkeypatch):
    config = ConfigDict(resolved())
    config.phase_order = ("pretrain",)
    config.phases.pretrain.flatness_penalty.update({"measure": "feature_rank", "strength": 1e-3})
    monkeypatch.setattr(memory, "_device_bytes", lambda mesh: 35_000)
    assert told(config).startswith("Set training.remat=True")


@pytest.mark.slow
def test_devices_along_the_sweep_share_its_slots():
    """Each device of eight has one slot of eight, and the states of all slots after a call."""
    config = ConfigDict(resolved())
    config.mesh.data, config.training.together = -1, 8
    config = FrozenConfigDict(config)
    assert builders.make_mesh(config).shape["sweep"] == 8
    step = memory.step_memory(config)
    assert step.on_each_device(config) == step.total + 8 * step.state


CONFIGS = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"generated_text"}


@pytest.mark.parametrize("name", sorted(CONFIGS))  # the user names the teacher of generated_text
@pytest.mark.slow
def test_the_largest_model_of_a_paper_config_fits_accelerators(name, monkeypatch):
    """One device of 80 GB, or 16 devices of 16 GB that divide the batch, with shipped settings."""
    mesh = AbstractMesh((1, 16, 1), sharding.AXES)
    monkeypatch.setattr(builders, "make_mesh", lambda config: mesh)
    config, listed = loading.load(f"{ROOT}/configs/{name}.py:paper")
    expanded = points.expand(config, listed, Path("unused"))
    trained = [point.config for point in expanded if point.config.phase_order]
    config = max(trained, key=lambda config: config.model.width)
    step = memory.step_memory(config)
    assert step.on_each_device(config) < 12 * memory.GIB
    assert config.training.together == 1
    assert step.total < 70 * memory.GIB  # on a device alone


@pytest.mark.parametrize(
    ("needs", "bytes_there", "advice"),
    [
        ({}, 44_000, ""),
        ({}, 35_000, "Set phases.pretrain.microbatch_size="),
        ({}, 22_000, "Set training.remat=True, then"),
        ({"remat": True}, 22_000, "Set mesh.model to the number of devices"),
        ({}, 10_000, "Set mesh.model to the number of devices"),
    ],
)
@pytest.mark.slow
def test_a_point_that_does_not_fit_is_told_what_to_set(monkeypatch, needs, bytes_there, advice):
    config = ConfigDict(resolved())
    config.phase_order = ("pretrain",)
    config.training.update(needs)
    monkeypatch.setattr(memory, "_device_bytes", lambda mesh: bytes_there)
    line = told(config)
    assert advice in line
    assert bool(advice) == bool(line)
    if advice.endswith("="):  # what it says fits
        config.phases.pretrain.microbatch_size = int(line.rstrip(".").rpartition("=")[2])
        assert told(config) == ""


@pytest.mark.slow
def test_the_memory_of_a_point_is_that_of_its_largest_phase():
    """Here the second, whose penalty keeps one vector more than AdamW does."""
    config = ConfigDict(resolved())
    dial = config.phases.drift
    dial.optimizer.name, dial.targets = "adamw", "exact"
    dial.flatness_penalty.update({"measure": "hessian_max_eigenvalue", "strength": 1e-4})
    num_params = builders.num_params(FrozenConfigDict(config))
    for order, vectors in ((("pretrain", "drift"), 4), (("pretrain",), 3)):
        config.phase_order = order
        step = memory.step_memory(FrozenConfigDict(config))
        assert step.state == vectors * 4 * num_params + 2 * 4


def test_the_step_of_every_phase_is_traced(monkeypatch):
    """Once for two seeds. The strength of a penalty is an argument of its step."""
    config = ConfigDict(resolved())
    config.phases.drift.flatness_penalty.strength = 1e-4
    traced = []

    def train_steps(config, settings, mesh):
        return lambda *args: traced.append((settings.optimizer.name, args[-1]))

    monkeypatch.setattr(builders, "train_steps", train_steps)
    other = config.copy_and_resolve_references()
    other.data_seed = 1
    memory.step_memories([FrozenConfigDict(config), FrozenConfigDict(other)])
    assert [name for name, _ in traced] == ["adamw", "sgd"]
    assert traced[0][1] is None
    assert traced[1][1].shape == ()


def training_step(name: str = "transformer"):
    config = resolved(name=name)
    phase = trajectory.phases(config)[0]
    steps = builders.train_steps(config, phase.settings, builders.make_mesh(config))
    state = builders.init_state(builders.init_params(config), phase)
    schedule = builders.schedule(phase.settings, anneal=False)
    language = make_language(config.language)
    return steps, (state, Source(language), jax.random.key(0), schedule, 0, 2)


def hessian_vector_products(name: str = "transformer"):
    config = resolved(name=name)
    loss_fn, _ = builders.loss_functions(builders.make_model(config))
    language = make_language(config.language)
    batch = partial(sampled_batch, language, batch_size=8, targets="exact")
    batches = jax.vmap(batch)(jax.random.split(jax.random.key(0), 2))
    terms = partial(hessian_trace_terms, loss_fn, num_probes=2, stacked=is_stacked)
    return jax.jit(terms), (builders.init_params(config), batches, jax.random.key(1))


def probe_fit():
    labels_KxN = jnp.tile(jnp.arange(12, dtype=jnp.int32) % 3, (2, 1))
    features_NxF = jax.random.normal(jax.random.key(0), (12, 4))
    data = LabelledFeatures(features_NxF, labels_KxN, jnp.ones((2, 12), bool))
    fit = partial(linear_probe_correct, shots=12, num_classes=3, iterations=5)
    return jax.jit(fit), (data, data, data, jnp.asarray([1e-3, 1.0]))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "program",
    [
        *(training_step, hessian_vector_products, probe_fit),
        partial(training_step, "lstm"),
        partial(hessian_vector_products, "lstm"),
    ],
)
@pytest.mark.slow
def test_programs_lower_for_accelerators(program, platform):
    function, arguments = program()
    exported = jax.export.export(function, platforms=[platform])(*arguments)
    assert exported.platforms == (platform,)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["hessian_trace", "fisher_trace"])
def test_the_stage_measures_the_same_on_one_device_and_on_eight(measure):
    estimates = []
    for num_devices in (1, 8):
        config = resolved(num_devices)
        mesh = builders.make_mesh(config)
        params = sharding.replicate(mesh, builders.init_params(config))
        model = builders.make_model(config)
        problem = make_problem(config, model, params, Checkpoint(5))._replace(groupings=())
        assert len(mesh.devices.flatten()) == num_devices
        estimates.append(MEASURES[measure](problem, config.flatness).estimates[measure])
    one, eight = estimates
    assert float(eight.mean) == pytest.approx(float(one.mean), rel=1e-4)
    assert float(eight.sem) == pytest.approx(float(one.sem), rel=1e-4)
