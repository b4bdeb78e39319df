"""Store measurements as JSON lines, and measure only those that are missing or outdated.

A measurement (evaluation, flatness, probes) is a list of measures. Each line names its measure and
a digest of the settings on which this measure depends. So the lines of a measure stay current when
the settings of other measures change, or when measures are added.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.distributed import preemption, sharding
from jaxflat.distributed.compilation_time import Watch
from jaxflat.flatness import Estimate
from jaxflat.flatness.measures import LEARNING_COEFFICIENT
from jaxflat.runs import builders, trajectory
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder

Line = dict[str, Any]
Estimates = dict[str, Estimate]


class PartialResults:
    """The finished parts of one checkpoint's measurement, saved when a signal interrupts it.

    Without a folder nothing is saved. Results are reused only under the settings that made them.
    """

    def __init__(
        self, folder: Folder | None = None, file: str = "", name: str = "", settings: Any = None
    ):
        self._folder, self._file, self._name, self._settings = folder, file, name, settings
        stored = folder.read_json(file) if folder else {}
        self._values = stored.get(name, {}) if stored.get("settings") == settings else {}

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return compute(), a JSON value, or the value that it returned before an interruption."""
        if name not in self._values:
            self._values[name] = compute()
            self.stop_if_requested()
        return self._values[name]

    def estimates(self, name: str, compute: Callable[[], Estimates]) -> Estimates:
        """Return compute(), or the estimates that it returned before an interruption."""

        def numbers() -> dict[str, Any]:
            return {
                key: (float(e.mean), float(e.sem), e.num_samples, e.over)
                for key, e in sharding.to_host(compute()).items()
            }

        return {
            key: Estimate(jnp.asarray(mean), jnp.asarray(sem), num_samples, over)
            for key, (mean, sem, num_samples, over) in self.value(name, numbers).items()
        }

    def stop_if_requested(self) -> None:
        """Save the results and raise Preempted if a signal has come."""
        if folder := self._folder:
            stored = {"settings": self._settings, self._name: self._values}
            preemption.stop_if_requested(lambda: folder.write_json(self._file, stored))


class Measurement(NamedTuple):
    """One kind of measurement of a run's checkpoints.

    stage: the name in --stages that makes it. section: its section of the config, and the name of
    its file, <section>.jsonl.
    settings(config) -> {measure: all settings on which its numbers depend, except training's}.
    measure(config, folder, checkpoint, measures, partial_results) yields (measure, its estimates by
    column) for each of `measures`. It makes long computations through `partial_results`.
    """

    stage: str
    section: str
    settings: Callable[[Config], dict[str, Any]]
    measure: Callable[
        [Config, Folder, Checkpoint, Sequence[str], PartialResults], Iterator[tuple[str, Estimates]]
    ]

    def digests(self, config: Config) -> dict[str, str]:
        """Return a digest of each measure's settings."""
        return {name: _digest(chosen) for name, chosen in self.settings(config).items()}

    def digests_without_seed(self, config: Config) -> dict[str, str]:
        """Return the digests with probe_seed 0, which are the same for all seeds of a sweep."""
        same = ConfigDict(config)
        same.probe_seed = 0
        return self.digests(FrozenConfigDict(same))

    def recorded(self, config: Config) -> dict[str, Any]:
        """Return the digests by which sweep.json records which lines of the file are current.

        `section` and `probe_seed` identify files whose lines do not name their settings. jaxflat
        wrote such files up to version 0.1.0.
        """
        section = hashlib.sha256(config[self.section].to_json(sort_keys=True).encode())
        seeds = {} if self.section == "evaluation" else {"probe_seed": config.probe_seed}
        return {"measures": self.digests(config), "section": section.hexdigest()[:16], **seeds}

    def is_done(self, config: Config, folder: Folder) -> bool:
        """Return whether every measure of every checkpoint has lines under the present settings.

        `measure_missing` deletes the partial results of an interrupted measurement.
        """
        if (folder.path / f"{self.section}.unfinished.json").exists():
            return False
        recorded = self.recorded(config)
        done = _measured_pairs(current_lines(folder, self.section, recorded), recorded["measures"])
        measured_checkpoints = trajectory.measured_checkpoints(config)
        return done >= {
            (checkpoint, name)
            for checkpoint in measured_checkpoints
            for name in recorded["measures"]
        }

    def measure_missing(self, config: Config, folder: Folder, display: Display) -> None:
        """Delete the lines of other settings, and make the missing measurements.

        The lines of a checkpoint's measure are written together, when all are measured. A value
        that is not finite is written, too, and `display` gets a warning. Matrix products run at
        full float32 precision, even if an accelerator's default is lower.
        """
        recorded = self.recorded(config)
        file, unfinished = f"{self.section}.jsonl", f"{self.section}.unfinished.json"
        done = folder.on_rank_0(_drop_outdated, folder, self.section, recorded)
        measured_checkpoints = trajectory.measured_checkpoints(config)
        display.start_stage(self.section, len(measured_checkpoints))
        for number, checkpoint in enumerate(measured_checkpoints, start=1):
            due = [name for name in recorded["measures"] if (checkpoint, name) not in done]
            if due:
                preemption.stop_if_requested()
                watch = Watch()
                name = f"{checkpoint.folder}/{checkpoint.step}"
                partial_results = PartialResults(folder, unfinished, name, recorded["measures"])
                with jax.default_matmul_precision("highest"):
                    for measure, estimates in self.measure(
                        config, folder, checkpoint, due, partial_results
                    ):
                        digest = recorded["measures"][measure]
                        numbers = sharding.to_host(estimates)
                        for column, estimate in numbers.items():
                            if not math.isfinite(estimate.mean):
                                display.print_line(
                                    f"warning: {folder.path.name}: {column} is {estimate.mean} at "
                                    f"{name}{_reason(column, numbers)}; the report leaves it out"
                                )
                        folder.add_lines(file, _make_lines(checkpoint, measure, digest, numbers))
                        if measure != due[-1]:
                            partial_results.stop_if_requested()
                log_seconds(folder, self.section, *watch.read())
            display.advance_stage(number, self.section)
        folder.delete(unfinished)


def current_lines(folder: Folder, section: str, recorded: Mapping[str, Any]) -> list[Line]:
    """Return the lines of <section>.jsonl that were measured under the `recorded` settings."""
    digests = recorded.get("measures", {})
    whole_file = {key: value for key, value in recorded.items() if key != "measures"}
    old = folder.read_json("status.json").get("measured", {}).get(section)
    return [
        line
        for line in folder.read_lines(f"{section}.jsonl")
        if (
            digests.get(line["measure"]) == line["settings"]
            if _names_settings(line)
            else old == whole_file
        )
    ]


def _names_settings(line: Line) -> bool:
    """Return whether a line names its settings; up to version 0.1.0, lines did not."""
    return "settings" in line


def column_of(line: Line) -> str | None:
    """Return the column of a line in results.csv, or None if the line has no estimate.

    Up to version 0.1.0, the key "measure" held the column, and lines did not name their measure.
    """
    return line.get("column") if _names_settings(line) else line["measure"]


def checkpoint_of(line: Line) -> Checkpoint:
    """Return the checkpoint of a line."""
    return Checkpoint(line["step"], bool(line["projected"]))


def load_params(config: Config, folder: Folder, checkpoint: Checkpoint) -> Any:
    """Return the parameters of a measured checkpoint, placed on the mesh.

    For a run without phases these are the initial parameters.
    """
    mesh = builders.make_mesh(config)
    if not config.phase_order:
        return builders.init_params(config, mesh)
    template = builders.params_template(config, mesh)
    return (folder / checkpoint.folder).restore(checkpoint.step, template)


def log_seconds(folder: Folder, stage: str, seconds: float, compiling: float) -> None:
    """Add a line to timing.jsonl. compiling: the part of the seconds spent on compilation."""
    spent = {"seconds": round(seconds, 3), "compiling": round(compiling, 3)}
    folder.append_line("timing.jsonl", {"stage": stage, **spent})


def _make_lines(
    checkpoint: Checkpoint, measure: str, digest: str, estimates: Estimates
) -> list[Line]:
    """Return a line for each estimate, or one line without a column if there is no estimate."""
    made = {
        "step": checkpoint.step,
        "projected": int(checkpoint.projected),
        "measure": measure,
        "settings": digest,
    }
    return [
        made
        | {
            "column": column,
            "mean": float(estimate.mean),
            "sem": float(estimate.sem),
            "num_samples": estimate.num_samples,
            "over": estimate.over,
        }
        for column, estimate in estimates.items()
    ] or [made]


def _reason(column: str, estimates: Estimates) -> str:
    """Return in parentheses why a learning coefficient has no value; otherwise nothing."""
    measure, at, model = column.partition("@")
    if measure != LEARNING_COEFFICIENT[0]:
        return ""
    r_hat, size = (estimates[f"{name}{at}{model}"].mean for name in LEARNING_COEFFICIENT[1:])
    return f" (R-hat {r_hat:.3f}, {size:.0f} effective samples)"


def _measured_pairs(
    lines: Sequence[Line], measures: Mapping[str, str]
) -> set[tuple[Checkpoint, str]]:
    """Return the (checkpoint, measure) pairs that have lines; an old line counts for every one."""
    return {
        (checkpoint_of(line), name)
        for line in lines
        for name in ([line["measure"]] if _names_settings(line) else measures)
    }


def _drop_outdated(
    folder: Folder, section: str, recorded: Mapping[str, Any]
) -> set[tuple[Checkpoint, str]]:
    """Delete outdated lines of a file; return the (checkpoint, measure) pairs of current lines.

    Lines of measures that the config does not ask for remain, in case it asks for them again.
    """
    file, measures = f"{section}.jsonl", recorded["measures"]
    lines, current = folder.read_lines(file), current_lines(folder, section, recorded)
    others = [line for line in lines if _names_settings(line) and line["measure"] not in measures]
    if len(current) + len(others) < len(lines):
        folder.write_lines(file, [*others, *current])
    return _measured_pairs(current, measures)


def _digest(settings: Any) -> str:
    text = json.dumps(settings, sort_keys=True, default=lambda section: section.to_dict())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
