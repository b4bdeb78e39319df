"""GPT-2 and OPT from a local Hugging Face folder: config.json and safetensors.

Whatever is wrong with a folder becomes a ValueError of one line that names the file.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxflat.models.causal import CausalTransformer
from jaxflat.models.huggingface_layout import Layout, Place, places, read_config, special_token

DTYPES = ("F32", "F16", "BF16")
HEAD = "lm_head.weight"


class Pretrained(NamedTuple):
    """A model, its float32 parameters, and the tokens that begin and end a text, if any."""

    model: CausalTransformer
    params: dict[str, Any]
    bos_token: int | None
    eos_token: int | None


class Stored(NamedTuple):
    """A tensor as the header of its file has it."""

    file: Path
    name: str
    shape: tuple[int, ...]


def load_causal(folder: Path) -> Pretrained:
    """Read a GPT-2 or OPT checkpoint of a local Hugging Face folder.

    Raises ValueError, one line, where a file is missing or damaged, or describes or holds
    anything but such a model.
    """
    with _naming(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model, layout = read_config(config)
        tokens = [special_token(config, f"{k}_token_id", model.num_tokens) for k in ("bos", "eos")]
    weights, files = _weight_files(folder)
    stored = _read_headers(files, layout)
    expected = _match(weights, stored, model, layout)
    return Pretrained(model, _read_tensors(stored, expected, model, layout), *tokens)


def _weight_files(folder: Path) -> tuple[Path, dict[Path, set[str] | None]]:
    """Return the file that lists the tensors; each tensor file and its tensors, None for any."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return single, {single: None}
    files: dict[Path, set[str] | None] = {}
    with _naming(index):
        contents = json.loads(index.read_text("utf-8"))
        weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map has to give the file of each tensor")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise ValueError(f"weight_map[{name!r}] has to be the name of a file beside it")
            files[folder / file] = (files.get(folder / file) or set()) | {name}
    return index, files


def _read_headers(files: dict[Path, set[str] | None], layout: Layout) -> dict[str, Stored]:
    """Return the tensors of all files by their names without prefix, buffers left out."""
    stored: dict[str, Stored] = {}
    for file, names in files.items():
        with _open_tensors(file) as tensors:
            for name in sorted(tensors.keys()):
                if names is not None and name not in names:
                    raise ValueError(f"{name!r} is not here by model.safetensors.index.json")
                short_name = re.sub(layout.prefix, "", name)
                if re.fullmatch(layout.buffers, short_name):
                    continue
                header = tensors.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    dtypes = ", ".join(DTYPES)
                    raise ValueError(f"{name!r} is {header.get_dtype()}, has to be of {dtypes}")
                if short_name in stored:
                    raise ValueError(f"{name!r} is here besides {stored[short_name].name!r}")
                stored[short_name] = Stored(file, name, tuple(header.get_shape()))
    return stored


def _match(
    weights: Path, stored: dict[str, Stored], model: CausalTransformer, layout: Layout
) -> dict[str, Place]:
    """Return the place of every stored tensor; raise ValueError unless all fit the model."""
    expected: dict[str, Place] = {}
    with _naming(weights):
        for name, place in places(model, layout):
            if name not in stored:
                raise ValueError(f"tensor {name!r} of shape {place.shape} is missing")
            expected[name] = place
    if HEAD in stored:
        expected[HEAD] = Place((model.num_tokens, model.width), HEAD, None, None)
    for short_name, (file, name, shape) in stored.items():
        with _naming(file):
            if short_name not in expected:
                raise ValueError(f"tensor {name!r} is no part of the model in config.json")
            right = expected[short_name].shape
            if shape != right:
                raise ValueError(f"tensor {name!r} is of shape {shape}, by config.json {right}")
    return expected


def _read_tensors(
    stored: dict[str, Stored], expected: dict[str, Place], model: CausalTransformer, layout: Layout
) -> dict[str, Any]:
    """Return the parameters, read one tensor at a time into the stacked arrays."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    leaves: dict[str, Any] = flatten_dict(empty, sep="/")
    if HEAD in stored:
        leaves[HEAD] = np.empty(stored[HEAD].shape, np.float32)
    for file in {tensor.file: None for tensor in stored.values()}:
        with _open_tensors(file) as tensors:
            for short_name, (its_file, name, _) in stored.items():
                if its_file == file:
                    _put(leaves, expected[short_name], _finite(name, tensors), layout)
    head = leaves.pop(HEAD, leaves["token_embedding"])
    if not np.array_equal(head, leaves["token_embedding"]):
        with _naming(stored[HEAD].file):
            raise ValueError(f"{stored[HEAD].name!r} differs from the embedding it is tied to")
    return jax.tree.map(jnp.asarray, unflatten_dict(leaves, sep="/"))


def _finite(name: str, tensors: Any) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        value = tensors.get_tensor(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"tensor {name!r} holds numbers that are not finite")
    return value


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


@contextmanager
def _open_tensors(file: Path) -> Iterator[Any]:
    with _naming(file):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            extra = "pip install 'jaxflat[huggingface]'"
            raise ValueError(f"to be read it takes safetensors: {extra}") from None
        if not file.is_file():
            raise ValueError("no such file; weights have to be saved as safetensors")
        try:
            with safe_open(file, framework="numpy") as tensors:
                yield tensors
        except SafetensorError as error:
            raise ValueError(f"not a whole safetensors file: {error}") from None


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into a ValueError of one line that begins with its path."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(reason.split()))
        raise ValueError(f"{file}: {printable}") from None
