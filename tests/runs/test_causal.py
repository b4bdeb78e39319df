"""Causal models in a run: they reach the known optimum, and are probed for beliefs so far."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from ml_collections import FrozenConfigDict

from jaxflat.config import base
from jaxflat.languages.batches import sampled_batch
from jaxflat.languages.tasks import prefix_posteriors
from jaxflat.runs import builders, checks
from jaxflat.runs.exact_posteriors import PRESENT_STATE, exact_beliefs
from jaxflat.runs.languages import make_language
from jaxflat.runs.measure_probes import measure
from jaxflat.runs.measurements import PartialResults
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps import sweep
from jaxflat.training.gradient import Division, loss_and_gradient
from tests.support.counts import in_full
from tests.support.optimized import optimized
from tests.support.sweeps import causal_config


@pytest.mark.slow
@pytest.mark.parametrize("block", ["modern", *in_full("gpt")])
def test_a_trained_model_reaches_the_optimum_of_a_tiny_language(tmp_path, block):
    config = causal_config(block)
    config.model.update({"width": 32, "num_layers": 2})
    phase = config.phases.pretrain
    phase.update({"steps": 1500, "checkpoint_steps": (1500,), "anneal_steps": 300})
    phase.update({"batch_size": 128})
    config.phase_order, config.training.steps_per_call = ("pretrain",), 250
    del config.phases.drift
    config.evaluation.update({"num_sentences": 512, "batch_size": 256})
    with optimized():
        assert sweep.run(config, [{}], tmp_path, stages=("train",)) == {}
    row = pd.read_csv(tmp_path / "results.csv").iloc[-1]
    assert 0 < row["excess_loss"] < 1e-3
    # The optimum is the entropy of sentences a prediction, by the chain rule; sampled words agree.
    sem = np.hypot(row["loss_sem"], row["optimal_loss_sem"])
    assert abs(row["loss"] - row["optimal_loss"] - row["excess_loss"]) < 4 * sem


@pytest.mark.slow
def test_microbatches_cut_to_their_longest_sentence_have_the_gradient_of_the_whole():
    config = causal_config()
    config.language.name = "recursive_pcfg"
    config.language.recursive_pcfg.update({"length": 8, "min_length": 1})
    config.init_seed = 0
    config = FrozenConfigDict(config)
    with jax.enable_x64(True):
        model, language = builders.make_model(config), make_language(config.language)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), builders.init_params(config))
        batch = sampled_batch(language, jax.random.key(0), 12, "sampled", "causal")
        order_B = jnp.argsort(batch.lengths_B)
        batch = jax.tree.map(lambda x: x[order_B.reshape(4, 3).T.reshape(-1)], batch)
        loss_fn, _ = builders.loss_functions(model)
        whole = loss_and_gradient(loss_fn, batch, params)
        parts = loss_and_gradient(loss_fn, batch, params, Division(1, 4, (2, 4, 6, 8)))
    assert len(set(batch.lengths_B.tolist())) > 2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tasks", "beliefs"),
    [
        ("hmm", (2, 7), {"state_2", "state_7", PRESENT_STATE}),
        ("hmm", (7,), {"state_7"}),  # in longer sentences only
        ("dyck", (4,), {"sum_4"}),
        ("balanced_tree", ((0, 4), (0, 8)), {"span_0_4", "span_0_8"}),
        ("pcfg", ((0, 4), ()), {"span_0_4"}),
    ],
)
def test_every_language_has_beliefs_of_its_tasks(name, tasks, beliefs):
    config = base()
    config.language.update({"name": name, "masking": "causal"})
    config.language[name].tasks = tasks
    if name == "hmm":
        config.language.hmm.update({"min_length": 4})
    config.model.update({"name": "lookup_table", "features": "p"})
    config.phase_order, config.phases, config.probe_seed = (), {}, 0
    config.probes.update({"num_draws": 1, "shots": (60,), "num_test": 50, "num_validation": 50})
    arguments = FrozenConfigDict(config), Folder(Path("unused")), Checkpoint(0), ["belief_state"]
    found = dict(measure(*arguments, PartialResults()))["belief_state"]
    assert set(found) == {f"belief_state/{name}" for name in beliefs}
    assert all(np.isfinite(estimate.mean) and estimate.mean <= 1 for estimate in found.values())


def sentences_and_tasks(num_sentences: int):
    language = make_language(FrozenConfigDict(causal_config().language))
    return language.sample(jax.random.key(1), num_sentences), language.tasks


@pytest.mark.slow
def test_beliefs_are_asked_at_the_task_and_after_each_word():
    sentences, tasks = sentences_and_tasks(32)
    beliefs = exact_beliefs(tasks, sentences, {}, "causal")
    assert [belief.name for belief in beliefs] == ["state_2", *[PRESENT_STATE] * 4]
    assert [belief.span for belief in beliefs] == [(1, 2), (0, 1), (1, 2), (2, 3), (3, 4)]
    (of_task,) = prefix_posteriors(tasks, sentences).values()
    np.testing.assert_array_equal(beliefs[0].probs_NxC, of_task[:, 1])
    np.testing.assert_allclose(beliefs[2].probs_NxC, of_task[:, 1], atol=1e-6)  # the same state
    for t, belief in enumerate(beliefs[1:]):
        np.testing.assert_array_equal(belief.valid_N, sentences.lengths_B > t)
        sums_N = belief.probs_NxC.sum(1)[np.asarray(belief.valid_N)]
        np.testing.assert_allclose(sums_N, 1, atol=1e-6)


@pytest.mark.slow
def test_beliefs_of_all_prefixes_share_one_regression():
    """Against ordinary least squares of the present state on the next symbol's probabilities."""
    config = causal_config()
    config.model.update({"name": "lookup_table", "features": "p"})
    config.phase_order, config.phases, config.probe_seed = (), {}, 0
    config.probes.update({"l2": (1e-6,), "num_draws": 1, "shots": (400,), "num_test": 300})
    config = FrozenConfigDict(config)
    found = dict(
        measure(config, Folder(Path("unused")), Checkpoint(0), ["belief_state"], PartialResults())
    )["belief_state"]
    assert set(found) == {"belief_state/state_2", f"belief_state/{PRESENT_STATE}"}
    language = make_language(config.language)

    def examples(seed: int) -> tuple[np.ndarray, np.ndarray]:
        sentences = language.sample(jax.random.key(seed), 4000)
        words = sentences.tokens_BxT, sentences.lengths_B
        features_BxTxU = np.exp(language.next_log_probs(*words)[:, 1:])
        real_BxT = np.asarray(sentences.tokens_BxT) < language.num_words
        return features_BxTxU[real_BxT], np.asarray(language.state_beliefs(*words))[real_BxT]

    def with_ones(features_NxU: np.ndarray) -> np.ndarray:
        return np.column_stack([features_NxU, np.ones(len(features_NxU))])

    (fitted_NxU, targets_NxK), (features_NxU, beliefs_NxK) = examples(0), examples(1)
    kernel_UxK, *_ = np.linalg.lstsq(with_ones(fitted_NxU), targets_NxK, rcond=None)
    errors = ((beliefs_NxK - with_ones(features_NxU) @ kernel_UxK) ** 2).sum()
    expected = 1 - errors / ((beliefs_NxK - beliefs_NxK.mean(0)) ** 2).sum()
    estimate = found[f"belief_state/{PRESENT_STATE}"]
    assert abs(estimate.mean - expected) < 5 * estimate.sem + 0.01


@pytest.mark.parametrize(
    ("model", "masking", "message"),
    [
        ("causal", "one", r"language\.masking='one' must be 'causal' for model\.name='causal'"),
        ("lstm", "causal", r"model\.name='lstm' must be 'causal' for language\.masking='causal'"),
    ],
)
def test_a_model_predicts_what_the_language_hides(model, masking, message):
    config = base()
    config.model.name, config.language.masking = model, masking
    with pytest.raises(ValueError, match=message):
        checks.check_config(FrozenConfigDict(config))


def test_all_prefixes_are_evaluated():
    config = base()
    config.model.name, config.language.masking = "causal", "causal"
    config.evaluation.num_positions = 2
    with pytest.raises(ValueError, match=r"evaluation\.num_positions is for .*masking='one'"):
        checks.check_config(FrozenConfigDict(config))


@pytest.mark.slow
@pytest.mark.parametrize("block", ["gpt", *in_full("modern")])
def test_every_stage_of_a_causal_checkpoint_has_results(tmp_path, block):
    """With an adversary, a projection, an embedding and fine-tuning, on widths 8 and 16."""
    config = causal_config(block)
    config.phases.drift.adversary.update({"strength": 0.1, "num_sentences": 16})
    config.flatness.measures = ("fisher_trace",)
    tuning = {"shots": 8, "batch_size": 4, "epochs": 1, "warmup_steps": 1}
    config.probes.finetune.update(tuning)
    widths = [{"model.width": width} for width in (8, 16)]
    assert sweep.run(config, widths, tmp_path) == {}
    rows = pd.read_csv(tmp_path / "results.csv")
    assert rows["projected"].sum() == 2
    for name in ("fisher_trace@embedded_invariant", "finetune/state_2.map", "excess_loss"):
        assert np.isfinite(rows[name][rows["projected"] == 1]).all(), name
    assert rows["finetune/state_2.map"].between(0, 1).sum() >= 2
