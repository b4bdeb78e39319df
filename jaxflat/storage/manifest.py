"""The manifest of a checkpoint: the size and SHA-256 of each of its files.

It is written last, so a folder that has it is complete.
"""

import errno
import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxflat.storage.files import Check, fsync, sha256, write_whole

NAME = "manifest.json"


class DamagedError(ValueError):
    """A file was changed, lost or added since the save; the message is one line that names it."""


def describe_files(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Return {name: {sha256, size}} of the files that one rank has written, flushed to disk.

    Each rank writes the files under its own folder, process_<rank>; rank 0 writes all others too.
    """
    names = sorted(name for name in _list_files(folder) if _writing_rank(name) == rank)
    files = {name: _describe(folder / name) for name in names}
    for name in files:
        fsync(folder / name)
    return files


def write(folder: Path, files: dict[str, dict[str, Any]], assert_owned: Check) -> None:
    """Write folder/manifest.json from the descriptions of all ranks."""
    write_whole(folder / NAME, _encode(dict(sorted(files.items()))), assert_owned)


def verify(folder: Path) -> None:
    """Raise DamagedError that names the first file that is missing or differs from the manifest."""
    files = _read(folder)
    present = _list_files(folder)
    for name in sorted(files.keys() | present):
        if name not in present:
            raise DamagedError(f"{folder}: {name} is missing")
        if name not in files:
            raise DamagedError(f"{folder}: {name} is not in {NAME}")
        try:
            found = _describe(folder / name)
        except OSError as error:
            raise _unreadable(folder, name, error) from error
        if (size := found["size"]) != files[name]["size"]:
            raise DamagedError(f"{folder}: {name} has {size} bytes, not {files[name]['size']}")
        if found != files[name]:
            raise DamagedError(f"{folder}: {name} has changed since it was written")


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a manifest by file; DamagedError unless every byte is as written."""
    try:
        text = (folder / NAME).read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{folder}: {NAME} is missing, so files may be missing too") from None
    except OSError as error:
        raise _unreadable(folder, NAME, error) from error
    files: Any = None
    with suppress(ValueError, LookupError, TypeError):
        files = json.loads(text)["files"]
    if _encode(files) != text:
        raise DamagedError(f"{folder}: {NAME} has changed since it was written")
    return files


def _unreadable(folder: Path, name: str, error: OSError) -> Exception:
    """Return DamagedError for a bad sector, and the error itself for any other failing read."""
    if error.errno != errno.EIO:
        return error
    return DamagedError(f"{folder}: {name} cannot be read: {error.strerror}")


def _encode(files: Any) -> bytes:
    """Return the bytes of a manifest: its entries and their SHA-256."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return f"{json.dumps({'files': files, 'sha256': digest}, indent=1)}\n".encode()


def _list_files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {path.as_posix() for path in paths} - {NAME}


def _writing_rank(name: str) -> int:
    """Return the rank that wrote a file, from its path."""
    found = re.search(r"\bprocess_(\d+)(/|$)", name)
    return int(found[1]) if found else 0


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "size": path.stat().st_size}
