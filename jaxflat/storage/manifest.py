"""What is in a folder, by SHA-256: written last, so that a folder that has it was once whole."""

import errno
import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = "manifest.json"


class DamagedError(ValueError):
    """A folder that is not as it was written; the message is one line that names the file."""


def part(folder: Path, process: int) -> dict[str, dict[str, Any]]:
    """Return the entries of a manifest, size and SHA-256, of what a process has written.

    That is what is in a folder of its own, process_N; all else is the first one's. These files are
    pushed to disk.
    """
    names = sorted(name for name in _names(folder) if _writer(name) == process)
    files = {name: _measured(folder / name) for name in names}
    for name in files:
        push(folder / name)
    return files


def write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write folder/manifest.json from the parts of all processes."""
    files = dict(sorted(files.items()))
    (folder / NAME).write_bytes(_text(files))
    push(folder / NAME)


def check(folder: Path) -> None:
    """Raise DamagedError naming the first file that is not what the manifest says, or not there."""
    files = _read(folder)
    there = _names(folder)
    for name in sorted(files.keys() | there):
        if name not in there:
            raise DamagedError(f"{folder}: {name} is missing")
        if name not in files:
            raise DamagedError(f"{folder}: {name} is not in {NAME}")
        try:
            found = _measured(folder / name)
        except OSError as error:
            raise _unreadable(folder, name, error) from error
        if (size := found["size"]) != files[name]["size"]:
            raise DamagedError(f"{folder}: {name} has {size} bytes, not {files[name]['size']}")
        if found != files[name]:
            raise DamagedError(f"{folder}: {name} has other bytes than were written")


def push(path: Path) -> None:
    """Push a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a manifest by path; DamagedError where not every byte is as written."""
    try:
        text = (folder / NAME).read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{folder}: {NAME} is missing: no proof that it is whole") from None
    except OSError as error:
        raise _unreadable(folder, NAME, error) from error
    files: Any = None
    with suppress(ValueError, LookupError, TypeError):
        files = json.loads(text)["files"]
    if _text(files) != text:
        raise DamagedError(f"{folder}: {NAME} has other bytes than were written")
    return files


def _unreadable(folder: Path, name: str, error: OSError) -> Exception:
    """Return what a failing read says: a bad sector is damage, all else is as it was."""
    if error.errno != errno.EIO:
        return error
    return DamagedError(f"{folder}: {name} cannot be read: {error.strerror}")


def _text(files: Any) -> bytes:
    """Return the bytes of a manifest: the entries, and a digest of these."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return f"{json.dumps({'files': files, 'sha256': digest}, indent=1)}\n".encode()


def _names(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {path.as_posix() for path in paths} - {NAME}


def _writer(name: str) -> int:
    """Return which process wrote a file, by its path."""
    found = re.search(r"\bprocess_(\d+)(/|$)", name)
    return int(found[1]) if found else 0


def _measured(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": file.tell()}
