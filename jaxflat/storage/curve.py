"""The training curve of a run, as JSON lines and as TensorBoard events.

The lines hold no times, so a repeated run writes the same file.
"""

import socket
import struct
import time
from typing import Any

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from jaxflat.storage.leased_folder import Folder

FILE = "metrics.jsonl"


def tag(phase: str, branch: int | None) -> str:
    """Return the name of a part of the curve: a phase, or an anneal that left it at a step."""
    return phase if branch is None else f"{phase}/anneal_{branch}"


class Curve:
    """A training curve: metrics.jsonl, and events.out.tfevents.* for TensorBoard."""

    def __init__(self, folder: Folder, num_bytes: int):
        """Continue after the first `num_bytes` of metrics.jsonl; the next line replaces the rest.

        Raises ValueError if the file is shorter.
        """
        self._folder, self.num_bytes = folder, num_bytes
        self._check_length()
        self._events = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._add_event(file_version="brain.Event:2")

    def add(self, phase: str, step: int, loss: float, branch: int | None) -> None:
        """Add the mean loss (nats) since the line before.

        branch: the step at which this anneal left the trunk; None on the trunk.
        """
        fields = {} if branch is None else {"branch": branch}
        record = {"phase": phase, **fields, "step": step, "loss": loss}
        self.num_bytes = self._folder.on_rank_0(self._replace_end, record)
        self._add_event(step=step, summary=scalar(f"loss/{tag(phase, branch)}", loss))

    def skip(self, num_lines: int) -> bool:
        """Continue after the next lines if an earlier process has written them; say whether so."""
        end = self._folder.on_rank_0(self._find_end, num_lines)
        self.num_bytes = end or self.num_bytes
        return end is not None

    def _check_length(self) -> None:
        if (found := self._folder.touch(FILE)) < self.num_bytes:
            raise ValueError(
                f"{self._folder.path / FILE}: the file has {found} bytes but its checkpoint "
                f"recorded {self.num_bytes}; cannot resume"
            )

    def _replace_end(self, record: dict[str, Any]) -> int:
        """Replace the rest of the file by a line; return the position of its end."""
        self._check_length()
        self._folder.truncate(FILE, self.num_bytes)
        self._folder.append_line(FILE, record)
        return self._folder.touch(FILE)

    def _find_end(self, num_lines: int) -> int | None:
        """Return the position after the next lines; None if there are fewer."""
        with (self._folder.path / FILE).open("rb") as file:
            file.seek(self.num_bytes)
            are_whole = all(file.readline().endswith(b"\n") for _ in range(num_lines))
            return file.tell() if are_whole else None

    def _add_event(self, **content: Any) -> None:
        """Append an event. The thread of a SummaryWriter would die on a full disk, and all hang."""
        event = Event(wall_time=time.time(), **content).SerializeToString()
        parts = (struct.pack("<Q", len(event)), event)
        record = b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)
        self._folder.append_bytes(self._events, record)
