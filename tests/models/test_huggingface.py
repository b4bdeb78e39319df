"""GPT-2, OPT and BERT checkpoints: the reference's logits, and one line for any damage."""

import json
import math
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxflat.models.huggingface import load_causal, load_model
from jaxflat.models.huggingface.layouts import read_config, stored_shapes
from tests.support.tiny_checkpoints import (
    BERT,
    GPT2,
    OPT,
    TOKENS_BxT,
    one_line,
    refusal,
    safetensors,
    save,
    tensors_of,
)


def our_logits(folder: Path) -> np.ndarray:
    model, params, bos, eos = load_causal(folder)
    assert (bos, eos) == (3, 12)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    apply = jax.jit(partial(model.apply, method="next_logits"))
    logits_BxTxV, _ = apply({"params": params}, TOKENS_BxT)
    return np.asarray(logits_BxTxV)


class Published:
    """GPT-2 and OPT in float64 numpy, from their papers, reading the published tensor names."""

    def __init__(self, tensors: dict[str, np.ndarray], num_heads: int):
        self.tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
        self.num_heads = num_heads

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def conv1d(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        heads = (np.split(x, self.num_heads, axis=1) for x in (q, k, v))
        mixed = []
        for q_TxE, k_TxE, v_TxE in zip(*heads, strict=True):
            scores_TxT = q_TxE @ k_TxE.T / math.sqrt(q_TxE.shape[1])
            scores_TxT[np.triu_indices(len(q), 1)] = -np.inf
            weights_TxT = np.exp(scores_TxT - scores_TxT.max(1, keepdims=True))
            mixed.append(weights_TxT / weights_TxT.sum(1, keepdims=True) @ v_TxE)
        return np.concatenate(mixed, 1)

    def gpt2(self, tokens_T: np.ndarray) -> np.ndarray:
        x = self.tensors["wte.weight"][tokens_T] + self.tensors["wpe.weight"][: len(tokens_T)]
        for h in ("h.0", "h.1"):
            qkv = self.conv1d(f"{h}.attn.c_attn", self.norm(f"{h}.ln_1", x))
            x = x + self.conv1d(f"{h}.attn.c_proj", self.attend(*np.split(qkv, 3, axis=1)))
            y = self.conv1d(f"{h}.mlp.c_fc", self.norm(f"{h}.ln_2", x))
            y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + self.conv1d(f"{h}.mlp.c_proj", y)
        return self.norm("ln_f", x) @ self.tensors["wte.weight"].T

    def opt(self, tokens_T: np.ndarray) -> np.ndarray:
        positions_T = 2 + np.arange(len(tokens_T))
        x = self.tensors["embed_tokens.weight"][tokens_T]
        x = x + self.tensors["embed_positions.weight"][positions_T]
        for h in ("layers.0", "layers.1"):
            y = self.norm(f"{h}.self_attn_layer_norm", x)
            mixed = self.attend(*(self.linear(f"{h}.self_attn.{p}_proj", y) for p in "qkv"))
            x = x + self.linear(f"{h}.self_attn.out_proj", mixed)
            y = self.linear(f"{h}.fc1", self.norm(f"{h}.final_layer_norm", x))
            x = x + self.linear(f"{h}.fc2", np.maximum(y, 0))
        return self.norm("final_layer_norm", x) @ self.tensors["embed_tokens.weight"].T


def published_logits(config: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    published = Published(tensors, 2)
    forward = published.gpt2 if config["model_type"] == "gpt2" else published.opt
    return np.stack([forward(tokens_T) for tokens_T in TOKENS_BxT])


@pytest.mark.parametrize(
    ("config", "prefix", "head", "dtype", "num_shards"),
    [
        (GPT2, "", None, np.float32, 1),
        (GPT2, "transformer.", "wte.weight", ml_dtypes.bfloat16, 3),
        (OPT, "model.decoder.", "embed_tokens.weight", np.float32, 1),
        (OPT, "decoder.", None, np.float16, 2),
        (OPT, "", None, ml_dtypes.bfloat16, 1),
    ],
)
def test_logits_are_the_published_ones(tmp_path, config, prefix, head, dtype, num_shards):
    tensors = tensors_of(config, dtype)
    named = {f"{prefix}{name}": x for name, x in tensors.items()}
    if head:
        named["lm_head.weight"] = tensors[head]
    if config is GPT2:
        named[f"{prefix}h.0.attn.bias"] = np.tril(np.ones((1, 1, 7, 7), np.uint8))
        named[f"{prefix}h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
    logits_BxTxV = our_logits(save(tmp_path, config, named, num_shards))
    expected_BxTxV = published_logits(config, tensors)
    np.testing.assert_allclose(logits_BxTxV, expected_BxTxV, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    ("config", "activation"),
    [
        (GPT2, "gelu_new"),
        (GPT2, "relu"),
        (GPT2, "gelu_pytorch_tanh"),
        (OPT, "relu"),
        (OPT, "gelu_new"),
        (OPT, "gelu"),
        (BERT, "gelu"),
        (BERT, "gelu_new"),
        (BERT, "relu"),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, config, activation, num_shards):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    activation_key = "hidden_act" if config is BERT else "activation_function"
    keywords = {**config, activation_key: activation}
    config_class, model_class = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
    }[keywords.pop("model_type")]
    lengths_B = np.array([7, 4, 1] if config is BERT else [7, 7, 7], np.int32)
    real_BxT = np.arange(7)[None] < lengths_B[:, None]
    torch.manual_seed(0)
    theirs = model_class(config_class(**keywords)).eval()
    tokens_BxT = torch.tensor(TOKENS_BxT.astype(np.int64))
    mask_BxT = torch.tensor(real_BxT.astype(np.int64))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
        expected_BxTxV = theirs(tokens_BxT, attention_mask=mask_BxT).logits.numpy()
    theirs.save_pretrained(tmp_path, max_shard_size="5GB" if num_shards == 1 else "3KB")
    assert (tmp_path / "model.safetensors").exists() == (num_shards == 1)
    model, params, *_ = load_model(tmp_path)
    inputs, method = (
        ((TOKENS_BxT, lengths_B), None) if config is BERT else ((TOKENS_BxT,), "next_logits")
    )
    logits_BxTxV, _ = jax.jit(partial(model.apply, method=method))({"params": params}, *inputs)
    difference = np.abs(np.asarray(logits_BxTxV) - expected_BxTxV)[real_BxT].max()
    print(f"largest difference from transformers: {difference:.1e}")
    assert difference < 1e-4


REAL_GPT2 = {**GPT2, "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12}
REAL_GPT2 |= {"n_head": 12, "n_inner": None}
REAL_OPT = {**OPT, "vocab_size": 50272, "max_position_embeddings": 2048, "hidden_size": 768}
REAL_OPT |= {"num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072}
REAL_OPT |= {"word_embed_proj_dim": 768}
REAL_BERT = {**BERT, "vocab_size": 30522, "max_position_embeddings": 512, "hidden_size": 768}
REAL_BERT |= {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


@pytest.mark.parametrize(
    ("config", "stored", "unused"),
    [
        (REAL_GPT2, 124_439_808, 0),
        (REAL_OPT, 125_239_296, 2 * 768),
        (REAL_BERT, 109_514_298, 0),  # of BertForMaskedLM
    ],
)
def test_real_layouts_have_their_known_number_of_parameters(config, stored, unused):
    assert sum(math.prod(shape) for shape in stored_shapes(config).values()) == stored
    model, _ = read_config(config)
    inputs = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == stored - unused


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (GPT2, {"model_type": "llama"}, 'model_type="llama" must be one of gpt2, opt, bert'),
        (GPT2, {"model_type": ["gpt2"]}, 'model_type=["gpt2"] must be one of gpt2, opt, bert'),
        (GPT2, {"n_head": 3}, "n_embd=8 is not divisible by n_head=3"),
        (GPT2, {"n_layer": 2.0}, "n_layer=2.0 must be a positive integer"),
        (GPT2, {"n_layer": 10**9}, "tensor 'h.2.ln_1.weight' of shape (8,) is missing"),
        (GPT2, {"n_layer": 1}, "tensor 'h.1.attn.c_attn.bias' is not part of the model"),
        (GPT2, {"n_positions": 6}, "'wpe.weight' has shape (7, 8), by config.json (6, 8)"),
        (GPT2, {"n_inner": None}, "'h.0.mlp.c_fc.bias' has shape (12,), by config.json (32,)"),
        (GPT2, {"activation_function": "silu"}, 'activation_function="silu" must be one of'),
        (GPT2, {"tie_word_embeddings": False}, "tie_word_embeddings=false is not supported"),
        (GPT2, {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not supported"),
        (GPT2, {"scale_attn_weights": False}, "it must be true"),
        (GPT2, {"eos_token_id": 13}, "eos_token_id=13 must be null or a token, 0..12"),
        (OPT, {"do_layer_norm_before": False}, "do_layer_norm_before=false is not supported"),
        (OPT, {"word_embed_proj_dim": 4}, "word_embed_proj_dim=4 is not supported; it must be 8"),
        (OPT, {"enable_bias": False}, "enable_bias=false is not supported; it must be true"),
        (OPT, {"max_position_embeddings": 9}, "has shape (9, 8), by config.json (11, 8)"),
        (BERT, {"is_decoder": True}, "is_decoder=true is not supported; it must be false"),
        (BERT, {"tie_word_embeddings": False}, "tie_word_embeddings=false is not supported"),
        (
            BERT,
            {"position_embedding_type": "relative_key"},
            'position_embedding_type="relative_key" is not supported; it must be "absolute"',
        ),
        (BERT, {"hidden_act": "silu"}, 'hidden_act="silu" must be one of gelu_new'),
        (BERT, {"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 must be a positive number"),
        (BERT, {"type_vocab_size": None}, "type_vocab_size=null must be a positive integer"),
        (BERT, {"type_vocab_size": 1}, "has shape (2, 8), by config.json (1, 8)"),
        (BERT, {"intermediate_size": 8}, "dense.bias' has shape (12,), by config.json (8,)"),
        (BERT, {"num_hidden_layers": 1}, "is not part of the model"),
    ],
)
def test_a_model_that_is_not_covered_is_refused(tmp_path, config, changes, reason):
    folder = save(tmp_path, config, tensors_of(config))
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    message = refusal(folder)
    assert reason in message
    # The message names the weights' file if a tensor is at fault, otherwise config.json.
    file = "model.safetensors" if "tensor " in message else "config.json"
    assert message.startswith(f"{file}: ")


def test_a_next_token_model_is_none_of_bert(tmp_path):
    message = refusal(save(tmp_path, BERT, tensors_of(BERT)), load_causal)
    assert message == 'config.json: model_type="bert" must be one of gpt2, opt'


def test_missing_files_are_named(tmp_path, monkeypatch):
    assert refusal(tmp_path / "nowhere") == "config.json: No such file or directory"
    folder = save(tmp_path, OPT, tensors_of(OPT), num_shards=2)
    index = "model.safetensors.index.json"
    contents = (folder / index).read_text()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for wrong in ("[]", "{}", '{"weight_map": {"fc1": 1}}', '{"weight_map": {"fc1": "../x"}}', "{"):
        (folder / index).write_text(wrong)
        assert refusal(folder).startswith(f"{index}: ")
    (folder / index).write_text(contents.replace(first, second))
    assert refusal(folder) == f"{index}: tensor 'embed_tokens.weight' of shape (13, 8) is missing"
    (folder / index).write_text(contents.replace('"embed_tokens', '"other'))
    assert refusal(folder).startswith(f"{first}: 'embed_tokens.weight' is not listed by {index}")
    (folder / index).write_text(contents)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert refusal(folder).endswith("pip install 'jaxflat[huggingface]'")
    monkeypatch.undo()
    (folder / first).unlink()
    assert refusal(folder).startswith(f"{first}: no such file")
    (folder / index).unlink()
    assert refusal(folder).startswith("model.safetensors: no such file")


def test_doubtful_tensors_are_refused(tmp_path):
    tensors = tensors_of(GPT2)
    twice = tensors | {"transformer.ln_f.bias": tensors["ln_f.bias"]}
    assert "duplicates" in refusal(save(tmp_path, GPT2, twice))
    untied = tensors | {"lm_head.weight": tensors["wte.weight"] + 1}
    assert "'lm_head.weight' differs from" in refusal(save(tmp_path, GPT2, untied))
    tensors = tensors_of(BERT)
    bias = tensors["cls.predictions.bias"]
    untied = tensors | {"cls.predictions.decoder.bias": bias + 1}
    line = "'cls.predictions.decoder.bias' differs from 'cls.predictions.bias', to which it is tied"
    assert refusal(save(tmp_path, BERT, untied)) == f"model.safetensors: {line}"
    twice = tensors | {"bert.embeddings.LayerNorm.gamma": tensors["embeddings.LayerNorm.weight"]}
    assert "duplicates" in refusal(save(tmp_path, BERT, twice))
    encoder = {k: x for k, x in tensors.items() if not k.startswith("cls.")}
    missing = "tensor 'cls.predictions.bias' of shape (13,) is missing"
    assert refusal(save(tmp_path, BERT, encoder)) == f"model.safetensors: {missing}"
    file = save(tmp_path, GPT2, tensors_of(GPT2)) / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F\x7f2"', 1))
    assert "F?2" in refusal(tmp_path)


def change_byte(draw, data: bytes, start: int, stop: int) -> bytes:
    at = draw(st.integers(start, stop - 1))
    return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]


def damage_tensor(draw, kind: str, tensors: dict[str, np.ndarray]) -> bytes:
    """Return a well-formed file in which one tensor is not what it must be."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    if kind == "rename":
        tensors[draw(st.sampled_from(["", "x.", "h.9."])) + name + draw(st.text(min_size=1))] = (
            tensor
        )
    elif kind == "reshape":
        longer = np.concatenate([tensor, tensor])
        tensors[name] = draw(st.sampled_from([tensor[None], tensor[1:], longer]))
    elif kind == "dtype":
        tensors[name] = tensor.astype(draw(st.sampled_from([np.int32, np.float64, np.bool_])))
    elif kind == "not finite":
        at = draw(st.integers(0, tensor.size - 1))
        tensor.ravel()[at] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        tensors[name] = tensor
    else:
        assert kind == "remove"
    return safetensors.save(tensors)


OF_TENSORS = ("remove", "rename", "reshape", "dtype", "not finite")
OF_FILES = ("truncate", "header", "weights", "drop key", "wrong type", "config")


@st.composite
def damaged_checkpoints(draw, kind: str) -> tuple[dict, bytes, bytes]:
    """Draw (undamaged config, contents of config.json, contents of model.safetensors)."""
    config = draw(st.sampled_from([GPT2, OPT, BERT]))
    tensors = tensors_of(config)
    text, weights = json.dumps(config).encode(), safetensors.save(tensors)
    header_size = 8 + int.from_bytes(weights[:8], "little")
    key = draw(st.sampled_from(sorted(config)))
    if kind in OF_TENSORS:
        weights = damage_tensor(draw, kind, tensors)
    elif kind == "truncate":
        weights = weights[: draw(st.integers(0, len(weights) - 1))]
    elif kind == "header":
        weights = change_byte(draw, weights, 0, header_size)
    elif kind == "weights":
        weights = change_byte(draw, weights, header_size, len(weights))
    elif kind == "drop key":
        text = json.dumps({k: v for k, v in config.items() if k != key}).encode()
    elif kind == "wrong type":
        wrong = draw(st.sampled_from([None, "x", "8", -1, 0, 8.0, [], {}, [8], 10**30, math.nan]))
        text = json.dumps({**config, key: wrong}).encode()
    else:
        text = change_byte(draw, text, 0, len(text))[: draw(st.integers(0, len(text)))]
    return config, text, weights


@cache
def undamaged(model_type: str):
    config = {"gpt2": GPT2, "opt": OPT, "bert": BERT}[model_type]
    with tempfile.TemporaryDirectory() as folder:
        return load_model(save(Path(folder), config, tensors_of(config)))


@pytest.mark.parametrize("kind", [*OF_TENSORS, *OF_FILES])
@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_a_damaged_checkpoint_gives_one_line_or_the_same_model(kind, data):
    config, text, weights = data.draw(damaged_checkpoints(kind))
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "config.json").write_bytes(text)
        (folder / "model.safetensors").write_bytes(weights)
        try:
            model, params, _, _ = load_model(folder)
        except ValueError as error:
            line = one_line(error, folder)
            assert line.startswith(("config.json: ", "model.safetensors: "))
            return
    assert kind not in ("truncate", *OF_TENSORS)
    expected = undamaged(config["model_type"])
    # No tensor shows these.
    unseen = {"num_heads": 2} | ({"epsilon": 1e-12} if config is BERT else {})
    assert model.clone(**unseen) == expected.model
    changed = jax.tree.map(lambda x, y: int((x != y).sum()), params, expected.params)
    assert sum(jax.tree.leaves(changed)) <= (kind == "weights")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
