"""Leases: let at most one process write a file or folder, and replace a writer that died.

Processes on any hosts that share the folder may compete. The lease on TARGET is the only file in
locks/TARGET beside it. Its name is a number, the token, and ends in ".free" while no process owns
the lease. A process acquires the lease by renaming the file to the next number. If several try,
only one succeeds, because the old name is gone and never returns.

The owner writes a heartbeat into its file every HEARTBEAT seconds. A process that sees no change
for EXPIRY seconds may take the lease over. It measures them on one clock: clocks of two machines
are never compared. An owner that was suspended meanwhile finds its file gone.

This file imports no JAX, so that `jaxflat.status` starts fast.
"""

import itertools
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jaxflat.distributed import preemption

HEARTBEAT, EXPIRY, POLL = 5.0, 30.0, 1.0  # seconds
SILENCE = 300.0  # seconds; ten times EXPIRY, because `find_owner` compares clocks of two machines


class LeaseLost(Exception):
    """Another process has taken over a lease of this process."""


@contextmanager
def acquire_lease(target: Path, report: Callable[[str], object] = print) -> Iterator["Lease"]:
    """Wait for the lease on a file or folder, and own it within the block; yield it.

    `report` gets one line if the wait takes more than two polls.

    Raises Preempted if a signal arrives during the wait.
    """
    lease = Lease(target)
    for attempt in itertools.count():
        if lease.is_available():
            with lease.try_acquire() as acquired:
                if acquired:
                    yield lease
                    return
        if attempt == 2:
            report(f"Waiting for another worker that holds the lease on {target}")
        preemption.stop_if_requested()
        time.sleep(POLL)


class Lease:
    """The lease on a file or folder, as this process sees it."""

    def __init__(self, target: Path):
        """Name the lease; `is_available` reads it, and creates it if there is none."""
        self._folder = target.parent / "locks" / target.name
        self._seen, self._since = ("0.free", b""), time.monotonic()
        self._first: str | None = None
        self._owned: _OwnedFile | None = None

    def is_available(self) -> bool:
        """Read the lease; say whether it has no owner, a dead one, or one silent for EXPIRY."""
        if self._first is None and not self._folder.is_dir():
            _create(self._folder)
        now = time.monotonic()  # before the read: a suspension in between is not silence
        if (seen := _read(self._folder)) is not None and seen != self._seen:
            self._seen, self._since = seen, now
        if self._first is None:
            self._first = self._seen[0]
        return seen is not None and (_is_free(*seen) or now - self._since > EXPIRY)

    def was_acquired(self) -> bool:
        """Say whether any process acquired the lease between the first and the latest read."""
        return _token(self._seen[0]) > _token(self._first or self._seen[0])

    def assert_owned(self) -> None:
        """Raise LeaseLost unless this process owns the lease.

        Call it right before every write that the lease guards. A process that is suspended between
        the two for longer than EXPIRY still finishes that one write. Such writes must therefore be
        atomic, and valid whichever owner makes them.
        """
        if self._owned is None:
            raise LeaseLost(f"{self._folder}: this process does not hold this lease")
        if self._owned.is_lost():
            raise LeaseLost(f"{self._owned.path}: another process has taken over this lease")

    @contextmanager
    def try_acquire(self) -> Iterator[bool]:
        """Own the lease within the block, after `is_available`; yield False if it changed since."""
        token = _token(self._seen[0]) + 1
        owner = json.dumps([token, process_identity(os.getpid())]).encode() + b"\n"
        owned = _OwnedFile(self._folder / str(token), owner)
        if not _rename(self._folder / self._seen[0], owned.path):
            yield False
            return
        ended = threading.Event()
        thread = threading.Thread(target=owned.write_heartbeats, args=(ended,), daemon=True)
        thread.start()
        self._owned = owned
        try:
            owned.write_heartbeat(0)
            yield True
        finally:
            self._owned = None
            ended.set()
            thread.join()
            _rename(owned.path, owned.path.with_suffix(".free"))


@dataclass(frozen=True)
class _OwnedFile:
    """The file of a lease that this process acquired, and the first line that it writes there."""

    path: Path
    owner: bytes

    def is_lost(self) -> bool:
        """Say whether the file is gone or belongs to another process."""
        try:
            # NFS may resolve the old name for a while, but then shows the new owner's content.
            return not self.path.read_bytes().startswith(self.owner)
        except FileNotFoundError:
            return True

    def write_heartbeat(self, number: int) -> None:
        """Write a number into the file, unless it is gone. Raises OSError that names the file."""
        try:
            with self.path.open("r+b") as file:
                file.write(b"%s%d\n" % (self.owner, number))
                file.truncate()
        except FileNotFoundError:
            pass
        except OSError as error:  # on a full disk the error itself names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def write_heartbeats(self, ended: threading.Event) -> None:
        """Write a heartbeat every HEARTBEAT seconds until `ended` is set."""
        for number in itertools.count(1):
            if ended.wait(HEARTBEAT):
                return
            with suppress(OSError):  # the next one may succeed
                if not self.is_lost():
                    self.write_heartbeat(number)


def find_owner(target: Path, now: float) -> str | None:
    """Return a name for the process that owns the lease on a file or folder, without competing.

    Returns None if the lease is free, or if its owner is known to be dead. Also returns None if
    the owner has been silent for SILENCE seconds at `now` (seconds, as time.time). On systems
    without /proc all processes have the same name.
    """
    folder = target.parent / "locks" / target.name
    if (seen := _read(folder)) is None or _is_free(*seen):
        return None
    with suppress(FileNotFoundError):  # another process is renaming it
        if now - (folder / seen[0]).stat().st_mtime > SILENCE:
            return None
    return " ".join(map(str, _owner_identity(*seen))) or "a process"


def process_identity(pid: int) -> list[str | int]:
    """Return [boot, PID namespace, user, PID, start time]: unique among all processes ever.

    Returns [] if there is no such process, or if the system has no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")  # a title may be any bytes
        state, *fields = stat.rpartition(") ")[2].split()
        started = fields[18]  # the system reuses a PID, but not with the same start time
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return []
    return [] if state in "ZX" else [boot, namespace, os.getuid(), pid, started]


def _is_known_dead(identity: list[str | int]) -> bool:
    """Say whether a process that ran on this machine since its boot has ended.

    False for processes of other users, which /proc may hide, and of other containers.
    """
    this = process_identity(os.getpid())
    if not this or identity[:3] != this[:3]:
        return False
    return process_identity(int(identity[3])) != identity


def _read(folder: Path) -> tuple[str, bytes] | None:
    """Return the name and content of a lease's file; None if it is absent or being renamed."""
    with suppress(FileNotFoundError, ValueError):
        name = max((name for name in os.listdir(folder) if name[0].isdigit()), key=_token)
        return name, (folder / name).read_bytes()
    return None


def _token(name: str) -> int:
    """Return the number in a file's name."""
    return int(name.partition(".")[0])


def _is_free(name: str, content: bytes) -> bool:
    """Say whether the lease has no owner, or one that is known to be dead."""
    return name.endswith(".free") or _is_known_dead(_owner_identity(name, content))


def _owner_identity(name: str, content: bytes) -> list[str | int]:
    """Return the `process_identity` of the owner; [] until the owner has written it."""
    with suppress(ValueError):
        number, identity = json.loads(content.partition(b"\n")[0])
        if number == _token(name):
            return identity
    return []


def _create(folder: Path) -> None:
    """Create a lease without an owner; keep one that another process has just created."""
    new = folder.with_name(f".{uuid.uuid4().hex}")
    try:
        new.mkdir(parents=True)
        (new / "0.free").touch()
        new.rename(folder)  # fails if the folder exists and holds a file
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        if not folder.is_dir():
            raise


def _rename(old: Path, new: Path) -> bool:
    """Rename a file; say whether it existed."""
    with suppress(FileNotFoundError):
        old.rename(new)
        return True
    return False
