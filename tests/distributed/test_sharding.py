"""Parameters cut into parts, one on each device: the same numbers, in less memory."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict

from jaxflat.distributed import sharding
from jaxflat.flatness import hessian_trace_terms
from jaxflat.languages.batches import Source
from jaxflat.runs import builders, trajectory
from jaxflat.runs.languages import make_language
from jaxflat.runs.measure_flatness import sample_microbatches
from tests.support.folders import owned
from tests.support.sweeps import tiny_config

MESHES = ((1, 1), (2, 4), (8, 1))


def resolved(num_data: int, num_model: int) -> FrozenConfigDict:
    config = tiny_config()
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.mesh.update({"data": num_data, "model": num_model})
    config.phases.pretrain.optimizer.update({"name": "sgd", "sgd": {"momentum": 0.5}})
    config.phases.pretrain.schedule.learning_rate = 0.1
    return FrozenConfigDict(config)


def trained(config: FrozenConfigDict):
    """Return (the state after five calls, the mean loss of each)."""
    mesh, phase = builders.make_mesh(config), trajectory.phases(config)[0]
    state = builders.init_state(builders.init_params(config, mesh), phase)
    state = jax.device_put(state, builders.state_shardings(mesh, state))
    steps = builders.train_steps(config, phase.settings, mesh)
    schedule = builders.schedule(phase.settings, anneal=False)
    source, losses = Source(make_language(config.language)), []
    for stop in range(2, 12, 2):
        state, loss = steps(state, source, jax.random.key(1), schedule, 0, stop)
        losses.append(float(loss))
    return state, losses


@pytest.fixture(scope="module")
def runs():
    """Devices along "data" divide every moment, as they do in large models."""
    configs = [resolved(*mesh) for mesh in MESHES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LARGE", 1)
        yield [(config, *trained(config)) for config in configs]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_losses_are_those_of_one_device(runs, number):
    np.testing.assert_allclose(runs[number][2], runs[0][2], rtol=1e-5)
    assert runs[number][2][-1] < runs[number][2][0]


@pytest.mark.slow
def test_traces_are_those_of_whole_parameters(runs):
    traces = []
    for config, state, _ in runs[:2]:
        batches = sample_microbatches(config, jax.random.key(2))
        loss_fn, _ = builders.loss_functions(builders.make_model(config))
        terms = jax.jit(hessian_trace_terms, static_argnums=0, static_argnames="num_probes")
        made = terms(loss_fn, state.params, batches, jax.random.key(3), num_probes=2)
        traces.append(sum(leaf.sum() for leaf in jax.tree.leaves(made.terms)))
    np.testing.assert_allclose(*map(np.asarray, traces), rtol=1e-4)


def part_of(leaf, *divisors: int) -> int:
    """Return the numbers on a device, for the first divisor that divides a dimension."""
    fitting = [n for n in divisors if any(size % n == 0 for size in leaf.shape)]
    return leaf.size // fitting[0] if fitting else leaf.size


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_each_device_keeps_its_part_through_training(runs, number):
    config, state, _ = runs[number]
    num_data, num_model = MESHES[number]
    for leaf in jax.tree.leaves(state.params):
        assert leaf.addressable_shards[0].data.size == part_of(leaf, num_model)
    for leaf in jax.tree.leaves(state.optimizer_state):
        expected = part_of(leaf, num_data * num_model, num_model)
        assert leaf.addressable_shards[0].data.size == expected
    shardings = builders.state_shardings(builders.make_mesh(config), state)
    same = jax.tree.map(
        lambda x, there: x.sharding.is_equivalent_to(there, x.ndim), state, shardings
    )
    assert all(jax.tree.leaves(same))


def test_the_largest_dimension_that_divides_is_cut():
    mesh = sharding.make_mesh(2, 4)
    shapes = {(3, 8, 16): P(None, None, "model"), (8, 6): P("model"), (8, 8): P("model"),
              (3, 5): P(), (): P()}  # fmt: skip
    for shape, spec in shapes.items():
        assert sharding.param_shardings(mesh, jax.ShapeDtypeStruct(shape, jnp.float32)).spec == spec


def test_large_moments_are_cut_along_both_axes():
    mesh = sharding.make_mesh(2, 4)
    side = 2**11
    shapes = {(side, side): P(("model", "data")), (side + 4, side): P(None, ("model", "data")),
              (side + 4, side - 1): P("model"), (side + 1, side + 1): P(),
              (side, side - 8): P("model")}  # fmt: skip
    for shape, spec in shapes.items():
        moment = jax.ShapeDtypeStruct(shape, jnp.float32)
        assert sharding.moment_shardings(mesh, moment).spec == spec


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes(runs, tmp_path):
    trees = [{"state": state} for _, state, _ in runs]
    with owned(tmp_path / "saved") as folder:
        for number, tree in enumerate(trees):
            folder.save(number, tree)
            for template in trees:
                restored = folder.restore(number, template)
                jax.tree.map(np.testing.assert_array_equal, restored, tree)
                alike = jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, template)
                assert all(jax.tree.leaves(alike))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("xla_gpu_deterministic_ops", "true"), ("xla_backend_optimization_level", "1")],
)
def test_the_flags_of_the_user_take_precedence(flag, value, monkeypatch):
    monkeypatch.setattr(sharding, "ACCELERATOR_PLUGINS", ())
    given = "--xla_force_host_platform_device_count=8"
    monkeypatch.setenv("XLA_FLAGS", given)
    sharding.set_up_devices()
    assert {given, f"--{flag}={value}"} <= set(os.environ["XLA_FLAGS"].split())

    monkeypatch.setenv("XLA_FLAGS", f"{given} --{flag}=other")
    sharding.set_up_devices()
    (kept,) = (one for one in os.environ["XLA_FLAGS"].split() if flag in one)
    assert kept == f"--{flag}=other"


def test_an_accelerator_keeps_the_compilers_own_level(monkeypatch):
    monkeypatch.setattr(sharding, "ACCELERATOR_PLUGINS", ("math",))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    sharding.set_up_devices()
    assert "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]
