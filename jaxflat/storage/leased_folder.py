"""The folder of a run: read and write its files and checkpoints, under a lease.

A checkpoint is a pytree of arrays in a folder named by its step. Its files, the manifest included,
are written in a hidden folder beside the steps. One rename puts them in place. Deletion first
renames them out again, into a hidden folder.
"""

import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxflat.distributed import ranks, sharding
from jaxflat.distributed.leases import Lease
from jaxflat.storage import files, manifest

P = ParamSpec("P")
T = TypeVar("T")

GRACE = 1.0  # seconds; after a failed save, threads of orbax still write files and make folders


class Folder:
    """A folder that rank 0 reads and writes, under the lease that the folder holds.

    All ranks call each method, in the same order. Rank 0 does the work, and all ranks get what it
    returns or raises. In `save` and `restore` each rank moves the arrays on its devices.

    Every method that writes raises LeaseLost unless rank 0 owns the lease, and OSError that names
    the file if the disk is full.
    """

    def __init__(self, path: Path, lease: Lease | None = None):
        """Name a folder; unless a `lease` is given, the lease on the folder itself guards it."""
        self.path, self.lease = path, lease or Lease(path)

    def __truediv__(self, name: str | int) -> "Folder":
        """Return a folder in this one, under the same lease."""
        return Folder(self.path / str(name), self.lease)

    def on_rank_0(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on rank 0 only; all ranks get what it returns or raises.

        Within it, rank 0 exchanges nothing with the others.
        """
        return ranks.on_rank_0(function)(*args, **kwargs)

    @ranks.on_rank_0
    def assert_owned(self) -> None:
        """Raise LeaseLost unless rank 0 owns the lease."""
        self.lease.assert_owned()

    # Files.

    @ranks.on_rank_0
    def make(self) -> None:
        """Make the folder, and delete incomplete files of a process that died."""
        self.lease.assert_owned()
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.glob(".*.*"):  # temporary files of `files.replacing`
            path.unlink(missing_ok=True)

    @ranks.on_rank_0
    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file; {} if there is no file."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else {}

    @ranks.on_rank_0
    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a JSON-lines file; none if there is no file."""
        return list(files.read_lines(self.path / name))

    @ranks.on_rank_0
    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""
        files.write_json(self.path / name, value, self.lease.assert_owned)

    @ranks.on_rank_0
    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole."""
        files.write_whole(self.path / name, text, self.lease.assert_owned)

    @ranks.on_rank_0
    def write_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        """Write a JSON-lines file whole."""
        files.write_lines(self.path / name, records, self.lease.assert_owned)

    @ranks.on_rank_0
    def add_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        """Add lines to a JSON-lines file, all of them or none."""
        path = self.path / name
        files.write_lines(path, [*files.read_lines(path), *records], self.lease.assert_owned)

    @ranks.on_rank_0
    def append_bytes(self, name: str, content: bytes) -> None:
        """Append to a file and flush it; if that fails, the file keeps its old length."""
        self.lease.assert_owned()
        files.append(self.path / name, content)

    def append_line(self, name: str, record: dict[str, Any]) -> None:
        """Append one JSON line and flush it."""
        self.append_bytes(name, f"{json.dumps(record)}\n".encode())

    @ranks.on_rank_0
    def delete(self, name: str) -> None:
        """Delete a file or a folder, if it exists, and the folders that are empty then."""
        path = self.path / name
        self.lease.assert_owned()
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            while (path := path.parent) != self.path:
                path.rmdir()

    # Checkpoints.

    @ranks.on_rank_0
    def steps(self) -> list[int]:
        """Return the steps in the folder, in order, without those marked as damaged."""
        if not self.path.is_dir():
            return []
        return sorted(int(path.name) for path in self.path.iterdir() if path.name.isdigit())

    def save(self, step: int, tree: Any) -> None:
        """Write `tree` to the folder <step>, which appears complete or not at all.

        Each rank writes and hashes the arrays on its devices. Raises OSError that names the folder
        if the disk is full.
        """
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        if jax.process_count() == 1:  # else orbax compiles slices, so that all devices write a part
            tree = sharding.to_host(tree)
        with self._publishing(step, num_bytes) as unfinished:
            with _checkpointer() as checkpointer:
                checkpointer.save(unfinished.absolute(), tree)
            parts = ranks.all_gather(manifest.describe_files(unfinished, ranks.rank()), "manifest")
            entries = {name: file for part in parts for name, file in part.items()}
            self.on_rank_0(manifest.write, unfinished, entries, self.lease.assert_owned)

    def restore(self, step: int, template: Any) -> Any:
        """Return the tree of a step, with the structure and placement of `template`.

        Raises ValueError that names a folder without a checkpoint, a damaged file, or a leaf whose
        shape or dtype differs from the template's. (Orbax would cast it silently.)
        """
        path = self.path.absolute() / str(step)
        self.verify(step)
        with _checkpointer() as checkpointer:
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
    def verify(self, step: int) -> None:
        """Raise ValueError if there is no such step, DamagedError that names a changed file."""
        path = self.path / str(step)
        if not path.is_dir():
            raise ValueError(f"{path.absolute()}: no such checkpoint")
        manifest.verify(path)

    @ranks.on_rank_0
    def copy(self, source: Path, step: int) -> None:
        """Copy source/<step> to the folder <step>, which appears complete or not at all."""
        with self._publishing(step) as unfinished:
            shutil.copytree(source / str(step), unfinished)

    @ranks.on_rank_0
    def delete_step(self, step: int) -> None:
        """Delete a step; it disappears whole."""
        with self._hidden_folder() as hidden:
            self.lease.assert_owned()
            (self.path / str(step)).rename(hidden / "old")

    @ranks.on_rank_0
    def mark_damaged_steps(self) -> list[str]:
        """Verify all steps; rename each damaged one to damaged-<step>; return a line about each."""
        lines = []
        for step in self.steps():
            try:
                self.verify(step)
            except manifest.DamagedError as error:
                lines.append(f"{error}; renamed to {(self / step).mark_damaged()}")
        return lines

    @ranks.on_rank_0
    def mark_damaged(self) -> str:
        """Rename the folder to damaged-<its name>, replacing an older one; return the new name."""
        damaged = self.path.with_name(f"damaged-{self.path.name}")
        self.lease.assert_owned()
        shutil.rmtree(damaged, ignore_errors=True)
        with suppress(FileNotFoundError):  # another process has renamed it
            self.path.rename(damaged)
        return damaged.name

    @contextmanager
    def _publishing(self, step: int, num_bytes: int = 0) -> Iterator[Path]:
        """Yield a hidden path to write to; it becomes the folder <step> if the block succeeds.

        Raises OSError if the disk has no space for `num_bytes`.
        """
        target = self.path / str(step)
        try:
            with _late_callbacks_unprinted(), self._hidden_folder(num_bytes) as hidden:
                yield hidden / "new"
                self._replace_step(hidden / "new", target, hidden / "old")
        except Exception as error:  # orbax raises several types, whose messages quote the system's
            for number in files.DISK_FULL:
                if os.strerror(number) in str(error):
                    raise OSError(number, os.strerror(number), str(target)) from error
            raise

    @contextmanager
    def _hidden_folder(self, num_bytes: int = 0) -> Iterator[Path]:
        """Yield an empty hidden folder in this one; delete it and older ones afterwards."""
        hidden = self._make_hidden_folder(num_bytes)
        try:
            yield hidden
        except Exception:
            time.sleep(GRACE)
            raise
        finally:
            if ranks.is_rank_0():
                shutil.rmtree(hidden, ignore_errors=True)

    @ranks.on_rank_0
    def _make_hidden_folder(self, num_bytes: int) -> Path:
        self.lease.assert_owned()
        self.path.mkdir(parents=True, exist_ok=True)
        for old in self.path.glob(".unfinished*"):
            shutil.rmtree(old, ignore_errors=True)
        # If orbax filled the disk, some of its threads would still be writing after its error.
        if shutil.disk_usage(self.path).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Path(tempfile.mkdtemp(prefix=".unfinished", dir=self.path))

    @ranks.on_rank_0
    def _replace_step(self, new: Path, target: Path, old: Path) -> None:
        """Rename a complete step to its place, an older one out of it; flush the names to disk."""
        self.lease.assert_owned()
        if target.exists():
            target.rename(old)
        new.rename(target)
        files.fsync(self.path)


def _checkpointer() -> ocp.StandardCheckpointer:
    """Return orbax's checkpointer; its processes meet at the coordination service.

    By default they meet in a collective over the devices, which orbax starts from its own threads.
    Processes that start two collectives in different orders wait for each other forever.

    By default a thread makes the folders. If it fails, other threads wait five minutes for them.
    """
    num_ranks = jax.process_count()
    options = ocp.options.MultiprocessingOptions(
        active_processes=set(range(num_ranks)) if num_ranks > 1 else None,
        barrier_sync_key_prefix="jaxflat",
    )
    return ocp.StandardCheckpointer(
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        multiprocessing_options=options,
    )


@contextmanager
def _late_callbacks_unprinted() -> Iterator[None]:
    """Print no traceback of the calls that tensorstore still makes after orbax has failed.

    Orbax has closed their event loop by then. The error that it failed with is raised.
    """
    print_error = sys.unraisablehook

    def print_other_errors(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed":
            print_error(error)

    sys.unraisablehook = print_other_errors
    try:
        yield
    finally:
        sys.unraisablehook = print_error


def _entry_name(entry: Any) -> Any:
    """Return the name of an entry of a tree path: a dict key, an attribute or an index."""
    return next(getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a))
