"""A phase that starts with a random rescaling: the function stays, and so do invariant traces."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat import config as base_config
from jaxflat.analysis import verdicts
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare
from jaxflat.analysis.plan import UNDECLARED
from jaxflat.analysis.results_csv import read_results
from jaxflat.analysis.verdicts import NONE, UNDECIDED
from jaxflat.config import custom, param, product
from jaxflat.config.validation import InputError
from jaxflat.runs import builders, train, trajectory
from jaxflat.runs import measure_flatness as stage
from jaxflat.runs.measurements import load_params
from jaxflat.runs.slots import Call
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.sweeps import points, sweep
from tests.support.optimized import optimized
from tests.support.signals import COMPILED, signal_in, until_done
from tests.support.sweeps import tiny_config
from tests.sweeps.test_sweep import assert_same

KEY = "phases.rescale.rescaling"
ARMS = param(KEY, [0.0, 4.0])


def rescaled_config(num_steps=10):
    """Return the tiny config with a rescaling, without steps, between its phases."""
    config = tiny_config()
    config.phases.pretrain.update({"steps": num_steps, "checkpoint_steps": ()})
    rescale = config.phases.rescale = base_config.phase()
    rescale.update({"steps": 0, "checkpoint_steps": (0,), "anneal_steps": 0, "batch_size": 8})
    config.phase_order = ("pretrain", "rescale", "drift")
    return config


def small_model(width, num_layers):
    del width, num_layers


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"phases.rescale.rescaling": 0.5}, r"phases\.rescale\.rescaling=0\.5 must be above 1"),
        ({"phases.rescale.rescaling": 1e3}, r"phases\.rescale\.rescaling=1000\.0 must be below"),
        ({"phases.rescale.checkpoint_steps": (0, 1)}, r"phases\.rescale\.checkpoint_steps=\(0, 1"),
        (
            {"phase_order": ("rescale", "pretrain", "drift")},
            r"phases\.rescale\.steps=0 and .* at l",
        ),
        ({"phases.pretrain.checkpoint_steps": (0,)}, r"phases\.pretrain\.checkpoint_steps=\(0,\)"),
    ],
)
def test_wrong_rescalings_are_named(changed, message, tmp_path):
    with pytest.raises(InputError, match=message):
        points.expand(rescaled_config(), [changed], tmp_path)


def test_a_users_model_has_no_known_rescaling_and_computes_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxflat.runs.checks.check_functions", lambda _: None)
    config = rescaled_config()
    config.model.own = custom(small_model)
    config.model.name = "own"
    assert points.expand(config, ARMS[:1], tmp_path)
    with pytest.raises(InputError, match=r"phases\.rescale\.rescaling=4\.0 must be 0\.0 .*'own'"):
        points.expand(config, ARMS, tmp_path)
    for key, value in (("remat", True), ("compute_dtype", "bfloat16")):
        with pytest.raises(InputError, match=rf"training\.{key}={value!r} must be .*'own'"):
            points.expand(config, [{f"training.{key}": value}], tmp_path)


def test_branches_of_a_phases_end_and_of_the_next_start_are_different_calls():
    """Otherwise runs of one program could share a call, but not its phase."""
    phases = trajectory.phases(rescaled_config())[:2]
    positions = {Call(None, phase, None, 12, 10, "anneal").position for phase in phases}
    assert len(positions) == 2


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_features_keep_their_proportions(tied, tmp_path):
    config = rescaled_config()
    config.model.tied_decoder = tied
    (point,) = points.expand(config, [{}], tmp_path)
    model, params = builders.make_model(point.config), builders.init_params(point.config)
    moved = train._rescaled_at_random(params, jax.random.key(0), 8, 4.0)
    words = jnp.asarray([[0, 1, 2, 3]]), jnp.asarray([4])
    (_, before), (_, after) = (model.apply({"params": tree}, *words) for tree in (params, moved))
    ratio = after["features_BxMxD"] / before["features_BxMxD"]
    np.testing.assert_allclose(ratio, jnp.full_like(ratio, jnp.median(ratio)), rtol=2e-2)
    assert (abs(jnp.median(ratio) - 1) > 0.1) == tied


@pytest.mark.slow
def test_a_sweep_that_was_recorded_without_the_key_resumes(tmp_path):
    config = tiny_config()
    config.phases.pretrain.checkpoint_steps = ()
    sweep.run(config, [{}], tmp_path, stages=("train",))
    (prefix,) = (tmp_path / "trunks").iterdir()
    path = tmp_path / "sweep.json"
    stored = json.loads(path.read_text())
    for phase in stored["trains"]["phases"].values():
        assert phase.pop("rescaling") == 0
    path.write_text(json.dumps(stored))
    assert sweep.run(config, param("seed", [0, 1]), tmp_path, stages=("train",)) == {}
    assert prefix.exists()
    config.phases.drift.rescaling = 4.0
    with pytest.raises(InputError, match=r"phases\.drift\.rescaling=0\.0, this one has .*=4\.0"):
        sweep.run(config, [{}], tmp_path)


@pytest.mark.slow
def test_stopped_in_every_call_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    """With an anneal and a projection that branch off the rescaled start, and a phase after it."""
    config = rescaled_config()
    config.phases.rescale.update({"anneal_steps": 4})
    config.phases.rescale.projection.update({"checkpoint_steps": (0,), "steps": 3, "batch_size": 8})
    config.phases.drift.rescaling = 2.0
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert sweep.run(config, ARMS, undisturbed, stages=("train",)) == {}
    calls = signal_in(monkeypatch, COMPILED[:1])
    assert until_done(lambda: sweep.run(config, ARMS, stopped, stages=("train",))) > 10
    assert calls
    assert_same(undisturbed, stopped)
    arrays = [
        load_params(point.config, point.folder, Checkpoint(14))
        for point in points.expand(config, ARMS, undisturbed)
    ]
    changes = jax.tree.map(lambda x, y: jnp.abs(x / y).max(), *arrays)
    assert max(jax.tree.leaves(changes)) > 2


# Epsilon of the norms does not move with the stream, so outputs of a moved model change by so much.
LOGITS, LOSS, ACCURACY = 2e-3, 1e-5, 0.01
NUM_STEPS, BATCH = 1000, "phases.pretrain.batch_size"


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """Return the points and rows of a sweep of two batch sizes, each unmoved and then moved."""
    config = rescaled_config(num_steps=NUM_STEPS)
    del config.phases.drift
    config.phase_order = ("pretrain", "rescale")
    config.model.update({"width": 16, "head_size": 4})
    config.training.steps_per_call = 100
    config.flatness.measures = ("hessian_trace", "fisher_trace")
    config.flatness.update({"num_microbatches": 16, "microbatch_size": 32, "num_probes": 4})
    config.flatness.embedded_width = 32
    config.evaluation.update({"num_sentences": 128, "batch_size": 64})
    config.probes.update({"num_validation": 256, "num_test": 512, "iterations": 50})
    config.probes.shots = (50, 200)
    listed = product(param("seed", range(3)), param(BATCH, [16, 32]), ARMS)
    workdir = tmp_path_factory.mktemp("control")
    with optimized():
        assert sweep.run(config, listed, workdir, stages=("train",)) == {}
    assert sweep.run(config, listed, workdir) == {}
    return points.expand(config, listed, workdir), read_results(workdir / "results.csv")


@pytest.mark.slow
def test_a_rescaling_changes_raw_traces_and_nothing_else(control):
    _, rows = control
    ratios = []
    for row, moved in zip(rows[::2], rows[1::2], strict=True):
        assert (row.swept[KEY], moved.swept[KEY]) == ("0.0", "4.0")
        before, after = row.values, moved.values
        assert abs(after["excess_loss"] - before["excess_loss"]) < LOSS
        for name in before:
            if name.startswith(("linear_probe/", "belief_state/")) and not name.endswith("_sem"):
                assert abs(after[name] - before[name]) < ACCURACY
        for name in ("fisher_trace@invariant", "fisher_trace@embedded_invariant"):
            assert abs(after[name] / before[name] - 1) < 1e-3
        ratios.append(after["hessian_trace"] / before["hessian_trace"])
    assert max(ratios) > 1.5  # a draw may also move terms up and down, and their sum little


@pytest.mark.slow
def test_the_invariant_trace_of_the_hessian_stays_without_the_noise_of_probes(control):
    """The sum over all directions, for the same sentences: heads turn the random probes."""
    pair = control[0][:2]
    problems = [trained_problem(point) for point in pair]
    logits = [logits_of(*one) for one in zip(pair, problems, strict=True)]
    change = jnp.abs(logits[1] - logits[0]).max()
    before, after = map(exact_trace, problems)
    print(f"largest change of a logit {change:.2g}, of the trace {after / before - 1:.2g}")
    assert 0 < change < LOGITS
    assert abs(after / before - 1) < 1e-3


@pytest.mark.slow
def test_verdicts_by_invariant_traces_stay(control):
    """Of batches of 32 against 16, by the same draws of labels, unmoved and moved."""
    unmoved, moved = (
        answers([by_invariant(row, "fisher_trace", without=KEY) for row in control[1][i::2]])
        for i in (0, 1)
    )
    assert NONE not in unmoved.values()
    assert unmoved == moved


@pytest.mark.slow
@pytest.mark.parametrize("size", ["16", "32"])
def test_moved_models_are_neither_flatter_nor_more_accurate(control, size):
    """Two arms, 0.0 and 4.0, of equal loss: the invariant trace decides nothing."""
    rows = [row for row in control[1] if row.swept[BATCH] == size]
    found = answers([by_invariant(row, "hessian_trace", without=BATCH) for row in rows])
    assert list(found.values()) == [UNDECIDED] * 2


def answers(rows):
    """Return the answers to the claims on models of equal loss."""
    plan = replace(UNDECLARED, loss_margin=99.0)  # a few steps leave losses far apart
    found = judge(compare(rows, plan))
    return {v.claim: v.answer for v in found if v.kind in (verdicts.ACCURACY, verdicts.FLATNESS)}


def by_invariant(row, trace, without):
    """Return the row with one invariant trace in place of all traces, without a swept key."""
    values = {name: value for name, value in row.values.items() if "_trace" not in name}
    columns = ("hessian_trace", "hessian_trace@embedded", "hessian_trace@embedded_invariant")
    values |= dict.fromkeys(columns, row.values[f"{trace}@embedded_invariant"])
    swept = {key: text for key, text in row.swept.items() if key != without}
    return replace(row, swept=swept, values=values)


def trained_problem(point):
    """Return the problem of a measured checkpoint in its flattest coordinates."""
    step = Checkpoint(NUM_STEPS)
    params = load_params(point.config, point.folder, step)
    return stage.Problems(point.config, params, step).own_flattest


def logits_of(point, problem):
    model, batch = builders.make_model(point.config), problem.sample(0)
    inputs = batch.inputs_BxT, batch.lengths_B, batch.positions_BxM
    apply = jax.jit(jax.vmap(lambda *x: model.apply({"params": problem.params}, *x)[0]))
    return apply(*inputs)


def exact_trace(problem):
    """Return tr S' H S on six microbatches; each half of them has its own S."""
    halves = [
        jax.tree.map(lambda x, h=half: x[h:6:2].reshape(-1, *x.shape[2:]), problem.sample(0))
        for half in (0, 1)
    ]
    args = problem.loss_fn, problem.params, problem.rescale
    return np.mean([sum_of_curvatures(*args, half, batch) for half, batch in enumerate(halves)])


@partial(jax.jit, static_argnums=0)
def sum_of_curvatures(loss_fn, params, rescale, half, batch):
    """Return the sum of d' H d over the columns d of S."""
    flat_P, unravel = ravel_pytree(params)

    def gradient(flat_P):
        return jax.grad(lambda x_P: jnp.divide(*loss_fn(unravel(x_P), batch)))(flat_P)

    def curvature(i):
        e_P = jnp.zeros_like(flat_P).at[i].set(1)
        direction_P = ravel_pytree(rescale(half, unravel(e_P)))[0]
        return direction_P @ jax.jvp(gradient, (flat_P,), (direction_P,))[1]

    return jax.lax.map(curvature, jnp.arange(flat_P.size), batch_size=32).sum()
