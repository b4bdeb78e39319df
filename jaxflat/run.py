"""The story of one run, stage by stage: train, evaluate, measure flatness, probe.

Stages meet on disk. Each reads the run's checkpoints and writes lines of its own; a stage whose
lines are there under the same settings is skipped, and one that was cut off goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat import experiment, preemption
from jaxflat.config import Config
from jaxflat.metrics import Display, append_line, read_lines, write_json, write_lines
from jaxflat.stages.evaluate import evaluate
from jaxflat.stages.flatness import flatness
from jaxflat.stages.probe import probe
from jaxflat.stages.train import train

STAGES = ("train", "flatness", "probes", "report")

TRAINING_KEYS = tuple(
    ["language", "model", "phase_order", "phases", "training", "data_seed", "init_seed"]
)
"""What decides the trained model. All other keys decide how it is measured, or where it runs."""

MEASUREMENT_KEYS = {
    "evaluation": ("evaluation",),
    "flatness": ("flatness", "probe_seed"),
    "probes": ("probes", "probe_seed"),
}
"""What each file of measurements depends on, besides the trained model."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, its overrides, its resolved config and its folder."""

    name: str
    overrides: dict[str, Any]
    config: Config
    directory: Path


def run_point(point: Point, stages: tuple[str, ...], display: Display) -> None:
    """Bring a point up to date with its config, as far as `stages` go."""
    trained = bool(point.config.phase_order)
    if "train" in stages:
        if trained:
            seconds = time.perf_counter()
            train(point.config, point.directory, display)
            _log_time(point, "train", time.perf_counter() - seconds)
        measure(point, "evaluation", evaluate, display)
    if "flatness" in stages and trained:
        measure(point, "flatness", flatness, display)
    if "probes" in stages:
        measure(point, "probes", probe, display)


def measure(point: Point, name: str, measurement: Callable[..., Any], display: Display) -> None:
    """Append `measurement(point, step)`'s records to <name>.jsonl for each measured checkpoint.

    Records made under other settings are dropped first.
    """
    path, status = point.directory / f"{name}.jsonl", read_status(point.directory)
    settings = fingerprint(point.config, (*TRAINING_KEYS, *MEASUREMENT_KEYS[name]))
    if status.get("measured", {}).get(name) != settings:
        path.unlink(missing_ok=True)
        measured = status.get("measured", {}) | {name: settings}
        write_json(point.directory / "status.json", status | {"measured": measured})
    done = {record["step"] for record in read_lines(path)}
    steps = experiment.measured_steps(point.config)
    display.start_stage(name, len(steps))
    for number, step in enumerate(steps, start=1):
        if step not in done:
            preemption.check()
            seconds = time.perf_counter()
            records = [*read_lines(path), *measurement(point.config, point.directory, step)]
            write_lines(path, records)
            _log_time(point, name, time.perf_counter() - seconds)
        display.advance_stage(number, name)


def read_status(directory: Path) -> dict[str, Any]:
    """Return a point's status: state, reason, and the settings its measurements were made under."""
    path = directory / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_status(directory: Path, state: str, reason: str = "") -> None:
    """Record a point's state: running, done, failed or preempted."""
    status = read_status(directory) | {"state": state, "reason": reason}
    write_json(directory / "status.json", status)


def fingerprint(config: Config, keys: tuple[str, ...]) -> str:
    """Return a short hash of these top-level keys of a config."""
    chosen = {key: config[key] for key in keys}
    text = FrozenConfigDict(chosen).to_json(sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _log_time(point: Point, stage: str, seconds: float) -> None:
    append_line(point.directory / "timing.jsonl", {"stage": stage, "seconds": round(seconds, 3)})
