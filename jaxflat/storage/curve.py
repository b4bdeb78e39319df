"""The training curve of a run: JSON lines without clocks, and TensorBoard events beside them."""

import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from jaxflat.distributed import leases, ranks
from jaxflat.storage.files import append, append_line


class Curve:
    """A training curve: metrics.jsonl, and events.out.tfevents.* for TensorBoard."""

    def __init__(self, directory: Path, num_bytes: int):
        """Continue after the first `num_bytes` of metrics.jsonl; the next line replaces the rest.

        Raises ValueError if the file is shorter.
        """
        self.path, self.num_bytes = directory / "metrics.jsonl", num_bytes
        self._check_length()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._events = directory / name
        self._add_event(file_version="brain.Event:2")

    def add(self, phase: str, step: int, loss: float, branch: int | None) -> None:
        """Add the mean loss (nats) since the line before.

        branch: the step at which this anneal left the trunk; None on the trunk.
        """
        fields = {} if branch is None else {"branch": branch}
        self.num_bytes = self._write_line({"phase": phase, **fields, "step": step, "loss": loss})
        tag = phase if branch is None else f"{phase}/anneal_{branch}"
        self._add_event(step=step, summary=scalar(f"loss/{tag}", loss))

    def skip(self, num_lines: int) -> bool:
        """Continue after the next lines if an earlier process has written them; say whether so."""
        end = self._find_end(num_lines)
        self.num_bytes = end or self.num_bytes
        return end is not None

    @ranks.on_rank_0
    def _check_length(self) -> None:
        leases.assert_owned()
        self.path.touch()
        if (found := self.path.stat().st_size) < self.num_bytes:
            raise ValueError(
                f"{self.path}: the file has {found} bytes but its checkpoint recorded "
                f"{self.num_bytes}; cannot resume"
            )

    @ranks.on_rank_0
    def _write_line(self, record: dict[str, Any]) -> int:
        """Replace the rest of the file by a line; return the position of its end."""
        self._check_length()
        os.truncate(self.path, self.num_bytes)
        append_line(self.path, record)
        return self.path.stat().st_size

    @ranks.on_rank_0
    def _find_end(self, num_lines: int) -> int | None:
        """Return the position after the next lines; None if there are fewer."""
        with self.path.open("rb") as file:
            file.seek(self.num_bytes)
            are_whole = all(file.readline().endswith(b"\n") for _ in range(num_lines))
            return file.tell() if are_whole else None

    def _add_event(self, **content: Any) -> None:
        """Append an event. The thread of a SummaryWriter would die on a full disk, and all hang."""
        event = Event(wall_time=time.time(), **content).SerializeToString()
        parts = (struct.pack("<Q", len(event)), event)
        record = b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)
        append(self._events, record)
