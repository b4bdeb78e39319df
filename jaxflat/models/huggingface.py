"""GPT-2, OPT and BERT from a local Hugging Face folder: config.json and safetensors.

Whatever is wrong with a folder becomes a ValueError of one line that names the file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxflat.models.bert import Bert
from jaxflat.models.causal import CausalTransformer
from jaxflat.models.huggingface_config import CAUSAL, FAMILIES, read_config, special_token
from jaxflat.models.huggingface_files import (
    Stored,
    naming,
    open_tensors,
    read_finite,
    read_headers,
    weight_files,
)
from jaxflat.models.huggingface_layout import Layout, Place, places


class Pretrained(NamedTuple):
    """A model, its float32 parameters, and the tokens that begin and end a text, if any."""

    model: CausalTransformer | Bert
    params: dict[str, Any]
    bos_token: int | None
    eos_token: int | None


def load_model(folder: Path, families: Mapping[str, Layout] = FAMILIES) -> Pretrained:
    """Read a GPT-2, OPT or BERT checkpoint of a local Hugging Face folder.

    A BERT has to come with its head for masked tokens; its pooler and the head for sentence
    pairs are left out. Raises ValueError, one line, where a file is missing or damaged, or
    describes or holds anything but a model of these families.
    """
    model, layout, tokens = _read_description(folder, families)
    weights, files = weight_files(folder)
    stored = read_headers(files, layout)
    expected = _match(weights, stored, model, layout)
    return Pretrained(model, _read_tensors(stored, expected, model, layout), *tokens)


def read_model(folder: Path) -> CausalTransformer | Bert:
    """Return the model that a folder's config.json describes, as load_model does; reads no more."""
    return _read_description(folder, FAMILIES)[0]


def load_causal(folder: Path) -> Pretrained:
    """Read a checkpoint as load_model does, of a family that predicts the next token."""
    return load_model(folder, CAUSAL)


def _read_description(
    folder: Path, families: Mapping[str, Layout]
) -> tuple[CausalTransformer | Bert, Layout, list[int | None]]:
    """Return what config.json says: the model, its layout, the tokens that begin and end a text."""
    with naming(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model, layout = read_config(config, families)
        tokens = [special_token(config, f"{k}_token_id", model.num_tokens) for k in ("bos", "eos")]
    return model, layout, tokens


def _match(
    weights: Path, stored: dict[str, Stored], model: CausalTransformer | Bert, layout: Layout
) -> dict[str, Place]:
    """Return the place of every stored tensor; raise ValueError unless all fit the model."""
    expected: dict[str, Place] = {}
    with naming(weights):
        for name, place in places(model, layout):
            if name not in stored:
                raise ValueError(f"tensor {name!r} of shape {place.shape} is missing")
            expected[name] = place
    for second, first in layout.tied.items():
        if second in stored:
            expected[second] = expected[first]._replace(leaf=second)
    for short_name, (file, name, shape) in stored.items():
        with naming(file):
            if short_name not in expected:
                raise ValueError(f"tensor {name!r} is no part of the model in config.json")
            right = expected[short_name].shape
            if shape != right:
                raise ValueError(f"tensor {name!r} is of shape {shape}, by config.json {right}")
    return expected


def _read_tensors(
    stored: dict[str, Stored],
    expected: dict[str, Place],
    model: CausalTransformer | Bert,
    layout: Layout,
) -> dict[str, Any]:
    """Return the parameters, read one tensor at a time into the stacked arrays."""
    leaves = _empty_leaves(model)
    for second in stored.keys() & layout.tied.keys():
        leaves[second] = np.empty(stored[second].shape, np.float32)
    for file in {tensor.file: None for tensor in stored.values()}:
        with open_tensors(file) as tensors:
            for short_name, (its_file, name, _) in stored.items():
                if its_file == file:
                    _put(leaves, expected[short_name], read_finite(name, tensors), layout)
    for second in stored.keys() & layout.tied.keys():
        first = layout.tied[second]
        if not np.array_equal(leaves.pop(second), leaves[expected[first].leaf]):
            with naming(stored[second].file):
                name, first_name = stored[second].name, stored[first].name
                raise ValueError(f"{name!r} differs from {first_name!r}, to which it is tied")
    return jax.tree.map(jnp.asarray, unflatten_dict(leaves, sep="/"))


def _empty_leaves(model: CausalTransformer | Bert) -> dict[str, Any]:
    """Return an array for each parameter, by its path."""
    tokens_1x1, lengths_1 = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    inputs = (tokens_1x1, lengths_1) if isinstance(model, Bert) else (tokens_1x1,)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    shapes: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: np.empty(leaf.shape, np.float32) for path, leaf in shapes.items()}


def _put(leaves: dict[str, np.ndarray], place: Place, value: np.ndarray, layout: Layout) -> None:
    if layout.transposed and place.leaf.endswith("kernel"):
        value = value.T
    if place.leaf == "position_embedding":
        value = value[layout.unused_positions :]
    target = leaves[place.leaf]
    if place.layer is not None:
        target = target[place.layer]
    if place.part is not None:
        target = target[..., place.part, :]
    target[...] = value.reshape(target.shape)
