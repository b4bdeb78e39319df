"""The safetensors of a local Hugging Face folder, under the names that a Layout gives them.

Whatever is wrong with a file becomes a ValueError of one line that begins with its path.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxflat.models.huggingface_layout import Layout

DTYPES = ("F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor as the header of its file has it."""

    file: Path
    name: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> tuple[Path, dict[Path, set[str] | None]]:
    """Return the file that lists the tensors; each tensor file and its tensors, None for any."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return single, {single: None}
    files: dict[Path, set[str] | None] = {}
    with naming(index):
        contents = json.loads(index.read_text("utf-8"))
        weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map has to give the file of each tensor")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise ValueError(f"weight_map[{name!r}] has to be the name of a file beside it")
            files[folder / file] = (files.get(folder / file) or set()) | {name}
    return index, files


def read_headers(files: dict[Path, set[str] | None], layout: Layout) -> dict[str, Stored]:
    """Return the tensors of all files by the names in the layout, ignored ones left out.

    Where only the second name of a tied tensor is stored, it goes by the first.
    """
    stored: dict[str, Stored] = {}
    for file, names in files.items():
        with open_tensors(file) as tensors:
            for name in sorted(tensors.keys()):
                if names is not None and name not in names:
                    raise ValueError(f"{name!r} is not here by model.safetensors.index.json")
                short_name = name
                for pattern, replacement in layout.renamed:
                    short_name = re.sub(pattern, replacement, short_name)
                if re.fullmatch(layout.ignored, short_name):
                    continue
                header = tensors.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    dtypes = ", ".join(DTYPES)
                    raise ValueError(f"{name!r} is {header.get_dtype()}, has to be of {dtypes}")
                if short_name in stored:
                    raise ValueError(f"{name!r} is here besides {stored[short_name].name!r}")
                stored[short_name] = Stored(file, name, tuple(header.get_shape()))
    for second, first in layout.tied.items():
        if second in stored and first not in stored:
            stored[first] = stored.pop(second)
    return stored


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file, its tensors as numpy has them."""
    with naming(file):
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


def read_finite(name: str, tensors: Any) -> np.ndarray:
    """Return an opened file's tensor as float32; raise ValueError unless all of it is finite."""
    with np.errstate(invalid="ignore"):
        value = tensors.get_tensor(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"tensor {name!r} holds numbers that are not finite")
    return value


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into a ValueError of one line that begins with its path."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(reason.split()))
        raise ValueError(f"{file}: {printable}") from None
