"""The lines that work leaves on disk, each whole or not there."""

import json
import os
import socket
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from jaxflat.distributed import leases, ranks


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and push it to disk. Raises LeaseLost, as `leases.assert_owned`."""
    _append(path, f"{json.dumps(record)}\n".encode())


@ranks.on_rank_0
def _append(path: Path, content: bytes) -> None:
    """Append to a file and push it to disk; OSError, and no part of it, where that is full."""
    leases.assert_owned()
    with _naming(path), path.open("ab", buffering=0) as file:
        num_bytes = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(num_bytes)
            raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file; none where there is no file."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return
    yield from map(json.loads, lines)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file whole."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, in a folder that is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1) + "\n")


@ranks.on_rank_0
def write_whole(path: Path, text: str) -> None:
    """Write a file that is there with all its content, or as it was before."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with _naming(path):
            temporary.write_text(text)
            leases.assert_owned()
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name a file in an OSError of writing it: one of a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class Curve:
    """A training curve: metrics.jsonl, free of clocks, and TensorBoard events beside it."""

    def __init__(self, directory: Path, num_bytes: int):
        """Go on after the first `num_bytes` of metrics.jsonl; the next line replaces what follows.

        Raises ValueError where there are fewer.
        """
        self.path, self.num_bytes = directory / "metrics.jsonl", num_bytes
        self._check_length()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._events = directory / name
        self._add_event(file_version="brain.Event:2")

    def add(self, phase: str, step: int, loss: float, branch: int | None) -> None:
        """Add the mean loss (nats) of the steps up to `step`; `branch`: where an anneal left."""
        where = {} if branch is None else {"branch": branch}
        self.num_bytes = self._put({"phase": phase, **where, "step": step, "loss": loss})
        tag = phase if branch is None else f"{phase}/anneal_{branch}"
        self._add_event(step=step, summary=scalar(f"loss/{tag}", loss))

    def skip(self, num_lines: int) -> bool:
        """Go on after the next lines, where an earlier process left them; say whether it did."""
        end = self._after(num_lines)
        self.num_bytes = end or self.num_bytes
        return end is not None

    @ranks.on_rank_0
    def _check_length(self) -> None:
        leases.assert_owned()
        self.path.touch()
        if (found := self.path.stat().st_size) < self.num_bytes:
            raise ValueError(f"{self.path}: {found} bytes; {self.num_bytes} have been seen")

    @ranks.on_rank_0
    def _put(self, line: dict[str, Any]) -> int:
        """Write a line in the place of what followed; return where it ends."""
        self._check_length()
        os.truncate(self.path, self.num_bytes)
        append_line(self.path, line)
        return self.path.stat().st_size

    @ranks.on_rank_0
    def _after(self, num_lines: int) -> int | None:
        """Return where the next lines end; None where there are fewer."""
        with self.path.open("rb") as file:
            file.seek(self.num_bytes)
            are_there = all(file.readline().endswith(b"\n") for _ in range(num_lines))
            return file.tell() if are_there else None

    def _add_event(self, **content: Any) -> None:
        """Not by a SummaryWriter, whose thread dies where the disk is full, and all wait for it."""
        event = Event(wall_time=time.time(), **content).SerializeToString()
        parts = (struct.pack("<Q", len(event)), event)
        record = b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)
        _append(self._events, record)
