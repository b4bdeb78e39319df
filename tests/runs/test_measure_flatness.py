"""The flatness stage: every measure raw, and embedded in the sweep's widest model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.config import MEASURES
from jaxflat.config.validation import InputError
from jaxflat.distributed.sharding import make_mesh
from jaxflat.flatness import Estimate, Measured, Problem, fisher_trace, mean_loss
from jaxflat.models import rescaling
from jaxflat.runs import builders
from jaxflat.runs import measure_flatness as stage
from jaxflat.runs.measurements import PartialResults
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.sweeps import points
from tests.models.test_rescaling import MODELS, exact_moments, random_rescaling
from tests.support import tiny_masked_lm as lm
from tests.support.counts import FULL
from tests.support.sweeps import tiny_config

CHEAP = {
    "num_microbatches": 6,
    "microbatch_size": 2,
    "num_probes": 1,
    "eigenvalues.num_largest": 1,
    "eigenvalues.num_steps": 3,
    "density.num_steps": 3,
    "density.num_probes": 2,
    "learning_coefficient.num_draws": 8,
}


def two_layers():
    """Return the tiny config with two layers, one of them in a stack."""
    config = tiny_config()
    config.model.num_layers = 2
    return config


def measured(
    tmp_path,
    measure,
    embedded_width,
    embedded_layers=0,
    move=lambda params: params,
    many=0,
    **model,
):
    """Return the estimates of a measure at the initial parameters, of width 8, after `move`.

    many: sentences in each of 16 microbatches, in place of the few of CHEAP.
    """
    config = two_layers()
    config.model.update(model)
    config.flatness.update_from_flattened_dict(CHEAP)
    if many:
        config.probe_seed = 1
        config.flatness.update(num_microbatches=16, microbatch_size=many, num_probes=2)
    config.flatness.update(measures=(measure,), embedded_width=embedded_width)
    config.flatness.embedded_layers = embedded_layers
    (point,) = points.expand(config, [{}], tmp_path)
    params = move(builders.init_params(point.config))
    problems = stage.Problems(point.config, params, Checkpoint(14))
    return stage.measure_problems(problems, measure, PartialResults())


@pytest.mark.parametrize(
    ("name", "width", "layers"), [("transformer", 24, 0), ("transformer", 8, 3), ("lstm", 24, 3)]
)
@pytest.mark.slow
def test_embedded_values_are_of_the_larger_model_that_computes_the_same(
    tmp_path, monkeypatch, name, width, layers
):
    def loss_and_size(problem, settings):
        loss = mean_loss(problem.loss_fn, problem.params, problem.sample(0))
        size = jnp.float32(sum(leaf.size for leaf in jax.tree.leaves(problem.params)))
        return Measured({"loss": loss, "size": Estimate(size, size, 6, "sentences")})

    monkeypatch.setitem(stage.MEASURES, "average_sharpness", loss_and_size)
    found = measured(tmp_path, "average_sharpness", width, layers, name=name, num_layers=1)
    assert set(found) == {"loss", "size", "loss@embedded", "size@embedded"}
    for name in ("mean", "sem"):
        raw, embedded = (getattr(found[key], name) for key in ("loss", "loss@embedded"))
        np.testing.assert_allclose(embedded, raw, rtol=1e-4)
    assert found["size@embedded"].mean > 2 * found["size"].mean


# Means over sentences, probes and labels; several values of one measure.
SOME = ("fisher_trace", "hessian_density", "worst_sharpness")


@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES if FULL else SOME)
def test_every_measure_has_embedded_values_where_there_is_a_common_width(tmp_path, measure):
    found = measured(tmp_path, measure, embedded_width=16)
    raw = {name for name in found if "@" not in name}
    # Traces by block are measured on the raw model only.
    whole = {measure} if measure.endswith("_trace") else raw
    invariant = {f"{measure}@{kind}" for kind in ("invariant", "embedded_invariant")}
    at = {f"{name}@embedded" for name in whole}
    assert found.keys() - raw == (at | invariant if measure.endswith("_trace") else at)
    few_draws = {"local_learning_coefficient", "local_learning_coefficient@embedded"}
    assert all(np.isfinite(found[name].mean) for name in found.keys() - few_draws)
    assert all(np.isnan(found[name].mean) for name in found.keys() & few_draws)
    assert any(found[f"{name}@embedded"].mean != found[name].mean for name in whole)
    same = measured(tmp_path, measure, embedded_width=8)
    assert same.keys() == found.keys()
    for name in whole:
        means = [same[f"{name}@embedded"].mean, same[name].mean, found[name].mean]
        np.testing.assert_array_equal(means, [means[-1]] * 3)


@pytest.mark.slow
def test_extra_layers_add_the_curvature_of_their_biases_to_the_fisher_trace(tmp_path):
    found = measured(tmp_path, "fisher_trace", 8, 4, name="lstm", num_layers=1)
    once = measured(tmp_path, "fisher_trace", 8, 2, name="lstm", num_layers=1)
    raw = found["fisher_trace"].mean
    added, added_once = (x["fisher_trace@embedded"].mean - raw for x in (found, once))
    assert added_once > 0
    np.testing.assert_allclose(added, 3 * added_once, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "model"),
    [
        ("fisher_trace", {}),
        ("fisher_trace", {"tied_decoder": False}),
        ("fisher_trace", {"name": "lstm"}),
        ("hessian_trace", {"name": "lstm"}),  # of a transformer its probes turn with the heads
    ],
    ids=str,
)
def test_moving_a_model_along_its_rescalings_leaves_the_invariant_trace(tmp_path, measure, model):
    """To 0.1%, with the same labels and probes.

    Rounding may change a label that is drawn near a threshold; it changes none for this probe_seed.
    """
    raw, invariant = measure, f"{measure}@invariant"
    found = measured(tmp_path, measure, embedded_width=0, many=64, **model)
    if measure == "fisher_trace":
        assert found[invariant].mean < found[raw].mean
    for seed in range(2):

        def move(params, seed=seed):
            head_size = 8  # of tiny_config, as its width: a norm makes the moments singular
            return rescaling.rescale(random_rescaling(params, seed, head_size), params)

        moved = measured(tmp_path, measure, embedded_width=0, move=move, many=64, **model)
        assert abs(moved[raw].mean / found[raw].mean - 1) > 0.05
        difference = abs(moved[invariant].mean - found[invariant].mean)
        assert difference < 0.001 * abs(found[invariant].mean)


@pytest.mark.slow
def test_the_invariant_trace_is_nearly_unbiased_and_covered(monkeypatch):
    """Over samples of a finite population, whose least trace is known from dense matrices."""
    monkeypatch.setattr(lm, "MODEL", MODELS["transformer, tied"])
    jax.clear_caches()
    params, population = lm.make_params(), lm.make_batches(64, 4)
    _, moments = exact_moments(params, population)
    least = rescaling.rescaled_trace(moments, rescaling.flattest_rescaling(moments, params))
    mesh = make_mesh(num_data=1)

    def estimate(key):
        data_key, moment_key, key = jax.random.split(key, 3)
        rows = jax.random.randint(data_key, (32,), 0, 64)
        batches = jax.tree.map(lambda x: x[rows], population)
        problem = Problem(lm.loss_fn, lm.log_probs_fn, params, lambda _: batches, key, 1)
        flattest = stage.in_flattest_coordinates(problem, moment_key, 2, 4, mesh)
        args = lm.log_probs_fn, params, batches, key
        return fisher_trace(*args, rescale=flattest.rescale, num_samples=4)

    keys = jax.random.split(jax.random.key(1), num := 1000 if FULL else 200)
    estimates = jax.jit(lambda keys: jax.lax.map(estimate, keys, batch_size=20))(keys)
    bias = (estimates.mean.mean() / least - 1).item()
    error = (estimates.mean.std() / least / num**0.5).item()
    low, high = estimates.interval()
    coverage = jnp.mean((low < least) & (least < high)).item()
    print(f"bias {bias:.4f} +- {error:.4f}, coverage {coverage:.3f}")
    assert -3 * error < bias < 0.01 + 3 * error
    assert abs(coverage - 0.95) < 3 * (0.95 * 0.05 / num) ** 0.5 + 0.01
    jax.clear_caches()


@pytest.mark.slow
def test_each_layer_of_a_stack_has_a_name(tmp_path):
    found = measured(tmp_path, "fisher_trace", embedded_width=8)
    assert {"fisher_trace/layer_0.mlp", "fisher_trace/layer_last.mlp"} <= found.keys()


SWEPT = {
    "widths of lstms": ([{"name": "lstm", "width": w} for w in (6, 18)], (18, 2)),
    "widths that do not divide": ([{"name": "lstm", "width": w} for w in (6, 9)], (0, 0)),
    "depths": ([{"num_layers": n} for n in (1, 3)], (8, 3)),
    "widths and depths": ([{"width": 16}, {"num_layers": 3}], (16, 3)),
    "families": ([{"name": "lstm"}, {"name": "transformer"}], (0, 0)),
    "causal widths": ([{"name": "causal", "width": w} for w in (8, 24)], (24, 2)),
    "causal blocks": ([{"name": "causal", "block": b} for b in ("gpt", "modern")], (0, 0)),
    "causal heads": ([{"name": "causal", "head_size": n} for n in (4, 8)], (0, 0)),
    "one family's heads": ([{"head_size": 4}, {"head_size": 8}], (0, 0)),
}


@pytest.mark.parametrize("case", SWEPT)
def test_models_of_one_family_whose_widths_divide_have_a_common_size(tmp_path, case):
    models, size = SWEPT[case]
    swept = [{f"model.{key}": value for key, value in model.items()} for model in models]
    config = two_layers()
    config.language.masking = "causal" if case.startswith("causal") else "one"
    for point in points.expand(config, swept, tmp_path):
        settings = point.config.flatness
        assert (settings.embedded_width, settings.embedded_layers) == size


def test_fewer_layers_than_the_models_own_are_refused(tmp_path):
    config = two_layers()
    config.flatness.update({"embedded_width": 8, "embedded_layers": 1})
    with pytest.raises(InputError, match=r"embedded_layers=1 is less than model.num_layers=2"):
        points.expand(config, [{}], tmp_path)
