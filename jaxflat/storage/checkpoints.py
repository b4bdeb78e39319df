"""Save and restore pytrees of arrays: one folder a step, which all processes of a run share.

A step appears and disappears in one rename, its manifest included. Until then, and from then on,
its files are in a hidden folder beside the steps.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxflat.distributed import leases, ranks
from jaxflat.storage import manifest
from jaxflat.storage.files import DISK_FULL, fsync

GRACE = 1.0  # seconds; after a failed save, threads of orbax still write files and make folders


def save(directory: Path, step: int, tree: Any) -> None:
    """Write `tree` to directory/<step>; the folder appears complete or not at all.

    Each rank writes and hashes the arrays on its devices. Raises OSError that names the folder if
    the disk is full.
    """
    with _publishing(directory, step) as unfinished:
        _check_free_space(unfinished.parent, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(unfinished.absolute(), tree)
        described = manifest.describe_files(unfinished, ranks.rank())
        parts = ranks.all_gather(described, "manifest")
        manifest.write(unfinished, {name: file for part in parts for name, file in part.items()})


@ranks.on_rank_0
def copy(source: Path, directory: Path, step: int) -> None:
    """Copy source/<step> to directory/<step>; the folder appears complete or not at all."""
    with _publishing(directory, step) as unfinished:
        shutil.copytree(source / str(step), unfinished)


def restore(directory: Path, step: int, template: Any) -> Any:
    """Return the tree of directory/<step>, with the structure and placement of `template`.

    Raises ValueError that names a folder without a checkpoint, a damaged file, or a leaf whose
    shape or dtype differs from the template's: orbax would cast it silently.
    """
    path = directory.absolute() / str(step)
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint")
    verify(directory, step)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError(f"{path}: the folder holds no arrays")
        stored = jax.tree.leaves(metadata.tree)
        found = {leaf.name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in stored}
        for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(template):
            name = ".".join(str(_entry_name(entry)) for entry in leaf_path)
            expected = (np.shape(leaf), leaf.dtype)
            if found.get(name) != expected:
                raise ValueError(f"{path}: {name} is {found.get(name)}, expected {expected}")
        return checkpointer.restore(path, template)


@ranks.on_rank_0
def steps(directory: Path) -> list[int]:
    """Return the steps in `directory`, in order, without those marked as damaged."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


@ranks.on_rank_0
def delete(directory: Path, step: int) -> None:
    """Delete a step; it disappears whole."""
    with _hidden_folder(directory) as hidden:
        leases.assert_owned()
        (directory / str(step)).rename(hidden / "old")


@ranks.on_rank_0
def verify(directory: Path, step: int) -> None:
    """Raise DamagedError that names the first file of directory/<step> that has changed."""
    manifest.verify(directory / str(step))


@ranks.on_rank_0
def mark_damaged_steps(directory: Path) -> list[str]:
    """Verify all steps; rename each damaged one to damaged-<step> and return a line about each."""
    lines = []
    for step in steps(directory):
        try:
            verify(directory, step)
        except manifest.DamagedError as error:
            lines.append(f"{error}; renamed to {mark_damaged(directory / str(step)).name}")
    return lines


def mark_damaged(folder: Path) -> Path:
    """Rename a folder to damaged-<its name>, replacing an older one, and return the new path."""
    damaged = folder.with_name(f"damaged-{folder.name}")
    leases.assert_owned()
    shutil.rmtree(damaged, ignore_errors=True)
    with suppress(FileNotFoundError):  # another process has renamed it
        folder.rename(damaged)
    return damaged


@contextmanager
def _publishing(directory: Path, step: int) -> Iterator[Path]:
    """Yield a hidden path to write a step to; it becomes directory/<step> if the block succeeds."""
    target = directory / str(step)
    try:
        with _hidden_folder(directory) as hidden:
            yield hidden / "new"
            _replace_step(hidden / "new", target, hidden / "old")
    except Exception as error:  # orbax raises several types, whose messages quote the system's
        for number in DISK_FULL:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(target)) from error
        raise


@ranks.on_rank_0
def _check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError before orbax fills the disk: some of its threads would still be writing."""
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@ranks.on_rank_0
def _replace_step(new: Path, target: Path, old: Path) -> None:
    """Rename a complete step to its place, an older one out of it, and flush the names to disk."""
    leases.assert_owned()
    if target.exists():
        target.rename(old)
    new.rename(target)
    fsync(target.parent)


@contextmanager
def _hidden_folder(directory: Path) -> Iterator[Path]:
    """Yield an empty hidden folder in `directory`; delete it and older ones afterwards."""
    hidden = _make_hidden_folder(directory)
    try:
        yield hidden
    except Exception:
        time.sleep(GRACE)
        raise
    finally:
        if ranks.is_rank_0():
            shutil.rmtree(hidden, ignore_errors=True)


@ranks.on_rank_0
def _make_hidden_folder(directory: Path) -> Path:
    leases.assert_owned()
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(".unfinished*"):
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=".unfinished", dir=directory))


def _entry_name(entry: Any) -> Any:
    """Return the name of an entry of a tree path: a dict key, an attribute or an index."""
    return next(getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a))
