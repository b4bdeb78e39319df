"""What the commands share: flags, error lines, exit codes, the console, and a sweep's progress.

This file imports no JAX: parsing a command's arguments and `jaxflat.status` need none.
"""

import argparse
import functools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from typing import Any, NamedTuple, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from jaxflat.config.validation import InputError
from jaxflat.distributed import leases, preemption, ranks
from jaxflat.storage.files import DISK_FULL

EXIT_NOT_HOLDING, EXIT_UNUSABLE_INPUT, EXIT_SOME_FAILED, EXIT_PREEMPTED = 1, 2, 3, 75
FILE_WIDTH = 100_000  # columns of output to a file: no table is cut and no line wrapped


class CommandParser(argparse.ArgumentParser):
    """A parser that raises InputError on a wrong flag, and accepts no abbreviated flags."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def command(
    *unusable: type[Exception], interrupted: str = "state saved. Run the same command to resume."
) -> Callable[[Callable[[list[str]], int]], Callable[..., int]]:
    """Decorate the main function of a command: errors become one line on stderr and an exit code.

    Without arguments, it parses sys.argv. unusable: the exceptions that mean unusable
    input, in addition to InputError and ClusterError; others keep their traceback. interrupted:
    what the line after a signal says about the work.
    """

    def decorate(run: Callable[[list[str]], int]) -> Callable[..., int]:
        @functools.wraps(run)
        def main(arguments: list[str] | None = None) -> int:
            try:
                with plain_warnings():
                    return run(sys.argv[1:] if arguments is None else arguments)
            except preemption.Preempted as signal:
                line, code = f"Interrupted by {signal}; {interrupted}", EXIT_PREEMPTED
            except leases.LeaseLost as error:
                line, code = f"Stopped: {error}. Run the same command to resume.", EXIT_PREEMPTED
            except Exception as error:
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    line = (
                        f"error: {error}. Free some space and rerun the same command to continue."
                    )
                    code = EXIT_SOME_FAILED
                elif isinstance(error, (InputError, ranks.ClusterError, *unusable)):
                    line, code = f"error: {first_line(error)}", EXIT_UNUSABLE_INPUT
                else:
                    raise
            print(line, file=sys.stderr)
            return code

        return main

    return decorate


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def make_console() -> Console:
    """Return the console for stdout, quiet on other ranks than 0; files get FILE_WIDTH columns.

    Notebooks get plain lines, as files do: rich's bars need ipywidgets there.
    """
    quiet = not ranks.is_rank_0()
    console = Console(quiet=quiet)
    if console.is_jupyter:  # a kernel's environment claims to be a terminal
        console = Console(quiet=quiet, force_jupyter=False, force_terminal=False)
    if not console.file.isatty():  # rich's is_terminal may be set by the environment
        console.width = FILE_WIDTH
    return console


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print each warning of a jaxflat class once, as one line on stderr, on rank 0 only.

    Other warnings are shown as before.
    """
    show_as_before, shown = warnings.showwarning, set()

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not category.__module__.startswith("jaxflat."):
            show_as_before(message, category, *where)
        elif ranks.is_rank_0() and str(message) not in shown:
            shown.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = show_as_before


class Kind(NamedTuple):
    """The settings that points share if they take equally long.

    settings: see `point_kind`. size: a first guess at the time, in any unit, such as a number of
    stages. It counts until a point of the kind has finished.
    """

    settings: str
    size: int = 1


class PointTime(NamedTuple):
    """A finished point: its kind, its seconds without compilation, and seconds of compilation."""

    kind: Kind
    seconds: float
    compiling: float


def point_kind(overrides: Mapping[str, Any], size: int = 1) -> Kind:
    """Return the kind of a point: its overrides without the seeds, which cost no time."""
    chosen = {key: value for key, value in overrides.items() if not key.endswith("seed")}
    return Kind(json.dumps(chosen, sort_keys=True, default=str), size)


def estimate_remaining(finished: Iterable[PointTime], left: Iterable[tuple[Kind, float]]) -> float:
    """Return the seconds that the points `left` take: (kind, seconds already spent) of each.

    A point takes as long as the finished points of its kind on average. The first point of a new
    kind also compiles, as long as the average kind did. Points of a new kind take the average time
    of the others, in proportion to their sizes.
    """
    running: dict[Kind, list[float]] = {}
    compiling: dict[Kind, float] = {}
    for kind, seconds, compiled in finished:
        running.setdefault(kind, []).append(seconds)
        compiling[kind] = compiling.get(kind, 0.0) + compiled
    expected = {kind: fmean(seconds) for kind, seconds in running.items()}
    of_size_1 = fmean(seconds / kind.size for kind, seconds in expected.items())
    to_compile = fmean(compiling.values())
    remaining, compiled = 0.0, set(expected)
    for kind, spent in left:
        due = expected.get(kind, kind.size * of_size_1) + (kind not in compiled) * to_compile
        remaining += max(due - spent, 0.0)
        compiled.add(kind)
    return remaining


class Display:
    """A progress bar for the points of a sweep, one for the current stage, and plain lines."""

    def __init__(
        self,
        num_points: int,
        done: Collection[str] = (),
        kinds: Mapping[str, Kind] | None = None,
        compile_seconds: Callable[[], float] = lambda: 0.0,
    ):
        """Start with `num_points` points; `done` names those that earlier runs finished.

        kinds: the kind of each point; None: all have the same. compile_seconds: returns the seconds
        that this process has spent on compilation.
        """
        self.console = make_console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:g}/{task.total:g}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            _Remaining(),
            console=self.console,
            speed_estimate_period=3600,
        )
        self._done, self._kinds, self._compile_seconds = done, kinds or {}, compile_seconds
        names = self._kinds.keys() - done
        anonymous = [Kind("")] * (0 if kinds else num_points - len(done))
        self._left = Counter([*map(self._kind, names), *anonymous])
        self._finished: list[PointTime] = []
        end = None if self._left else 0.0
        self._sweep = self._progress.add_task("sweep", total=num_points, end=end)
        self._stage = self._progress.add_task("", total=1, visible=False)
        self._awaited = ""
        self._accounted, self._compiled = 0.0, compile_seconds()
        self._ahead: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def print_line(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start_stage(self, description: str, total: int) -> None:
        """Show a new bar for a stage of `total` units."""
        self._progress.reset(
            self._stage, description=description, total=max(total, 1), visible=True
        )

    def advance_stage(self, completed: int, note: str) -> None:
        """Show the finished units of the stage, and a note such as its current loss."""
        self._progress.update(self._stage, completed=completed, description=note)

    def print_wait(self, text: str) -> None:
        """Print what the sweep waits for, unless the line before said the same."""
        if text != self._awaited:
            self.print_line(text)
        self._awaited = text

    def finish_preparations(self) -> None:
        """Exclude the time until now, which served all points, from the estimate for one point."""
        self._accounted, self._compiled = self._elapsed, self._compile_seconds()

    def add_seconds(self, name: str, seconds: float, compiling: float = 0.0) -> None:
        """Add time spent on a point that finishes later, perhaps after other points.

        compiling: the part of it that went into compilation.
        """
        self._accounted, self._compiled = self._accounted + seconds, self._compiled + compiling
        old = self._ahead.get(name, (0.0, 0.0))
        self._ahead[name] = old[0] + seconds - compiling, old[1] + compiling

    def finish_point(self, name: str, outcome: str) -> None:
        """Count a point as finished, and print a line with the remaining time."""
        self._progress.advance(self._sweep)
        task = self._progress.tasks[self._sweep]
        text = f"[{task.completed:g}/{task.total:g}] {name}: {outcome}"
        ahead, compiled_ahead = self._ahead.pop(name, (0.0, 0.0))
        if name not in self._done:
            seconds = self._elapsed - self._accounted
            compiling = self._compile_seconds() - self._compiled
            point = (seconds - compiling + ahead, compiling + compiled_ahead)
            self._finished.append(PointTime(self._kind(name), *point))
            self._left[self._kind(name)] -= 1
            self._accounted, self._compiled = self._elapsed, self._compile_seconds()
            remaining = estimate_remaining(self._finished, self._spent())
            self._progress.update(self._sweep, end=self._elapsed + remaining)
            text += f" (ETA {timedelta(seconds=round(remaining))})"
        self.print_line(text)

    def _spent(self) -> list[tuple[Kind, float]]:
        """Return (kind, seconds already spent) of each point that is not finished."""
        ahead = [(self._kind(name), seconds) for name, (seconds, _) in self._ahead.items()]
        untouched = self._left - Counter(kind for kind, _ in ahead)
        return ahead + [(kind, 0.0) for kind in untouched.elements()]

    def _kind(self, name: str) -> Kind:
        return self._kinds.get(name, Kind(""))

    @property
    def _elapsed(self) -> float:
        return self._progress.tasks[self._sweep].elapsed or 0.0


class _Remaining(TimeRemainingColumn):
    """The remaining time: for the sweep until its `end` (seconds after its start), else rich's."""

    def render(self, task: Task) -> Text:
        if "end" not in task.fields:
            return super().render(task)
        if (end := task.fields["end"]) is None:
            return Text("-:--:--", style="progress.remaining")
        left = timedelta(seconds=round(max(end - (task.elapsed or 0.0), 0.0)))
        return Text(str(left), style="progress.remaining")
