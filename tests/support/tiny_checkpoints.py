"""Small checkpoints of each family, with random parameters, and the error of a damaged one."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxflat.models.huggingface import load_model
from jaxflat.models.huggingface.layouts import stored_shapes

safetensors = pytest.importorskip("safetensors.numpy")

GPT2 = {
    "model_type": "gpt2",
    **{"vocab_size": 13, "n_positions": 7, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12},
    **{"bos_token_id": 3, "eos_token_id": 12, "activation_function": "gelu_new"},
}
OPT = {
    "model_type": "opt",
    **{"vocab_size": 13, "max_position_embeddings": 7, "hidden_size": 8, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "ffn_dim": 12, "word_embed_proj_dim": 8},
    **{"do_layer_norm_before": True, "bos_token_id": 3, "eos_token_id": 12},
}
BERT = {
    "model_type": "bert",
    **{"vocab_size": 13, "max_position_embeddings": 7, "hidden_size": 8, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "intermediate_size": 12, "type_vocab_size": 2},
    **{"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"},
    **{"is_decoder": False, "tie_word_embeddings": True, "pad_token_id": 0},
}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on"]
CLS, SEP = 1, 2
TOKENS_BxT = np.random.default_rng(0).integers(0, 13, (3, 7)).astype(np.int32)


def tensors_of(config: dict, dtype=np.float32, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(0.2, 0.5, s).astype(dtype) for k, s in stored_shapes(config).items()}


def save(folder: Path, config: dict, tensors: dict[str, np.ndarray], num_shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        safetensors.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def write_tokenizer(folder: Path, words=WORDS) -> Path:
    """Write a tokenizer.json: words between spaces, "~" nothing, marks around every text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="the"))
    tokenizer.normalizer = tokenizers.normalizers.Replace("~", "")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    marks = ("[SEP]", SEP), ("[CLS]", CLS)
    tokenizer.post_processor = tokenizers.processors.BertProcessing(*marks)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def one_line(error: ValueError, folder: Path) -> str:
    """Return the error's only line, from its file's name on."""
    assert type(error) is ValueError
    assert str(error).isprintable()
    assert str(error).startswith(f"{folder}/")
    return str(error).removeprefix(f"{folder}/")


def refusal(folder: Path, load=load_model) -> str:
    """Return the one-line error about a folder, which starts with the file's name."""
    with pytest.raises(ValueError, match=r".") as caught:
        load(folder)
    return one_line(caught.value, folder)
