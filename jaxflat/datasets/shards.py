"""Data sets of records in array_record shards, readable by TensorFlow Datasets.

The files of a data set are written in this order:
  jaxflat.json: the settings that made it
  the shards, each renamed into place once whole
  features.json and dataset_info.json, which TensorFlow Datasets reads
  SHA256SUMS: a data set without it is unfinished
"""

import fcntl
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxflat.datasets.record_bytes import Columns, RecordLayout, Types, features_of
from jaxflat.storage.files import Check, fsync, replacing, sha256, write_whole

SETTINGS, SUMS = "jaxflat.json", "SHA256SUMS"
METADATA = (SETTINGS, "features.json", "dataset_info.json")
SPLIT, VERSION = "train", "1.0.0"
# Each chunk has one record, so a random read decompresses nothing else. Snappy packs as well as
# zstd here and takes a third of the time.
WRITER_OPTIONS = "group_size:1,snappy"


class DatasetError(ValueError):
    """A directory has no usable data set; the message is one line that names the file."""


def is_finished(directory: Path) -> bool:
    """Return whether the directory has a finished data set."""
    return (directory / SUMS).exists()


def shard_path(directory: Path, name: str, shard: int, num_shards: int) -> Path:
    """Return the path of a shard, named as TensorFlow Datasets names it."""
    return directory / f"{name}-{SPLIT}.array_record-{shard:05}-of-{num_shards:05}"


@contextmanager
def claim(
    directory: Path, settings: Mapping[str, Any], assert_owned: Check = lambda: None
) -> Iterator[None]:
    """Own a directory within the block, to start or resume a data set with these settings.

    The lock is the kernel's, on the settings file. A lease would need a folder beside the directory
    or in it. But the directory may be a mounted volume, and SHA256SUMS lists all files in it.

    Raises DatasetError if the directory cannot be used, holds something else, or is locked by
    another process.
    """
    path = directory / SETTINGS
    text = json.dumps(settings, indent=1) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if others := sorted(p.name for p in directory.iterdir() if p.name[0] != "."):
                raise DatasetError(
                    f"{directory / others[0]} is in the way; choose another directory"
                )
            write_whole(path, text, assert_owned)
            fsync(directory)
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_settings(path, file.read(), json.loads(text))
            _delete_unfinished(directory)
            yield
    except BlockingIOError as error:
        raise DatasetError(f"{directory}: another process is building this data set") from error
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise DatasetError(f"{directory} cannot be used: {error.strerror}") from error


def write_shard(
    path: Path, layout: RecordLayout, parts: Iterable[Columns], assert_owned: Check = lambda: None
) -> None:
    """Write a shard atomically: the file has all its records or does not exist.

    parts: the columns of consecutive records. Each part is written before the next one is taken.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    with replacing(path, assert_owned) as temporary:
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for columns in parts:
            for record in layout.encode(columns):
                writer.write(record)
        writer.close()


def finish(
    directory: Path,
    name: str,
    types: Types,
    lengths: Sequence[int],
    digests: Sequence[str],
    assert_owned: Check = lambda: None,
) -> None:
    """Write the metadata of a data set whose shards are complete; this finishes the data set.

    lengths, digests: each shard's number of records and its SHA-256. Raises DatasetError if the set
    was finished before with other digests, because then a shard is damaged.
    """
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import dataset_info, splits

    identity = dataset_info.DatasetIdentity(name, tfds.core.Version(VERSION), "", "")
    info = tfds.core.DatasetInfo(builder=identity, features=features_of(types))
    info.set_file_format("array_record")
    shards = [shard_path(directory, name, i, len(lengths)) for i in range(len(lengths))]
    sums = [f"{digest}  {shard.name}\n" for digest, shard in zip(digests, shards, strict=True)]
    recorded = (directory / SUMS).read_text() if is_finished(directory) else ""
    for shard, line in zip(shards, sums, strict=True):
        if shard.name in recorded and line not in recorded:
            raise DatasetError(
                f"{shard} is not what {SUMS} says; delete it to make it again, "
                f"or {SUMS} to take it as it is"
            )
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(directory),
        dataset_name=name,
        split=SPLIT,
        filetype_suffix="array_record",
    )
    num_bytes = sum(shard.stat().st_size for shard in shards)
    split = tfds.core.SplitInfo(SPLIT, list(lengths), num_bytes, template)
    info.set_splits(splits.SplitDict([split]))
    fsync(directory)
    with tempfile.TemporaryDirectory() as scratch:
        info.write_to_directory(scratch)
        for file in METADATA[1:]:
            write_whole(directory / file, (Path(scratch) / file).read_bytes(), assert_owned)
    metadata = [f"{sha256(directory / file)}  {file}\n" for file in METADATA]
    write_whole(directory / SUMS, "".join(metadata + sums), assert_owned)
    fsync(directory)


def _check_settings(path: Path, text: str, expected: dict[str, Any]) -> None:
    try:
        stored = _flatten(json.loads(text))
    except (ValueError, AttributeError) as error:
        raise DatasetError(f"{path} is not the settings of a data set") from error
    wanted = _flatten(expected)
    for key in itertools.chain(wanted, stored):
        old, new = (flat.get(key, "nothing") for flat in (stored, wanted))
        if old != new:
            raise DatasetError(
                f"{path} is of a data set with {key}={old}, not {key}={new}; "
                "choose another directory"
            )


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        flat |= _flatten(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def _delete_unfinished(directory: Path) -> None:
    """Delete the unfinished files of a process that died; only the owner may call this."""
    for pattern in ("*.array_record-*", *(f"{name}*" for name in (*METADATA[1:], SUMS))):
        for path in directory.glob(f".{pattern}"):
            path.unlink()
