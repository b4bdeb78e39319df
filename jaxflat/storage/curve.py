"""The training curve of a run, as JSON lines and as TensorBoard events.

The lines are in the order of their steps and hold no times, so a repeated run writes the same file.
"""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from jaxflat.storage.leased_folder import Folder

FILE = "metrics.jsonl"

Line = dict[str, Any]
Position = tuple[int, bool]
"""The trunk's step when a line was written, and whether a branch from that step wrote it."""


def tag(phase: str, branch: int | None) -> str:
    """Return the name of a part of the curve: a phase, or an anneal that left it at a step."""
    return phase if branch is None else f"{phase}/anneal_{branch}"


class Curve:
    """A training curve: metrics.jsonl, and events.out.tfevents.* for TensorBoard."""

    def __init__(
        self,
        folder: Folder,
        num_bytes: int = 0,
        step: int = 0,
        position: Callable[[Line], Position] = lambda line: (line["step"], False),
    ):
        """Continue at a step of the trunk; the next line that is added removes all later ones.

        Lines of branches from that step remain until they are added again. num_bytes: how much the
        curve had when it came to that step. Raises ValueError if metrics.jsonl has less of it.
        """
        self._folder = folder
        found = folder.on_rank_0(self._read)
        found_bytes = _num_bytes(line for line in found if position(line) <= (step, False))
        if found_bytes < num_bytes:
            raise ValueError(
                f"{folder.path / FILE}: the file has {found_bytes} bytes of the curve to step "
                f"{step} but its checkpoint recorded {num_bytes}; cannot resume"
            )
        self._lines = {_key(line): line for line in found if position(line) <= (step, True)}
        self._events = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._add_event(file_version="brain.Event:2")

    @property
    def num_bytes(self) -> int:
        """The length of the lines, in bytes."""
        return _num_bytes(self._lines.values())

    def add(self, phase: str, step: int, loss: float, branch: int | None) -> None:
        """Add the mean loss (nats) since the line before.

        branch: the step at which this anneal left the trunk; None on the trunk.
        """
        fields = {} if branch is None else {"branch": branch}
        line = {"phase": phase, **fields, "step": step, "loss": loss}
        self._lines[_key(line)] = line
        self._folder.write_lines(FILE, [self._lines[key] for key in sorted(self._lines)])
        self._add_event(step=step, summary=scalar(f"loss/{tag(phase, branch)}", loss))

    def forget(self, phase: str, branch: int) -> None:
        """Remove the lines of a branch, which trains again from its origin."""
        kept = {key: line for key, line in self._lines.items() if key[1:] != (branch, phase)}
        self._lines = kept

    def has(self, phase: str, branch: int, steps: Iterable[int]) -> bool:
        """Return whether a branch has lines at these steps."""
        return all((step, branch, phase) in self._lines for step in steps)

    def _read(self) -> list[Line]:
        path = self._folder.path / FILE
        content = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in content.split(b"\n")[:-1]]  # without a torn last line

    def _add_event(self, **content: Any) -> None:
        """Append an event. The thread of a SummaryWriter would die on a full disk, and all hang."""
        event = Event(wall_time=time.time(), **content).SerializeToString()
        parts = (struct.pack("<Q", len(event)), event)
        record = b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)
        self._folder.append_bytes(self._events, record)


def _key(line: Line) -> tuple[int, int, str]:
    """Return what lines are sorted by: the trunk's line of a step comes first."""
    return line["step"], line.get("branch", -1), line["phase"]


def _num_bytes(lines: Iterable[Line]) -> int:
    return sum(len(json.dumps(line)) + 1 for line in lines)
