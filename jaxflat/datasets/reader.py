"""Random access to a data set on disk, in batches of columns."""

import bisect
import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxflat.datasets.record_bytes import Columns, RecordLayout, Types, layout_of, types_of
from jaxflat.datasets.shards import METADATA, SETTINGS, SPLIT, SUMS, DatasetError
from jaxflat.storage.files import sha256

MAX_OPEN_SHARDS = 512
# Reads are at random, so reading ahead or in large blocks would be wasted.
READER_OPTIONS = {
    "options": "readahead_buffer_size:0,max_parallelism:0",
    "file_reader_buffer_size": 4096,
}


class Dataset:
    """A data set: its settings, the types of its columns, and its records by number.

    settings: the settings that built it.
    types: each column's dtype in one record, its shape included.
    """

    def __init__(self, settings: dict[str, Any], types: Types, shards: Sequence[tuple[Path, int]]):
        """Use the metadata that `open_dataset` read; shards are (file, number of records)."""
        self.settings, self.types = settings, types
        self._layout: RecordLayout = layout_of(types)
        self._paths = [path for path, _ in shards]
        self._starts = [0, *itertools.accumulate(length for _, length in shards)]
        self._reader = functools.lru_cache(MAX_OPEN_SHARDS)(_open_shard)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def num_shards(self) -> int:
        return len(self._paths)

    def read(self, ids_N: np.ndarray) -> Columns:
        """Return the columns of records ids_N, in that order.

        Raises ValueError on ids outside 0..len-1, and DatasetError on ids that are no list of whole
        numbers and on a shard that cannot be read.
        """
        ids_N = np.asarray(ids_N)
        if ids_N.ndim != 1 or not np.issubdtype(ids_N.dtype, np.integer) or not len(ids_N):
            raise DatasetError(
                f"ids must be a list of whole numbers; got {ids_N.dtype} {ids_N.shape}"
            )
        order_N = np.argsort(ids_N, kind="stable")
        sorted_N = ids_N[order_N]
        if sorted_N[0] < 0 or sorted_N[-1] >= len(self):
            raise ValueError(f"ids must be in 0..{len(self) - 1}; got {sorted_N[[0, -1]].tolist()}")
        columns = {
            name: np.empty((len(ids_N), *kind.shape), kind.base)
            for name, kind in self.types.items()
        }
        done = 0
        while done < len(sorted_N):
            shard = bisect.bisect_right(self._starts, sorted_N[done]) - 1
            until = int(np.searchsorted(sorted_N, self._starts[shard + 1]))
            places = (sorted_N[done:until] - self._starts[shard]).tolist()
            for name, column in self._read_shard(self._paths[shard], places).items():
                columns[name][order_N[done:until]] = column
            done = until
        return columns

    def _read_shard(self, path: Path, places: list[int]) -> Columns:
        try:
            return self._layout.decode(self._reader(path).read(places))
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise DatasetError(f"{path}: {_first_line(error)}") from error


def open_dataset(directory: Path | str) -> Dataset:
    """Return the data set of a directory.

    Raises DatasetError if a file is missing or changed, or if a shard's number of records differs
    from the metadata.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DatasetError(f"{directory}: no such directory")
    _check_metadata(directory)
    settings, types, shards = _read_metadata(directory)
    for path, length in shards:
        if not path.is_file():
            raise DatasetError(f"{path} is missing")
        found = _num_records(path)
        if found != length:
            raise DatasetError(f"{path} has {found} whole records; it must have {length}")
    return Dataset(settings, types, shards)


def _check_metadata(directory: Path) -> None:
    """Raise DatasetError if a metadata file differs from its recorded sum."""
    try:
        lines = (directory / SUMS).read_text().splitlines()
    except FileNotFoundError as error:
        raise DatasetError(f"{directory / SUMS} is missing: no finished data set") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{directory / SUMS}: {_first_line(error)}") from error
    sums = {match[2]: match[1] for match in map(_SUM.fullmatch, lines) if match}
    if len(sums) != len(lines):
        raise DatasetError(f"{directory / SUMS} is not a list of SHA-256 sums")
    for path in (directory / file for file in METADATA):
        if not path.is_file():
            raise DatasetError(f"{path} is missing")
        if path.name not in sums:
            raise DatasetError(f"{directory / SUMS} does not list {path.name}")
        if sha256(path) != sums[path.name]:
            raise DatasetError(f"{path} is not what {SUMS} says it is")


_SUM = re.compile(r"([0-9a-f]{64})  (\S+)")


def _read_metadata(directory: Path) -> tuple[dict[str, Any], Types, list[tuple[Path, int]]]:
    import tensorflow_datasets as tfds

    try:
        settings = json.loads((directory / SETTINGS).read_text())
        info = tfds.builder_from_directory(directory).info
        types = types_of(info.features)
        split = info.splits[SPLIT]
        paths = [Path(path) for path in split.filepaths]
        return settings, types, list(zip(paths, split.shard_lengths, strict=True))
    # On unusable metadata TensorFlow Datasets raises many classes.
    except Exception as error:
        raise DatasetError(f"{directory}: unusable metadata: {_first_line(error)}") from error


def _open_shard(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), **READER_OPTIONS)


def _num_records(path: Path) -> int:
    """Return the number of records of a shard; 0 if it is cut off or has no usable index."""
    try:
        return _open_shard(path).num_records()
    except (RuntimeError, ValueError, OSError) as error:
        raise DatasetError(f"{path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
