"""What users see while work goes on, and the lines it leaves on disk."""

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and push it to disk."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file; none where there is no file."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file whole."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there with all its content, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


class Curve:
    """A training curve: metrics.jsonl, free of clocks, and TensorBoard events beside it."""

    def __init__(self, directory: Path, num_bytes: int):
        """Go on after the first `num_bytes` of metrics.jsonl: the next line replaces the rest."""
        self.path, self.num_bytes = directory / "metrics.jsonl", num_bytes
        self.path.touch()
        self._events = SummaryWriter(str(directory), write_to_disk=True)

    def add(self, phase: str, step: int, loss: float, branch: int | None) -> None:
        """Add the mean loss (nats) of the steps up to `step`; `branch`: where an anneal left."""
        where = {} if branch is None else {"branch": branch}
        os.truncate(self.path, self.num_bytes)
        append_line(self.path, {"phase": phase, **where, "step": step, "loss": loss})
        self.num_bytes = self.path.stat().st_size
        tag = phase if branch is None else f"{phase}/anneal_{branch}"
        self._events.add_scalar(f"loss/{tag}", loss, step)

    def skip(self, num_lines: int) -> bool:
        """Go on after the next lines, which are there from before; say whether they are."""
        with self.path.open("rb") as file:
            file.seek(self.num_bytes)
            are_there = all(file.readline().endswith(b"\n") for _ in range(num_lines))
            if are_there:
                self.num_bytes = file.tell()
        return are_there

    def close(self) -> None:
        """Flush the TensorBoard events."""
        self._events.close()


class Display:
    """The console: a bar over the points of a sweep, one for the stage at work, plain lines."""

    def __init__(self, num_points: int):
        self.console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:g}/{task.total:g}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=3600,
        )
        self._points = self._progress.add_task("sweep", total=num_points)
        self._stage = self._progress.add_task("", total=1, visible=False)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start_stage(self, description: str, total: int) -> None:
        """Show a new bar for the stage at work."""
        self._progress.reset(
            self._stage, description=description, total=max(total, 1), visible=True
        )

    def advance_stage(self, completed: int, note: str) -> None:
        """Show how far the stage is, with its current value."""
        self._progress.update(self._stage, completed=completed, description=note)

    def finish_point(self, text: str) -> None:
        """Count a point as done, and say so in a line with the time that is left."""
        self._progress.advance(self._points)
        task = next(task for task in self._progress.tasks if task.id == self._points)
        left = (task.total or 0) - task.completed
        rate = (task.finished_time or task.elapsed or 0.0) / task.completed
        remaining = str(timedelta(seconds=round(rate * left)))
        self.line(f"[{task.completed:g}/{task.total:g}] {text} (ETA {remaining})")
