"""The flatness penalty of a phase: what it compiles, records, shares and refuses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat.config import training_settings
from jaxflat.config.base import FLATNESS_PENALTIES
from jaxflat.config.ranges import InputError
from jaxflat.flatness.penalty import effective_rank
from jaxflat.flatness.sampling import normal_like
from jaxflat.flatness.trees import inner
from jaxflat.languages.batches import sampled_batch
from jaxflat.runs import builders, phase_loss, shared_prefixes, slots, trajectory
from jaxflat.runs.languages import make_language
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps import points
from jaxflat.training.flatness_penalty import penalized_loss
from jaxflat.training.objectives import (
    masked_excess_loss,
    masked_lm_loss,
    masked_lm_loss_and_log_probs,
    masked_log_probs,
    word_features,
)
from tests.support.counts import in_full
from tests.support.sweeps import causal_config, tiny_config
from tests.training.test_training import losses_of_first_steps, resolved


def penalised(strength: float, **chosen) -> FrozenConfigDict:
    """A phase of SGD: with Adam, rounding decides the step where a gradient is 0."""
    config = ConfigDict(resolved())
    config.phases.pretrain.optimizer.name = "sgd"
    config.phases.pretrain.schedule.learning_rate = 0.1
    config.phases.pretrain.flatness_penalty.update({"strength": strength, **chosen})
    return FrozenConfigDict(config)


def program(config):
    (phase,) = trajectory.phases(config)
    mesh = builders.sharding.make_mesh(1)
    return builders.train_steps(config, phase.settings, mesh)


def start(config, slot: int = 0) -> slots.Call:
    (phase,) = trajectory.phases(config)
    seeded = FrozenConfigDict({**config.to_dict(), "init_seed": slot})
    state = builders.init_state(builders.init_params(seeded), phase)
    return slots.Call(config, phase, state, 3, 0, "trunk")


@pytest.mark.parametrize("measure", FLATNESS_PENALTIES)
def test_strength_0_is_the_program_without_a_penalty(measure):
    plain = program(penalised(0.0))
    assert program(penalised(0.0, measure=measure, num_probes=3)) is plain
    assert program(penalised(1e-4, measure=measure)) is not plain


def test_doses_share_one_program():
    assert program(penalised(1e-4)) is program(penalised(-1e-5))
    assert program(penalised(1e-4)) is not program(penalised(1e-4, num_probes=2))


@pytest.mark.slow
def test_losses_and_log_probs_of_one_pass_are_those_of_two():
    config = resolved()
    model, params = builders.make_model(config), builders.init_params(config)
    batch = sampled_batch(make_language(config.language), jax.random.key(0), 16, "exact")
    loss, log_probs = masked_lm_loss_and_log_probs(model.apply)(params, batch)
    jax.tree.map(np.testing.assert_array_equal, loss, masked_lm_loss(model.apply)(params, batch))
    expected = masked_log_probs(model.apply)(params, batch)
    jax.tree.map(np.testing.assert_array_equal, log_probs, expected)
    entropy = jax.scipy.special.entr(batch.targets_BxMxV).sum() / 16
    excess_sum, weight = masked_excess_loss(model.apply)(params, batch)
    np.testing.assert_allclose(excess_sum / weight, loss[0] / 16 - entropy, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "strength"),
    [
        *(("gauss_newton_trace", 1e-3), ("feature_rank", 0.1)),
        *in_full(("hessian_max_eigenvalue", 1e-3)),
    ],
)
def test_eight_devices_train_like_one(measure, strength):
    config = penalised(strength, measure=measure)
    one, eight = (losses_of_first_steps(config, n, 5) for n in (1, 8))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    plain = losses_of_first_steps(penalised(0.0), 1, 5)
    assert plain[0] == pytest.approx(one[0], rel=1e-6)  # the loss is the one without the penalty
    assert np.abs(plain - one)[1:].max() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["gauss_newton_trace", *in_full("feature_rank")])
def test_each_dose_of_a_team_trains_as_it_does_alone(measure):
    configs = [penalised(strength, measure=measure) for strength in (1e-3, -1e-3)]
    alone = [slots.run_calls({0: start(c, i)})[0] for i, c in enumerate(configs)]
    teams = [FrozenConfigDict({**c.to_dict(), "training": {**c.training, "together": 2}})
             for c in configs]  # fmt: skip
    together = slots.run_calls({i: start(config, i) for i, config in enumerate(teams)})
    for slot, outcome in together.items():
        np.testing.assert_allclose(outcome.loss, alone[slot].loss, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            outcome.state.params,
            alone[slot].state.params,
        )


@pytest.mark.slow
def test_negative_strengths_stop_where_the_excess_exceeds_its_limit():
    """Before training the excess is about 1 nat."""
    params = {}
    for strength, limit in [(0.0, 0.0), (-1e-3, 0.0), (-1e-3, 0.01), (-1e-3, 9.0), (1e-3, 0.01)]:
        config = penalised(strength, max_excess=limit)
        (outcome,) = slots.run_calls({0: start(config)}).values()
        leaves = jax.tree.leaves(outcome.state.params)
        params[strength, limit] = jnp.concatenate([leaf.ravel() for leaf in leaves])

    def moved(*dose):
        return float(jnp.abs(params[dose] - params[0.0, 0.0]).max())

    assert moved(-1e-3, 0.01) < 1e-6
    for dose in [(-1e-3, 0.0), (-1e-3, 9.0), (1e-3, 0.01)]:
        assert moved(*dose) > 1e-5


@pytest.mark.slow
def test_a_penalty_on_feature_rank_lowers_it_and_a_negative_one_raises_it():
    config = penalised(0.0)
    model, language = builders.make_model(config), make_language(config.language)
    batch = sampled_batch(language, jax.random.key(0), 256, "exact")
    assert (batch.lengths_B < batch.inputs_BxT.shape[1]).any()
    _, weights_BxT = word_features(model.apply)(builders.init_params(config), batch)
    np.testing.assert_array_equal(weights_BxT, batch.inputs_BxT != language.num_words)  # the pad
    ranks = []
    for strength in (-0.1, 0.0, 0.1):
        dose = penalised(strength, measure="feature_rank")
        (outcome,) = slots.run_calls({0: start(dose)._replace(stop=30)}).values()
        ranks.append(effective_rank(*word_features(model.apply)(outcome.state.params, batch)))
    assert ranks[0] > ranks[1] + 0.1 > ranks[2] + 0.2


@pytest.mark.slow
def test_the_penalty_of_an_own_objective_is_on_its_hessian_and_the_models_predictions():
    config = penalised(1e-3)
    model, params = builders.make_model(config), builders.init_params(config)
    batch = sampled_batch(make_language(config.language), jax.random.key(0), 8, "exact")

    def doubled(params, batch):
        loss_sum, weight = masked_lm_loss(model.apply)(params, batch)
        return 2 * loss_sum, weight

    found = {}
    for objective in ("masked_lm", "own"):
        loss_fn = masked_lm_loss(model.apply) if objective == "masked_lm" else doubled
        for measure in ("gauss_newton_trace", "hessian_trace"):
            settings = ConfigDict(config.phases.pretrain.to_dict())
            settings.objective, settings.flatness_penalty.measure = objective, measure
            if objective == "own":
                settings.own = "a function"
            made = phase_loss.make_flatness_penalty(model.apply, loss_fn, settings)
            vectors = made.next_vectors(None, params, batch, jax.random.key(1))
            found[measure, objective] = made.loss_and_curvature(params, batch, vectors)
    for measure, factor in (("gauss_newton_trace", 1), ("hessian_trace", 2)):
        one, two = found[measure, "masked_lm"], found[measure, "own"]
        np.testing.assert_allclose(two[0], 2 * one[0], rtol=1e-5)
        np.testing.assert_allclose(two[2], factor * one[2], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("block", ["gpt", "modern"])
def test_a_causal_models_penalised_gradient_is_that_of_the_loss_and_the_gauss_newton_matrix(block):
    """Against finite differences of L + mu v'Gv in float64, with G written out.

    v'Gv is the mean over predictions of the variance, under p, of the logits' change along v.
    """
    strength, config = 0.3, causal_config(block)
    config.init_seed = 0
    config = FrozenConfigDict(config)
    settings = config.phases.pretrain
    with jax.enable_x64(True):
        model = builders.make_model(config)
        sentences = make_language(config.language), jax.random.key(0), 6, "exact", "causal"
        params, batch = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x,
            (builders.init_params(config), sampled_batch(*sentences)),
        )
        assert 0 < batch.weights_BxM.mean() < 1
        loss_fn, _ = builders.loss_functions(model)
        made = phase_loss.make_flatness_penalty(model.apply, loss_fn, settings)
        vectors = made.next_vectors(None, params, batch, jax.random.key(1))
        penalized_fn = penalized_loss(made, vectors, jnp.asarray(strength))
        gradient, weight = jax.jit(jax.grad(penalized_fn, has_aux=True))(params, batch)

        def logits_fn(params):
            words = batch.inputs_BxT, batch.lengths_B, batch.positions_BxM
            return model.apply({"params": params}, *words)[0]

        @jax.jit
        def expected(params):
            weights_BxM = batch.weights_BxM / batch.weights_BxM.sum()
            logits_BxMxU = logits_fn(params)
            losses_BxM = -(batch.targets_BxMxV * jax.nn.log_softmax(logits_BxMxU)).sum(-1)
            total, probs_BxMxU = (weights_BxM * losses_BxM).sum(), jax.nn.softmax(logits_BxMxU)
            for vector in vectors:
                _, changes_BxMxU = jax.jvp(logits_fn, (params,), (vector,))
                mean_BxMx1 = (probs_BxMxU * changes_BxMxU).sum(-1, keepdims=True)
                variance_BxM = (probs_BxMxU * (changes_BxMxU - mean_BxMx1) ** 2).sum(-1)
                total += strength * (weights_BxM * variance_BxM).sum() / len(vectors)
            return total

        direction, step = normal_like(jax.random.key(3), params), 1e-4

        def at(step):
            return expected(jax.tree.map(lambda p, d: p + step * d, params, direction))

        coarse, fine = ((at(h) - at(-h)) / (2 * h) for h in (step, step / 2))
        slope = inner(gradient, direction) / weight
        np.testing.assert_allclose(slope, (4 * fine - coarse) / 3, rtol=1e-6)


def prefix(strength: float, **chosen) -> str:
    config = tiny_config()
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.phases.pretrain.flatness_penalty.update({"strength": strength, **chosen})
    config = FrozenConfigDict(config)
    phase = trajectory.phases(config)[0]
    return shared_prefixes._prefix(config, Folder(Path("unused") / "point"), phase).path.name


def test_shared_prefixes_have_the_names_of_before_without_a_penalty(monkeypatch):
    assert prefix(0.0) == prefix(0.0, measure="hessian_trace")
    assert len({prefix(0.0), prefix(1e-4), prefix(1e-5), prefix(1e-5, num_probes=2)}) == 4


def test_a_sweep_recorded_before_the_key_existed_goes_on_without_a_penalty():
    config = tiny_config()
    recorded = training_settings.recorded_settings(None, config, [config], "x")
    older = {**recorded, "phases": {}}
    for name, phase in recorded["phases"].items():
        older["phases"][name] = {k: v for k, v in phase.items() if k != "flatness_penalty"}
    assert training_settings.recorded_settings(older, config, [config], "x") == recorded
    config.phases.drift.flatness_penalty.strength = 1e-4
    with pytest.raises(InputError, match=r"flatness_penalty\.strength=0\.0, this one has"):
        training_settings.recorded_settings(older, config, [config], "x")


BAD = {
    ("targets", "sampled", "max_excess", 0.1): "max_excess=0.1 needs phases.pretrain.targets='exac",
    ("targets", "exact", "max_excess", -0.1): "max_excess=-0.1 must not be negative",
    ("targets", "exact", "measure", "trace"): "measure: 'trace' is not one of gauss_newton_trace",
    ("targets", "exact", "strength", float("nan")): "strength=nan must be finite",
    ("targets", "exact", "num_probes", 0): "num_probes=0 must be at least 1",
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[2])
def test_bad_values_are_one_line_that_names_the_key(case, tmp_path):
    targets, value = {case[0]: case[1]}, {case[2]: case[3]}
    config = tiny_config()
    config.phases.pretrain.update(targets)
    config.phases.pretrain.flatness_penalty.update(value)
    with pytest.raises(InputError) as error:
        points.expand(config, [{}], tmp_path)
    assert str(error.value).startswith("phases.pretrain.flatness_penalty.")
    assert BAD[case] in str(error.value)


@pytest.mark.parametrize("measure", ["hessian_max_eigenvalue", "feature_rank"])
def test_measures_of_a_whole_batch_refuse_microbatches(measure, tmp_path):
    config = tiny_config()
    config.phases.pretrain.flatness_penalty.update({"measure": measure, "strength": 1e-4})
    config.phases.pretrain.microbatch_size = config.phases.pretrain.batch_size // 2
    with pytest.raises(InputError, match=f"must be 0 with .*measure='{measure}'"):
        points.expand(config, [{}], tmp_path)


def test_an_adversary_and_a_penalty_exclude_each_other(tmp_path):
    config = tiny_config()
    config.phases.pretrain.adversary.strength = 0.1
    config.phases.pretrain.flatness_penalty.strength = -1e-5
    with pytest.raises(InputError, match="exclude each other; set one to 0"):
        points.expand(config, [{}], tmp_path)
