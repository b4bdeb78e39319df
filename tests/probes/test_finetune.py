"""Fine-tuning against regressions of known outcome, and the effect of its key."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from jaxflat.models.language_model import make_language_model
from jaxflat.models.transformer import Transformer
from jaxflat.probes.features import sentence_features
from jaxflat.probes.finetune import LabelledExamples, finetune, finetuned_correct, predict

ADAMW = optax.adamw(1.0, weight_decay=0.0)
NUM_WORDS, T, C = 5, 3, 3
MODEL = Transformer(NUM_WORDS, T, width=8, num_layers=2, num_heads=1, tied_decoder=True)
SIZES = {"width": 8, "num_layers": 2, "head_size": 8, "tied_decoder": True}
CAUSAL = {
    block: make_language_model(NUM_WORDS, T, name="causal", block=block, **SIZES)
    for block in ("gpt", "modern")
}


def table_features(params, tokens_NxT, lengths_N):
    """A body with one table of word vectors; features are their mean over a sentence."""
    del lengths_N
    return params["embedding"][tokens_NxT].mean(1)


def frozen_features(params, tokens_NxT, lengths_N):
    return table_features(jax.lax.stop_gradient(params), tokens_NxT, lengths_N)


def model_features(params, tokens_NxT, lengths_N, model=MODEL):
    return sentence_features(model.apply, params, tokens_NxT, lengths_N, "mean")


def sentences(num_examples: int, seed: int = 0) -> LabelledExamples:
    """Random words; noisy labels from the counts of word 0 and word 1."""
    keys = jax.random.split(jax.random.key(seed), 2)
    tokens_NxT = jax.random.randint(keys[0], (num_examples, T), 0, NUM_WORDS, jnp.int32)
    counts_NxC = jnp.stack([(tokens_NxT == c).sum(1, dtype=jnp.int32) for c in range(C)], axis=1)
    noise_NxC = jax.random.gumbel(keys[1], (num_examples, C))
    labels_N = jnp.argmax(2 * counts_NxC.astype(jnp.float32) + noise_NxC, 1).astype(jnp.int32)
    lengths_N = jnp.full(num_examples, T, jnp.int32)
    return LabelledExamples(tokens_NxT, lengths_N, labels_N, jnp.arange(num_examples) % 5 > 0)


def table(num_features: int = 4) -> dict[str, jax.Array]:
    return {"embedding": jax.random.normal(jax.random.key(7), (NUM_WORDS, num_features))}


@partial(jax.jit, static_argnames=("features_fn", "batch_size", "epochs"))
def tuned(features_fn, params, train, key, rate, warmup_steps=0, *, batch_size, epochs):
    settings = {"num_classes": C, "batch_size": batch_size, "epochs": epochs}
    return finetune(features_fn, params, train, key, rate, warmup_steps, ADAMW, **settings)


@pytest.mark.slow
def test_with_a_frozen_body_it_is_logistic_regression():
    train, params = sentences(200), table()
    found = tuned(frozen_features, params, train, jax.random.key(0), 0.05, batch_size=200,
                  epochs=2000)  # fmt: skip
    np.testing.assert_array_equal(found["model"]["embedding"], params["embedding"])
    valid = np.asarray(train.valid_N)
    x = np.asarray(table_features(params, train.tokens_NxT, train.lengths_N), np.float64)[valid]
    one_hot = np.eye(C)[np.asarray(train.labels_N)[valid]]

    def loss(flat):
        return (
            -(one_hot * log_softmax(x @ flat[:-C].reshape(-1, C) + flat[-C:], axis=1)).sum(1).mean()
        )

    best = minimize(loss, np.zeros((x.shape[1] + 1) * C), method="L-BFGS-B")
    head = np.concatenate([np.ravel(found["head"]["kernel"]), found["head"]["bias"]])
    assert loss(np.float64(head)) == pytest.approx(best.fun, abs=1e-4)
    kernel = best.x[:-C].reshape(-1, C)  # up to a constant common to all classes
    difference = np.asarray(found["head"]["kernel"]) - kernel
    np.testing.assert_allclose(difference - difference.mean(1, keepdims=True), 0, atol=0.02)


@pytest.mark.slow
def test_one_step_of_one_batch_is_adamw_on_the_gradient_of_the_mean_loss():
    train, params = sentences(20), table()
    found = tuned(table_features, params, train, jax.random.key(0), 0.1, batch_size=20, epochs=1)
    start = {"model": params, "head": tuned(table_features, params, train, jax.random.key(0), 0.0,
                                            batch_size=20, epochs=1)["head"]}  # fmt: skip

    def loss(both):
        features = table_features(both["model"], train.tokens_NxT, train.lengths_N)
        logits = features @ both["head"]["kernel"] + both["head"]["bias"][None]
        losses = -jax.nn.log_softmax(logits)[jnp.arange(20), train.labels_N]
        return losses[train.valid_N].mean()

    gradient = jax.grad(loss)(start)
    # Adam's first step is the sign of the gradient, but for eps.
    expected = jax.tree.map(lambda x, g: x - 0.1 * g / (jnp.abs(g) + 1e-8), start, gradient)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), found, expected)


def parity(num_examples: int, seed: int) -> LabelledExamples:
    """Label 1 if the first two words agree."""
    tokens_NxT = jax.random.randint(
        jax.random.key(seed), (num_examples, T), 0, NUM_WORDS, jnp.int32
    )
    labels_N = (tokens_NxT[:, 0] == tokens_NxT[:, 1]).astype(jnp.int32)
    lengths_N = jnp.full(num_examples, T, jnp.int32)
    return LabelledExamples(tokens_NxT, lengths_N, labels_N, jnp.ones(num_examples, bool))


def first_params(model):
    tokens_NxT, lengths_N = jnp.zeros((1, T), jnp.int32), jnp.full(1, T, jnp.int32)
    return model.init(jax.random.key(1), tokens_NxT, lengths_N)["params"]


@pytest.fixture(scope="module")
def model_params():
    return first_params(MODEL)


def frozen_model_features(params, tokens_NxT, lengths_N, model=MODEL):
    return model_features(jax.lax.stop_gradient(params), tokens_NxT, lengths_N, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, *CAUSAL.values()], ids=["transformer", *CAUSAL])
def test_the_whole_model_solves_a_task_that_a_head_cannot(model):
    """Whether two words agree is no sum over single words, so the body must relate them."""
    train, test = parity(500, 0), parity(500, 1)
    share = float(test.labels_N.mean())
    accuracy = {}
    for features_fn in (model_features, frozen_model_features):
        of_model, how = partial(features_fn, model=model), {"batch_size": 50, "epochs": 100}
        found = tuned(of_model, first_params(model), train, jax.random.key(0), 1e-2, 10, **how)
        predicted_N = jax.jit(partial(predict, of_model))(found, test)
        accuracy[features_fn] = float((predicted_N == test.labels_N).mean())
    assert accuracy[model_features] > 0.97
    assert accuracy[frozen_model_features] < max(share, 1 - share) + 0.08


@pytest.mark.slow
def test_every_parameter_under_the_features_moves(model_params):
    train = sentences(40)
    found = tuned(model_features, model_params, train, jax.random.key(0), 1e-2, batch_size=8,
                  epochs=1)["model"]  # fmt: skip
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), model_params, found)
    assert not moved.pop("decoder_bias")  # the only one that no representation depends on
    assert all(jax.tree.leaves(moved))
    words = np.unique(train.tokens_NxT)
    changed_V = (found["token_embedding"] != model_params["token_embedding"]).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed_V), words)


def test_the_key_decides_and_nothing_else():
    train, params = sentences(40), table()
    how = {"batch_size": 8, "epochs": 2}
    runs = [tuned(table_features, params, train, jax.random.key(k), 0.1, **how) for k in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    same = jax.tree.map(lambda a, b: bool((a == b).any()), runs[0], runs[2])
    assert not any(jax.tree.leaves(same))


def test_an_epoch_shows_each_sentence_once():
    """A body that counts: each example's parameter moves at the step that uses it."""

    def counting(params, tokens_NxT, lengths_N):
        del lengths_N
        return params["seen"][tokens_NxT[:, 0]][:, None]

    numbered = LabelledExamples(jnp.arange(12, dtype=jnp.int32)[:, None], jnp.ones(12, jnp.int32),
                        jnp.arange(12, dtype=jnp.int32) % C, jnp.ones(12, bool))  # fmt: skip
    start = {"seen": jnp.ones(12)}
    for num_epochs, batch_size in ((1, 3), (1, 12), (2, 8)):
        settings = {"num_classes": C, "batch_size": batch_size, "epochs": num_epochs}
        sgd = optax.sgd(1.0)
        found = jax.jit(partial(finetune, counting, optimizer=sgd, **settings))(
            start, numbered, jax.random.key(3), rate=1e-3, warmup_steps=0
        )
        assert (found["model"]["seen"] != 1).all()


@pytest.mark.slow
def test_validation_chooses_the_rate_and_test_labels_play_no_part():
    train, validation, test = (sentences(200, seed) for seed in range(3))
    settings = {"num_classes": C, "batch_size": 20, "epochs": 3}
    rates = np.array([1e-6, 0.05, 30.0], np.float32)

    @jax.jit
    def correct(validation, test, rates_R):
        parts = (train, validation, test)
        key = jax.random.key(0)
        return finetuned_correct(
            table_features, table(), *parts, key, rates_R, 2, ADAMW, **settings
        )

    hits = [int((correct(validation, validation, rates[i : i + 1]) & validation.valid_N).sum())
            for i in range(3)]  # fmt: skip
    best = int(np.argmax(hits))
    assert sorted(hits)[1] < max(hits)
    found = correct(validation, test, rates)
    np.testing.assert_array_equal(found, correct(validation, test, rates[best : best + 1]))
    relabelled = LabelledExamples(
        test.tokens_NxT, test.lengths_N, (test.labels_N + 1) % C, test.valid_N
    )
    assert not np.any(found & correct(validation, relabelled, rates))
