"""A CausalTransformer as a local Hugging Face folder that `load_causal` and transformers read."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jaxflat.models.causal import CausalTransformer
from jaxflat.models.huggingface_config import ACTIVATIONS
from jaxflat.models.huggingface_layout import GPT2, places


def save_causal(
    folder: Path,
    model: CausalTransformer,
    params: Mapping[str, Any],
    bos_token: int | None,
    eos_token: int | None,
    other_files: Mapping[str, str] | None = None,
) -> Path:
    """Write a GPT-2 checkpoint, float32 parameters as they are, and return its folder.

    The folder appears with all its files, `other_files` (contents by name) among them, or not at
    all. Raises ValueError, one line, where it is there already or safetensors is missing.
    """
    try:
        from safetensors.numpy import save
    except ImportError:
        extra = "pip install 'jaxflat[huggingface]'"
        raise ValueError(f"{folder}: to be written it takes safetensors: {extra}") from None
    tensors = save(_tensors(model, params), metadata={"format": "pt"})
    config = json.dumps(_config(model, bos_token, eos_token), indent=1) + "\n"
    with _appearing(folder) as unfinished:
        _write(unfinished / "model.safetensors", tensors)
        for name, text in {"config.json": config, **(other_files or {})}.items():
            _write(unfinished / name, text.encode())
    return folder


def _config(
    model: CausalTransformer, bos_token: int | None, eos_token: int | None
) -> dict[str, Any]:
    values = (model.num_tokens, model.max_length, model.width)
    values += (model.num_layers, model.num_heads, model.mlp_width)
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **dict(zip(GPT2.sizes, values, strict=True)),
        "activation_function": activations[model.activation],
        **GPT2.supported,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        "bos_token_id": bos_token,
        "eos_token_id": eos_token,
    }


def _tensors(model: CausalTransformer, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return every tensor under its stored name; the tied lm_head is left out, as usual."""
    leaves = flatten_dict(params, sep="/")
    tensors = {}
    for name, place in places(model, GPT2):
        leaf = np.asarray(leaves[place.leaf], np.float32)
        value = leaf if place.layer is None else leaf[place.layer]
        tensors[f"transformer.{name}"] = np.ascontiguousarray(value.reshape(place.shape))
    return tensors


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to fill, which takes the name of `folder` once all went well."""
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    if folder.exists():
        raise ValueError(f"{folder}: it is there already")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, folder)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    """Write a file and push it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
