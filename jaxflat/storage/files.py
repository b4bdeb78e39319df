"""Write files whole or not at all, append to them, flush to disk, and hash.

No other file of the package does these. Every write raises OSError that names the file: the error
of a full disk itself names none. Right before a file is replaced, `assert_owned` raises if this
process no longer owns it.
"""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Check = Callable[[], object]


def write_json(path: Path, value: Any, assert_owned: Check = lambda: None) -> None:
    """Write a JSON file whole; make its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1) + "\n", assert_owned)


def write_lines(
    path: Path, records: list[dict[str, Any]], assert_owned: Check = lambda: None
) -> None:
    """Write a JSON-lines file whole."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records), assert_owned)


def write_whole(path: Path, content: str | bytes, assert_owned: Check = lambda: None) -> None:
    """Write a file so that it holds all of `content`, or stays as it was."""
    with replacing(path, assert_owned) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def replacing(path: Path, assert_owned: Check = lambda: None) -> Iterator[Path]:
    """Yield a temporary path; the file written there replaces `path` if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with _name_file_in_errors(path):
            yield temporary
            fsync(temporary)
            assert_owned()
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Append to a file and flush it to disk; if that fails, the file keeps its old length."""
    with _name_file_in_errors(path), path.open("ab", buffering=0) as file:
        num_bytes = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(num_bytes)
            raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file; none if there is no file."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return
    yield from map(json.loads, lines)


def fsync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Name the file in an OSError that comes from writing it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
