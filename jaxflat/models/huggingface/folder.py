"""Load and save local Hugging Face folders: config.json and weights in safetensors files.

Every problem with a file raises ValueError, one line that starts with the file's path.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxflat.models.bert import Bert
from jaxflat.models.causal import CausalTransformer
from jaxflat.models.huggingface.layouts import (
    ACTIVATIONS,
    CAUSAL,
    FAMILIES,
    GPT2,
    Layout,
    Place,
    places,
    read_config,
    special_token,
)

DTYPES = ("F32", "F16", "BF16")


class Pretrained(NamedTuple):
    """A model, its float32 parameters, and the tokens before and after a text, if any."""

    model: CausalTransformer | Bert
    params: dict[str, Any]
    bos_token: int | None
    eos_token: int | None


class Stored(NamedTuple):
    """A tensor as described by the header of its file."""

    file: Path
    name: str
    shape: tuple[int, ...]


def load_model(folder: Path, families: Mapping[str, Layout] = FAMILIES) -> Pretrained:
    """Load a GPT-2, OPT or BERT checkpoint from a local Hugging Face folder.

    A BERT must include its masked-token head; its pooler and sentence-pair head are ignored.
    families maps each accepted model_type to its layout. Raises ValueError, one line, if a file
    is missing or damaged, or describes or contains anything but a model of these families.
    """
    model, layout, tokens = _read_description(folder, families)
    weights, files = _find_weight_files(folder)
    stored = _read_headers(files, layout)
    expected = _match_to_model(weights, stored, model, layout)
    return Pretrained(model, _read_params(stored, expected, model, layout), *tokens)


def read_model(folder: Path) -> CausalTransformer | Bert:
    """Return the model that a folder's config.json describes; raises ValueError as load_model."""
    return _read_description(folder, FAMILIES)[0]


def load_causal(folder: Path) -> Pretrained:
    """Load a checkpoint as load_model does, but accept only GPT-2 and OPT (next-token models)."""
    return load_model(folder, CAUSAL)


def save_causal(
    folder: Path,
    model: CausalTransformer,
    params: Mapping[str, Any],
    bos_token: int | None,
    eos_token: int | None,
    other_files: Mapping[str, str] | None = None,
) -> Path:
    """Save a GPT-2 checkpoint with unchanged float32 parameters, and return its folder.

    The folder appears complete, with `other_files` (contents by name), or not at all.
    Raises ValueError, one line, if the folder exists, if safetensors is not installed, or if the
    model differs from GPT-2 in more than its sizes and activation.
    """
    try:
        from safetensors.numpy import save
    except ImportError:
        extra = "pip install 'jaxflat[huggingface]'"
        raise ValueError(f"{folder}: saving needs the package safetensors: {extra}") from None
    with _named_in_errors(folder):
        config = json.dumps(_describe(model, bos_token, eos_token), indent=1) + "\n"
    tensors = save(_tensors_to_store(model, params), metadata={"format": "pt"})
    with _atomic_folder(folder) as unfinished:
        _write(unfinished / "model.safetensors", tensors)
        for name, text in {"config.json": config, **(other_files or {})}.items():
            _write(unfinished / name, text.encode())
    return folder


def _read_description(
    folder: Path, families: Mapping[str, Layout]
) -> tuple[CausalTransformer | Bert, Layout, list[int | None]]:
    """Return the model in config.json, its layout, and the tokens before and after a text."""
    with _named_in_errors(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model, layout = read_config(config, families)
        tokens = [special_token(config, f"{k}_token_id", model.num_tokens) for k in ("bos", "eos")]
    return model, layout, tokens


def _match_to_model(
    weights: Path, stored: dict[str, Stored], model: CausalTransformer | Bert, layout: Layout
) -> dict[str, Place]:
    """Return each stored tensor's place; raise ValueError unless names and shapes match."""
    expected: dict[str, Place] = {}
    with _named_in_errors(weights):
        for name, place in places(model, layout):
            if name not in stored:
                raise ValueError(f"tensor {name!r} of shape {place.shape} is missing")
            expected[name] = place
    for second, first in layout.tied.items():
        if second in stored:
            expected[second] = expected[first]._replace(leaf=second)
    for short_name, (file, name, shape) in stored.items():
        with _named_in_errors(file):
            if short_name not in expected:
                raise ValueError(f"tensor {name!r} is not part of the model in config.json")
            right = expected[short_name].shape
            if shape != right:
                raise ValueError(f"tensor {name!r} has shape {shape}, by config.json {right}")
    return expected


def _read_params(
    stored: dict[str, Stored],
    expected: dict[str, Place],
    model: CausalTransformer | Bert,
    layout: Layout,
) -> dict[str, Any]:
    """Return the parameters; each tensor is read into its place in the stacked arrays."""
    leaves = _empty_leaves(model)
    for second in stored.keys() & layout.tied.keys():
        leaves[second] = np.empty(stored[second].shape, np.float32)
    for file in {tensor.file: None for tensor in stored.values()}:
        with _open_tensors(file) as tensors:
            for short_name, (its_file, name, _) in stored.items():
                if its_file == file:
                    _copy_to_place(
                        leaves, expected[short_name], _read_finite(name, tensors), layout
                    )
    for second in stored.keys() & layout.tied.keys():
        first = layout.tied[second]
        if not np.array_equal(leaves.pop(second), leaves[expected[first].leaf]):
            with _named_in_errors(stored[second].file):
                name, first_name = stored[second].name, stored[first].name
                raise ValueError(f"{name!r} differs from {first_name!r}, to which it is tied")
    return jax.tree.map(jnp.asarray, unflatten_dict(leaves, sep="/"))


def _empty_leaves(model: CausalTransformer | Bert) -> dict[str, Any]:
    """Return an uninitialised array for each parameter, by its path."""
    inputs: tuple[jax.Array, ...] = (jnp.zeros((1, 1), jnp.int32),)
    initialize = partial(model.init, method="next_logits")
    if isinstance(model, Bert):
        inputs, initialize = (*inputs, jnp.ones(1, jnp.int32)), model.init
    params = jax.eval_shape(initialize, jax.random.key(0), *inputs)["params"]
    shapes: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: np.empty(leaf.shape, np.float32) for path, leaf in shapes.items()}


def _copy_to_place(
    leaves: dict[str, np.ndarray], place: Place, value: np.ndarray, layout: Layout
) -> None:
    """Copy a stored tensor to its place."""
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


def _find_weight_files(folder: Path) -> tuple[Path, dict[Path, set[str] | None]]:
    """Return the file that lists the tensors, and the tensors of each file (None: any)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return single, {single: None}
    files: dict[Path, set[str] | None] = {}
    with _named_in_errors(index):
        contents = json.loads(index.read_text("utf-8"))
        weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map must map each tensor to its file")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise ValueError(f"weight_map[{name!r}] must name a file in the same folder")
            files[folder / file] = (files.get(folder / file) or set()) | {name}
    return index, files


def _read_headers(files: dict[Path, set[str] | None], layout: Layout) -> dict[str, Stored]:
    """Return the tensors of all files, by their names in the layout, without ignored ones.

    A tied tensor that is stored only under its second name is returned under its first.
    """
    stored: dict[str, Stored] = {}
    for file, names in files.items():
        with _open_tensors(file) as tensors:
            for name in sorted(tensors.keys()):
                if names is not None and name not in names:
                    raise ValueError(f"{name!r} is not listed by model.safetensors.index.json")
                short_name = name
                for pattern, replacement in layout.renamed:
                    short_name = re.sub(pattern, replacement, short_name)
                if re.fullmatch(layout.ignored, short_name):
                    continue
                header = tensors.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    dtypes = ", ".join(DTYPES)
                    raise ValueError(f"{name!r} is {header.get_dtype()}, must be one of {dtypes}")
                if short_name in stored:
                    raise ValueError(f"{name!r} duplicates {stored[short_name].name!r}")
                stored[short_name] = Stored(file, name, tuple(header.get_shape()))
    for second, first in layout.tied.items():
        if second in stored and first not in stored:
            stored[first] = stored.pop(second)
    return stored


@contextmanager
def _open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file whose tensors are read as numpy arrays."""
    with _named_in_errors(file):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            extra = "pip install 'jaxflat[huggingface]'"
            raise ValueError(f"loading needs the package safetensors: {extra}") from None
        if not file.is_file():
            raise ValueError("no such file; weights must be saved as safetensors")
        try:
            with safe_open(file, framework="numpy") as tensors:
                yield tensors
        except SafetensorError as error:
            raise ValueError(f"not a complete safetensors file: {error}") from None


def _read_finite(name: str, tensors: Any) -> np.ndarray:
    """Return a tensor of an open file as float32; raise ValueError if it is not all finite."""
    with np.errstate(invalid="ignore"):
        value = tensors.get_tensor(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"tensor {name!r} contains NaN or infinity")
    return value


@contextmanager
def _named_in_errors(file: Path) -> Iterator[None]:
    """Turn errors about a file into a one-line ValueError that starts with the file's path."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(reason.split()))
        raise ValueError(f"{file}: {printable}") from None


def _describe(
    model: CausalTransformer, bos_token: int | None, eos_token: int | None
) -> dict[str, Any]:
    """Return the config.json of a model; raise ValueError if GPT-2's keys cannot describe it."""
    sizes = (model.num_tokens, model.max_length, model.width)
    sizes += (model.num_layers, model.num_heads, model.mlp_width)
    activations = {ours: stored for stored, ours in reversed(ACTIVATIONS.items())}
    if model.activation not in activations or model != CausalTransformer(*sizes, model.activation):
        raise ValueError("GPT-2 has no other norms, positions, gates or biases than its own")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **dict(zip(GPT2.sizes, sizes, strict=True)),
        "activation_function": activations[model.activation],
        **GPT2.supported,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        "bos_token_id": bos_token,
        "eos_token_id": eos_token,
    }


def _tensors_to_store(model: CausalTransformer, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return each tensor by its stored name; the tied lm_head is omitted, as is usual."""
    leaves = flatten_dict(params, sep="/")
    tensors = {}
    for name, place in places(model, GPT2):
        leaf = np.asarray(leaves[place.leaf], np.float32)
        value = leaf if place.layer is None else leaf[place.layer]
        tensors[f"transformer.{name}"] = np.ascontiguousarray(value.reshape(place.shape))
    return tensors


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill; rename it to `folder` if the block raises nothing."""
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    if folder.exists():
        raise ValueError(f"{folder}: already exists")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, folder)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    """Write a file and sync it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
