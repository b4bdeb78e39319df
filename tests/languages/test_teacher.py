"""Trained teachers: near the best possible loss, reproducible, loaded like downloaded ones."""

import functools
import itertools
import json
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat.console import Display
from jaxflat.datasets.tokenizer import encode, load_tokenizer, train_tokenizer
from jaxflat.distributed import preemption
from jaxflat.languages.generated import teacher
from jaxflat.models.causal import CausalTransformer
from jaxflat.models.huggingface import folder as huggingface_folder
from jaxflat.models.huggingface import load_causal, save_causal
from jaxflat.storage.files import sha256
from jaxflat.training.objectives import causal_lm_loss, causal_losses

pytestmark = pytest.mark.slow

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")


def next_logits(model):
    return functools.partial(model.apply, method="next_logits")


# A chain over five words of one letter, state w after word w; the last column ends the text.
WORDS = "abcde"
START_V = np.array([0.5, 0.2, 0.1, 0.1, 0.1])
NEXT_VxV1 = np.array(
    [
        [0.0, 0.7, 0.1, 0.1, 0.0, 0.1],
        [0.1, 0.0, 0.6, 0.1, 0.0, 0.2],
        [0.2, 0.2, 0.2, 0.2, 0.1, 0.1],
        [0.0, 0.0, 0.0, 0.3, 0.6, 0.1],
        [0.8, 0.0, 0.0, 0.0, 0.0, 0.2],
    ]
)
LENGTH = 8
SETTINGS = {
    **{"vocabulary": 256 + len(WORDS), "width": 16, "num_layers": 1, "head_size": 8},
    **{"length": LENGTH, "steps": 500, "batch_size": 64, "learning_rate": 1e-2},
    **{"warmup_steps": 20, "weight_decay": 0.0},
}


def chain_texts(num_texts: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(num_texts):
        words = [rng.choice(len(WORDS), p=START_V)]
        while (word := rng.choice(len(WORDS) + 1, p=NEXT_VxV1[words[-1]])) < len(WORDS):
            words.append(word)
        texts.append(" ".join(WORDS[word] for word in words))
    return texts


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def chain_entropy() -> float:
    """Return the smallest possible nats per token of texts cut to LENGTH tokens, ends included."""
    alive_V, nats, num_tokens = START_V, entropy(START_V), 1.0
    for _ in range(LENGTH - 1):
        nats += alive_V @ entropy(NEXT_VxV1)
        num_tokens += alive_V.sum()
        alive_V = alive_V @ NEXT_VxV1[:, :-1]
    return float(nats / num_tokens)


def train(folder, texts, seed=0, **changes):
    settings = FrozenConfigDict(ConfigDict({**SETTINGS, **changes}))
    return teacher.train_teacher(folder, texts, settings, seed, Display(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("teachers") / "chain", chain_texts(3000))


def test_validation_loss_is_near_the_entropy_of_the_texts(folder):
    record = json.loads((folder / "teacher.json").read_text())
    least, found, sem = chain_entropy(), record["validation_loss"], record["validation_loss_sem"]
    print(f"entropy {least:.4f}, validation loss {found:.4f} +- {sem:.4f}")
    assert 0 < sem < 0.1
    assert abs(found - least) < 0.02 + 3 * sem
    assert record["settings"] == SETTINGS
    assert record["seed"] == 0
    assert (record["training_texts"], record["validation_texts"]) == (2850, 150)


def test_its_conditionals_are_those_of_the_chain(folder):
    model, params, bos, eos = load_causal(folder)
    assert (model.num_tokens, bos, eos) == (262, 261, 261)
    encoded = encode(load_tokenizer(folder), [*WORDS, *chain_texts(400, seed=1)])
    word_ids, encoded = [ids[0] for ids in encoded[: len(WORDS)]], encoded[len(WORDS) :]
    batch = teacher.mark_texts(encoded, bos, LENGTH)
    logits_BxTxV, _ = jax.jit(next_logits(model))({"params": params}, batch.tokens_BxT[:, :-1])
    log_probs_BxTxW = jax.nn.log_softmax(logits_BxTxV)[..., np.array([*word_ids, eos])]
    place_of = {token: place for place, token in enumerate(word_ids)}
    divergences = []
    for tokens_T, length, log_probs_TxW in zip(*batch, log_probs_BxTxW, strict=True):
        for t in range(length - 1):
            p_W = NEXT_VxV1[place_of[int(tokens_T[t])]] if t else np.append(START_V, 0)
            divergences.append(-entropy(p_W) - p_W @ np.asarray(log_probs_TxW[t]))
    print(f"excess loss {np.mean(divergences):.4f}")
    assert -1e-6 < np.mean(divergences) < 0.02


def test_its_tokenizer_encodes_as_the_trained_one_and_knows_the_mark(folder):
    texts = chain_texts(3000)
    tokenizer = load_tokenizer(folder)
    assert encode(tokenizer, texts) == encode(train_tokenizer(texts, 261), texts)
    assert tokenizer.token_to_id("<|endoftext|>") == 261
    assert tokenizer.decode([*encode(tokenizer, ["a b"])[0], 261]).strip() == "a b"


def test_transformers_reads_the_tokenizer_as_it_is(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The Cat, 10 a-b Café"
    assert (
        theirs(text, add_special_tokens=False).input_ids
        == encode(load_tokenizer(folder), [text])[0]
    )
    assert theirs.bos_token_id == theirs.eos_token_id == 261


def digests(folder) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_the_same_bytes_every_time(tmp_path):
    texts = chain_texts(60)
    small = {"steps": 3, "batch_size": 8}
    one, two = (digests(train(tmp_path / name, texts, **small)) for name in ("one", "two"))
    assert one == two
    assert {"config.json", "model.safetensors", "tokenizer.json", "teacher.json"} < one.keys()
    other = digests(train(tmp_path / "other", texts, seed=1, **small))
    assert other["model.safetensors"] != one["model.safetensors"]
    assert other["tokenizer.json"] == one["tokenizer.json"]


def test_the_best_parameters_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list(WORDS), 6)) for _ in range(40)]
    folder = train(tmp_path / "teacher", texts, seed=3, steps=250, batch_size=32)
    record = json.loads((folder / "teacher.json").read_text())
    assert record["step"] < 250
    model, params, mark, _ = load_causal(folder)
    split_key, *_ = jax.random.split(jax.random.key(3), 3)
    marked = teacher.mark_texts(encode(load_tokenizer(folder), texts), mark, LENGTH)
    training, validation = teacher.split_texts(marked, split_key)
    both = np.concatenate([training.tokens_BxT, validation.tokens_BxT])
    assert sorted(map(tuple, both)) == sorted(map(tuple, marked.tokens_BxT))
    losses_N, weights_N = causal_losses(next_logits(model), params, validation)
    assert len(losses_N) == record["validation_texts"] == 2
    np.testing.assert_allclose(
        record["validation_loss"], losses_N.sum() / weights_N.sum(), rtol=1e-5
    )


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_marks_and_cutting(length):
    tokens_NxT, lengths_N = teacher.mark_texts([[1, 2], [3, 4, 5, 6, 7]], 9, length)
    for tokens_T, size, ids in zip(tokens_NxT, lengths_N, [[1, 2], [3, 4, 5, 6, 7]], strict=True):
        expected = [9, *ids, 9][: length + 1]
        assert tokens_T[:size].tolist() == expected
        assert len(tokens_T) == length + 1


def test_causal_lm_loss_is_the_sum_over_real_tokens():
    rng = np.random.default_rng(0)
    lengths_B = np.array([6, 2, 1, 4], np.int32)
    tokens_BxT = rng.integers(0, 7, (4, 6)).astype(np.int32)
    logits_BxSxV = rng.normal(0, 3, (4, 5, 7)).astype(np.float32)
    expected, count = 0.0, 0
    for b, t in itertools.product(range(4), range(1, 6)):
        if t < lengths_B[b]:
            row_V = logits_BxSxV[b, t - 1].astype(np.float64)
            expected += np.log(np.exp(row_V).sum()) - row_V[tokens_BxT[b, t]]
            count += 1

    def loss(tokens_BxT, logits_BxSxV):
        def apply_fn(variables, inputs_BxS):
            np.testing.assert_array_equal(inputs_BxS, tokens_BxT[:, :-1])
            return variables["params"], None

        batch = SimpleNamespace(tokens_BxT=jnp.asarray(tokens_BxT), lengths_B=lengths_B)
        return causal_lm_loss(apply_fn)(jnp.asarray(logits_BxSxV), batch)

    loss_sum, weight = loss(tokens_BxT, logits_BxSxV)
    np.testing.assert_allclose(loss_sum, expected, rtol=1e-6)
    assert weight == count == lengths_B.sum() - 4
    pads_BxT = np.arange(6) >= lengths_B[:, None]
    changed = np.where(pads_BxT, 0, tokens_BxT)
    noisy = np.where(pads_BxT[:, 1:, None], np.float32(1e4), logits_BxSxV)
    assert loss(changed, noisy) == (loss_sum, weight)


MODEL = CausalTransformer(13, 7, 8, 3, 2, 12, "gelu")


@functools.cache
def random_params():
    words_1x1, length_1 = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    params = jax.jit(MODEL.init)(jax.random.key(0), words_1x1, length_1)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), params)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    params = random_params()
    folder = save_causal(tmp_path / "new" / "teacher", MODEL, params, 3, 12)
    model, loaded, bos, eos = load_causal(folder)
    assert (model, bos, eos) == (MODEL, 3, 12)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(ValueError, match="already exists"):
        save_causal(folder, MODEL, params, 3, 12)
    jax.tree.map(np.testing.assert_array_equal, load_causal(folder).params, params)


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "swiglu"},
        {"norm": "rms_norm"},
        {"epsilon": 1e-6},
        {"norm_first": False},
        {"rotary_base": 1e4},
        {"use_bias": False},
    ],
)
def test_a_model_that_gpt2_cannot_describe_is_not_saved(tmp_path, change):
    folder = tmp_path / "teacher"
    with pytest.raises(ValueError, match=f"^{folder}: GPT-2 has no other norms"):
        save_causal(folder, MODEL.clone(**change), {}, 3, 12)
    assert not list(tmp_path.iterdir())


def test_transformers_computes_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = random_params()
    save_causal(tmp_path / "teacher", MODEL, params, 3, 12)
    tokens_BxT = np.random.default_rng(1).integers(0, 13, (4, 7))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        expected_BxTxV = theirs.eval()(torch.tensor(tokens_BxT)).logits.numpy()
    logits_BxTxV, _ = next_logits(MODEL)({"params": params}, jnp.asarray(tokens_BxT, jnp.int32))
    difference = np.abs(logits_BxTxV - expected_BxTxV).max()
    print(f"largest difference from transformers: {difference:.1e}")
    assert difference < 1e-4


# A save calls fsync once for each of its three files.
@pytest.mark.parametrize(
    ("function", "num_calls"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("rename", 0)]
)
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, function, num_calls):
    params, calls = random_params(), itertools.count()

    def interrupted(*_):
        if next(calls) == num_calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_folder.os, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_causal(tmp_path / "teacher", MODEL, params, 3, 12, {"more.json": "{}"})
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert save_causal(tmp_path / "teacher", MODEL, params, 3, 12).is_dir()


def test_a_signal_stops_training_and_leaves_nothing(tmp_path, monkeypatch):
    display = Display(1)
    monkeypatch.setattr(
        display, "advance_stage", lambda *_: preemption._received.append(signal.SIGTERM)
    )
    monkeypatch.setattr(preemption, "_received", [])
    monkeypatch.setattr(teacher, "STEPS_PER_CALL", 2)
    settings = FrozenConfigDict(ConfigDict({**SETTINGS, "steps": 6, "batch_size": 8}))
    with pytest.raises(preemption.Preempted, match="SIGTERM"):
        teacher.train_teacher(tmp_path / "teacher", chain_texts(40), settings, 0, display)
    assert len(preemption._received) == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_trained_is_one_line(tmp_path, folder):
    with pytest.raises(ValueError, match="a teacher needs at least 20 texts; got 19"):
        train(tmp_path / "teacher", chain_texts(19))
    with pytest.raises(ValueError, match="already exists"):
        train(folder, chain_texts(40))
    with pytest.raises(FloatingPointError, match="loss is nan at step 3"):
        train(tmp_path / "teacher", chain_texts(40), steps=3, learning_rate=float("nan"))
    assert not list(tmp_path.iterdir())
