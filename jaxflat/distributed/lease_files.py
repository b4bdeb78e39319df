"""What a lock's file says: its number, who holds it, and whether that one is known to be dead."""

import json
import os
from contextlib import suppress
from pathlib import Path

from jaxflat.distributed import processes

SILENT = 300.0  # seconds without a sign of life; ten leases, as clocks of two machines differ


def holder(target: Path, now: float) -> str | None:
    """Return a name for the process that has the lock of a file or folder, to look at from outside.

    None where it is free, or its holder known to be dead or silent for long at `now` (seconds, as
    time.time). Where a system has no /proc, all its processes have one name.
    """
    folder = target.parent / "locks" / target.name
    if (seen := newest(folder)) is None or is_free(*seen):
        return None
    with suppress(FileNotFoundError):  # it is being renamed
        if now - (folder / seen[0]).stat().st_mtime > SILENT:
            return None
    return " ".join(map(str, owner(*seen))) or "a process"


def newest(folder: Path) -> tuple[str, bytes] | None:
    """Return the name and content of a lock's file; None while it is renamed, or there is none."""
    with suppress(FileNotFoundError, ValueError):
        name = max((name for name in os.listdir(folder) if name[0].isdigit()), key=token)
        return name, (folder / name).read_bytes()
    return None


def token(name: str) -> int:
    """Return the number in a file's name."""
    return int(name.partition(".")[0])


def is_free(name: str, content: bytes) -> bool:
    """Say whether nobody holds the lock, or a process that is known to be dead."""
    return name.endswith(".free") or processes.is_dead(owner(name, content))


def owner(name: str, content: bytes) -> list[str | int]:
    """Return the identity of the process that holds the lock; nothing before it has written it."""
    with suppress(ValueError):
        number, identity = json.loads(content.partition(b"\n")[0])
        if number == token(name):
            return identity
    return []
