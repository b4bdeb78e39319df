"""Save and restore pytrees of arrays, one folder a step."""

import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxflat import locks


def save(directory: Path, step: int, tree: Any) -> None:
    """Write `tree` to directory/<step>; the folder appears complete or not at all."""
    locks.check()
    for leftover in directory.glob(".unfinished*"):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = directory.absolute() / f".unfinished.{uuid.uuid4().hex}"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(unfinished, tree)
    locks.check()
    shutil.rmtree(directory / str(step), ignore_errors=True)
    unfinished.rename(directory / str(step))


def restore(directory: Path, step: int, template: Any) -> Any:
    """Return the tree of directory/<step>, with the structure and placement of `template`.

    Raises ValueError naming the leaf whose shape or dtype differs: orbax would cast in silence;
    or the folder, where it holds no checkpoint.
    """
    path = directory.absolute() / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError(f"{path}: holds no checkpoint, or a damaged one")
        stored = jax.tree.leaves(metadata.tree)
        found = {leaf.name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in stored}
        for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(template):
            name = ".".join(str(_key(key)) for key in leaf_path)
            expected = (np.shape(leaf), leaf.dtype)
            if found.get(name) != expected:
                raise ValueError(f"{path}: {name} is {found.get(name)}, expected {expected}")
        return checkpointer.restore(path, template)


def steps(directory: Path) -> list[int]:
    """Return the complete steps in `directory`, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def keep_only(directory: Path, step: int) -> None:
    """Delete every other step."""
    for other in steps(directory):
        if other != step:
            locks.check()
            shutil.rmtree(directory / str(other))


def _key(key: Any) -> Any:
    """Return a tree path entry's own name: a dict key, an attribute or an index."""
    return next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a))
