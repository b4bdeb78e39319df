"""Locks among processes on any hosts that share a folder: one holder at a time, and none for ever.

The lock of TARGET is the one file in locks/TARGET beside it. Its name is a number, the token, and
".free" behind it while nobody holds the lock; who renames it to the next number has it. Of several
that try one succeeds: the old name is gone then, and never comes back. The holder writes into its
file every BEAT seconds. Who sees no change for LEASE seconds of its own clock may take the lock
over; clocks of two machines are never compared. A holder that slept meanwhile finds its file gone.
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

from jaxflat.distributed import lease_files, preemption, processes

BEAT, LEASE, POLL = 5.0, 30.0, 1.0  # seconds


class Lost(Exception):
    """Another process has taken over what this one held."""


def check() -> None:
    """Raise Lost where a lock of this process has been taken over.

    It stands right before each write that a lock is for. One that stops between the two for longer
    than LEASE still does that one write, so a write should be whole and of what any holder writes.
    """
    for held in _held:
        if held.is_lost():
            raise Lost(f"{held.path}: another process has taken it over")


@contextmanager
def alone(target: Path, say: Callable[[str], object] = print) -> Iterator[None]:
    """Hold the lock of a file or folder; `say` what is waited for where it takes a while.

    Raises Preempted where a signal comes meanwhile.
    """
    lock = Lock(target)
    for attempt in itertools.count():
        if lock.look():
            with lock.taken() as taken:
                if taken:
                    yield
                    return
        if attempt == 2:
            say(f"waiting for another worker, which is at {target}")
        preemption.check()
        time.sleep(POLL)


class Lock:
    """The lock of a file or folder, as one process sees it."""

    def __init__(self, target: Path):
        """Look at the lock for the first time; make it where there is none."""
        self._folder = target.parent / "locks" / target.name
        self._seen, self._since = ("0.free", b""), time.monotonic()
        if not self._folder.is_dir():
            _make(self._folder)
        self.look()
        self._first = self._seen[0]

    def look(self) -> bool:
        """Say whether the lock may be taken: free, or its holder is dead or silent for LEASE."""
        now = time.monotonic()  # before it reads: a sleep in between is not the holder's silence
        if (seen := lease_files.newest(self._folder)) is None:
            return False
        if seen != self._seen:
            self._seen, self._since = seen, now
        return lease_files.is_free(*seen) or now - self._since > LEASE

    def was_taken(self) -> bool:
        """Say whether, at the last look, anyone had taken the lock since the first look."""
        return lease_files.token(self._seen[0]) > lease_files.token(self._first)

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Hold the lock, which the last look has allowed; give False where it changed since."""
        token = lease_files.token(self._seen[0]) + 1
        owner = json.dumps([token, processes.identity(os.getpid())]).encode() + b"\n"
        held = _Held(self._folder / str(token), owner)
        if not _rename(self._folder / self._seen[0], held.path):
            yield False
            return
        ended = threading.Event()
        thread = threading.Thread(target=held.beat_until, args=(ended,), daemon=True)
        thread.start()
        _held.append(held)
        try:
            held.beat(0)
            yield True
        finally:
            _held.remove(held)
            ended.set()
            thread.join()
            _rename(held.path, held.path.with_suffix(".free"))


@dataclass(frozen=True)
class _Held:
    """A lock that this process holds: its file, and the line with which that begins."""

    path: Path
    owner: bytes

    def is_lost(self) -> bool:
        """Say whether the file is gone, or another's."""
        try:
            # Over NFS a file may be found by its old name for a while, but with its new content.
            return not self.path.read_bytes().startswith(self.owner)
        except FileNotFoundError:
            return True

    def beat(self, number: int) -> None:
        """Write into the file, unless it is gone. Raises OSError naming it."""
        try:
            with self.path.open("r+b") as file:
                file.write(b"%s%d\n" % (self.owner, number))
                file.truncate()
        except FileNotFoundError:
            pass
        except OSError as error:  # one of a full disk names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def beat_until(self, ended: threading.Event) -> None:
        """Write into the file every BEAT seconds."""
        for number in itertools.count(1):
            if ended.wait(BEAT):
                return
            with suppress(OSError):  # the next may succeed
                if not self.is_lost():
                    self.beat(number)


_held: list[_Held] = []


def _make(folder: Path) -> None:
    """Make a lock that nobody holds, or leave it: a folder does not replace one that has a file."""
    new = folder.with_name(f".{uuid.uuid4().hex}")
    try:
        new.mkdir(parents=True)
        (new / "0.free").touch()
        new.rename(folder)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        if not folder.is_dir():
            raise


def _rename(old: Path, new: Path) -> bool:
    """Rename a file; say whether it was there."""
    with suppress(FileNotFoundError):
        old.rename(new)
        return True
    return False
