"""BERT against plain numpy that reads the published tensor names, one unpadded text at a time."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxflat.models.huggingface import load_model
from jaxflat.training.objectives import masked_lm_loss
from tests.support.tiny_checkpoints import BERT, TOKENS_BxT, save, tensors_of

LENGTHS_B = np.array([7, 4, 1], np.int32)
ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: ACTIVATIONS["gelu_new"](x),
    "relu": lambda x: np.maximum(x, 0),
}


def published_logits(config: dict, tensors: dict[str, np.ndarray], tokens_T) -> np.ndarray:
    """Return logits_TxV in float64 by the equations of the paper and the head of its code."""
    p = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    activation = ACTIVATIONS[config["hidden_act"]]

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return centred / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attend(name, x_TxD):
        mixed = []
        heads = (
            np.split(linear(f"{name}.{part}", x_TxD), 2, 1) for part in ("query", "key", "value")
        )
        for q_TxE, k_TxE, v_TxE in zip(*heads, strict=True):
            weights_TxT = np.exp(q_TxE @ k_TxE.T / math.sqrt(q_TxE.shape[1]))
            mixed.append(weights_TxT / weights_TxT.sum(1, keepdims=True) @ v_TxE)
        return np.concatenate(mixed, 1)

    x = p["embeddings.word_embeddings.weight"][tokens_T]
    x = x + p["embeddings.position_embeddings.weight"][: len(tokens_T)]
    x = norm("embeddings.LayerNorm", x + p["embeddings.token_type_embeddings.weight"][0])
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        mixed = linear(f"{layer}.attention.output.dense", attend(f"{layer}.attention.self", x))
        x = norm(f"{layer}.attention.output.LayerNorm", x + mixed)
        inner = activation(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", inner))
    x = activation(linear("cls.predictions.transform.dense", x))
    features_TxD = norm("cls.predictions.transform.LayerNorm", x)
    decoder_VxD = p["embeddings.word_embeddings.weight"]
    return features_TxD @ decoder_VxD.T + p["cls.predictions.bias"]


def published(config: dict, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the logits of each text without its padding."""
    texts = zip(TOKENS_BxT, LENGTHS_B, strict=True)
    return [published_logits(config, tensors, tokens_T[:length]) for tokens_T, length in texts]


def plain(tensors):
    return tensors


def as_saved_for_pretraining(tensors):
    """Name the tensors as BertForPreTraining's files of old have them, second names included."""
    named = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in tensors.items()}
    named = {name.replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in named.items()}
    named = {name if name.startswith("cls") else f"bert.{name}": x for name, x in named.items()}
    dtype = named["cls.predictions.bias"].dtype
    return named | {
        "cls.predictions.decoder.weight": tensors["embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "cls.seq_relationship.weight": np.ones((2, 8), dtype),
        "cls.seq_relationship.bias": np.full(2, np.nan, dtype),
        "bert.pooler.dense.weight": np.ones((8, 8), dtype),
        "bert.pooler.dense.bias": np.ones(8, dtype),
        "bert.embeddings.position_ids": np.arange(7)[None],
    }


def with_second_names_only(tensors):
    seconds = {
        "cls.predictions.bias": "cls.predictions.decoder.bias",
        "embeddings.word_embeddings.weight": "cls.predictions.decoder.weight",
    }
    return {seconds.get(name, f"bert.{name}"): x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("naming", "changes", "dtype", "num_shards"),
    [
        (plain, {}, np.float32, 1),
        (as_saved_for_pretraining, {"hidden_act": "gelu_new"}, np.float16, 3),
        (with_second_names_only, {"hidden_act": "relu"}, ml_dtypes.bfloat16, 1),
        (plain, {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 0.1}, np.float32, 2),
    ],
)
def test_logits_are_the_published_ones_whatever_stands_at_padding(
    tmp_path, naming, changes, dtype, num_shards
):
    config = BERT | changes
    tensors = tensors_of(config, dtype)
    loaded = load_model(save(tmp_path, config, naming(tensors), num_shards))
    assert (loaded.bos_token, loaded.eos_token) == (None, None)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))
    logits_BxTxV, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, TOKENS_BxT, LENGTHS_B)
    for logits_TxV, expected_TxV in zip(logits_BxTxV, published(config, tensors), strict=True):
        np.testing.assert_allclose(logits_TxV[: len(expected_TxV)], expected_TxV, atol=1e-5, rtol=0)


@pytest.fixture
def float64_bert(tmp_path):
    """Give the model, and a function from the seed of tensors to its parameters in float64."""

    def params(seed):
        loaded = load_model(save(tmp_path, BERT, tensors_of(BERT, seed=seed)))
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), loaded.params)

    with jax.enable_x64(True):
        yield load_model(save(tmp_path, BERT, tensors_of(BERT))).model, params


@pytest.mark.slow
def test_asked_positions_have_the_logits_and_features_of_all(float64_bert):
    model, params = float64_bert
    positions_BxM = np.array([[6, 0], [3, 3], [0, 0]], np.int32)
    inputs = ({"params": params(1)}, TOKENS_BxT, LENGTHS_B)
    everywhere, everything = jax.jit(model.apply)(*inputs)
    asked, features = jax.jit(model.apply)(*inputs, positions_BxM)
    assert asked.dtype == np.float64
    take = lambda x: np.take_along_axis(np.asarray(x), positions_BxM[..., None], axis=1)  # noqa: E731
    np.testing.assert_allclose(asked, take(everywhere), atol=1e-12)
    np.testing.assert_allclose(
        features["features_BxMxD"], take(everything["features_BxMxD"]), atol=1e-12
    )


@pytest.mark.slow
def test_second_derivatives_of_the_masked_lm_loss_are_those_of_plain_numpy(float64_bert):
    model, params = float64_bert
    positions_BxM = np.array([[5, 2], [1, 3], [0, 0]], np.int32)
    targets_BxM = np.array([[4, 12], [0, 7], [2, 0]])
    batch = SimpleNamespace(
        inputs_BxT=TOKENS_BxT,
        lengths_B=LENGTHS_B,
        positions_BxM=positions_BxM,
        targets_BxMxV=np.eye(13)[targets_BxM],
        weights_BxM=np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]),
    )
    loss_fn = masked_lm_loss(model.apply)
    loss, direction = lambda p: loss_fn(p, batch)[0], params(2)

    @jax.jit
    def derivatives(p):
        """The loss, its slope and its curvature along the direction, by reverse over reverse."""
        along = lambda tree: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, direction)))  # noqa: E731
        slope = lambda p: along(jax.grad(loss)(p))  # noqa: E731
        return loss(p), slope(p), along(jax.grad(slope)(p))

    tensors, directions = tensors_of(BERT, seed=1), tensors_of(BERT, seed=2)

    def published_loss(step):
        moved = {k: x.astype(np.float64) + step * directions[k] for k, x in tensors.items()}
        total = 0.0
        for b, logits_TxV in enumerate(published(BERT, moved)):
            log_probs_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(1, keepdims=True))
            rows = log_probs_TxV[positions_BxM[b], targets_BxM[b]]
            total -= (rows * batch.weights_BxM[b]).sum()
        return total

    h = 1e-3
    below, here, above = (published_loss(step) for step in (-h, 0, h))
    expected = here, (above - below) / (2 * h), (above - 2 * here + below) / h**2
    np.testing.assert_allclose(derivatives(params(1)), expected, rtol=1e-4)


def test_texts_longer_than_the_positions_are_refused(float64_bert):
    model, params = float64_bert
    with pytest.raises(ValueError, match="14 tokens exceed the model's 7 positions"):
        model.apply({"params": params(1)}, np.tile(TOKENS_BxT, 2), LENGTHS_B)
