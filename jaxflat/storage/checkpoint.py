"""Save and restore pytrees of arrays, one folder a step, which all processes of a run see.

A step appears whole, its manifest included, and goes at once: what is not whole yet, or no more,
is in a hidden folder beside the steps.
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

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
STRAGGLERS = 1.0  # seconds; where a save failed, threads of orbax still write, and make folders


def save(directory: Path, step: int, tree: Any) -> None:
    """Write `tree` to directory/<step>; the folder appears complete or not at all.

    Each process writes and hashes what is on its devices. Raises OSError naming it where the disk
    is full.
    """
    with _appearing(directory, step) as unfinished:
        _check_room(unfinished.parent, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(unfinished.absolute(), tree)
        parts = ranks.all_gather(manifest.part(unfinished, ranks.rank()), "manifest")
        files = {name: file for part in parts for name, file in part.items()}
        ranks.on_rank_0(manifest.write)(unfinished, files)


@ranks.on_rank_0
def copy(source: Path, directory: Path, step: int) -> None:
    """Copy source/<step> to directory/<step>; as in `save`, complete or not at all."""
    with _appearing(directory, step) as unfinished:
        shutil.copytree(source / str(step), unfinished)


def restore(directory: Path, step: int, template: Any) -> Any:
    """Return the tree of directory/<step>, with the structure and placement of `template`.

    Raises ValueError naming the file that is not as it was saved; the leaf whose shape or dtype
    differs: orbax would cast in silence; or the folder, where it is none.
    """
    path = directory.absolute() / str(step)
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint")
    check(directory, step)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError(f"{path}: holds no arrays")
        stored = jax.tree.leaves(metadata.tree)
        found = {leaf.name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in stored}
        for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(template):
            name = ".".join(str(_key(key)) for key in leaf_path)
            expected = (np.shape(leaf), leaf.dtype)
            if found.get(name) != expected:
                raise ValueError(f"{path}: {name} is {found.get(name)}, expected {expected}")
        return checkpointer.restore(path, template)


@ranks.on_rank_0
def steps(directory: Path) -> list[int]:
    """Return the steps in `directory`, in order; those set aside are none."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


@ranks.on_rank_0
def delete(directory: Path, step: int) -> None:
    """Delete a step, at once."""
    with _hidden(directory) as hidden:
        leases.assert_owned()
        (directory / str(step)).rename(hidden / "old")


@ranks.on_rank_0
def check(directory: Path, step: int) -> None:
    """Raise DamagedError naming the first file of directory/<step> that is not as it was saved."""
    manifest.check(directory / str(step))


@ranks.on_rank_0
def set_aside_damaged(directory: Path) -> list[str]:
    """Rename each step that is not as it was saved to damaged-<step>; return a line on each."""
    lines = []
    for step in steps(directory):
        try:
            check(directory, step)
        except manifest.DamagedError as error:
            lines.append(f"{error}; now {set_aside(directory / str(step)).name}")
    return lines


def set_aside(folder: Path) -> Path:
    """Rename a folder to damaged-<its name>, in the place of an older one, and return its path."""
    aside = folder.with_name(f"damaged-{folder.name}")
    leases.assert_owned()
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):  # another process was first
        folder.rename(aside)
    return aside


@contextmanager
def _appearing(directory: Path, step: int) -> Iterator[Path]:
    """Give a path to make a step at, which takes its place among the steps once all went well."""
    target = directory / str(step)
    try:
        with _hidden(directory) as hidden:
            yield hidden / "new"
            _put(hidden / "new", target, hidden / "old")
    except Exception as error:  # of several kinds, with the system's words somewhere in them
        for number in NO_ROOM:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(target)) from error
        raise


@ranks.on_rank_0
def _check_room(folder: Path, num_bytes: int) -> None:
    if shutil.disk_usage(folder).free < num_bytes:
        # Or orbax would fill the disk first, and fail with some of its threads still at it.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@ranks.on_rank_0
def _put(new: Path, target: Path, old: Path) -> None:
    """Rename a whole step into its place, an older one out of it, and push the names to disk."""
    leases.assert_owned()
    if target.exists():
        target.rename(old)
    new.rename(target)
    manifest.push(target.parent)


@contextmanager
def _hidden(directory: Path) -> Iterator[Path]:
    """Give an empty hidden folder in `directory`; it and older ones are gone afterwards."""
    hidden = _make_hidden(directory)
    try:
        yield hidden
    except Exception:
        time.sleep(STRAGGLERS)
        raise
    finally:
        if ranks.is_rank_0():
            shutil.rmtree(hidden, ignore_errors=True)


@ranks.on_rank_0
def _make_hidden(directory: Path) -> Path:
    leases.assert_owned()
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(".unfinished*"):
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=".unfinished", dir=directory))


def _key(key: Any) -> Any:
    """Return a tree path entry's own name: a dict key, an attribute or an index."""
    return next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a))
