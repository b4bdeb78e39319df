"""Timing of compiled functions, and a measured figure with its spread."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Figure:
    """The median, the least and the greatest of repeated measurements."""

    median: float
    min: float
    max: float
    unit: str


def summarize(values: Sequence[float], unit: str) -> Figure:
    """Return the figure of repeated measurements."""
    return Figure(statistics.median(values), min(values), max(values), unit)


class Stopwatch:
    """Times `run(n)`, which does a piece of work n times and returns arrays that depend on it.

    The first call compiles. n then grows until one call takes `seconds`, so that the dispatch of a
    call and the clock are negligible.
    """

    def __init__(self, run: Callable[[int], Any], seconds: float):
        self._run = run
        self.num_pieces = 1
        self._time(1)
        while (elapsed := self._time(self.num_pieces)) < seconds:
            growth = min(1.2 * seconds / elapsed, 10)
            self.num_pieces = math.ceil(growth * self.num_pieces)

    def seconds(self) -> float:
        """Return the seconds of one piece of work, from one timed call."""
        return self._time(self.num_pieces) / self.num_pieces

    def _time(self, num_pieces: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self._run(num_pieces))
        return time.perf_counter() - start


def repeated(function: Callable[[], Any], num_times: int) -> Any:
    """Call a function several times, each after the previous result; return the last result."""
    result = None
    for _ in range(num_times):
        result = jax.block_until_ready(function())
    return result
