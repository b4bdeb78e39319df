"""A checkpoint of a run as the subject of `measure`, on sentences of its language."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config, loading, validation
from jaxflat.config.validation import InputError
from jaxflat.flatness import Problem
from jaxflat.runs import checks, experiment
from jaxflat.runs.measure_flatness import make_problem
from jaxflat.runs.measurements import load_params
from jaxflat.runs.trajectory import Snapshot
from jaxflat.storage.leased_folder import Folder


class Subject(NamedTuple):
    """A problem, the config whose `flatness` section has its settings, and a description."""

    problem: Problem
    config: Config
    about: str


def is_run(checkpoint: Path) -> bool:
    """Return whether a path looks like POINT/checkpoints/STEP or POINT/projected/STEP of a run."""
    checkpoint = checkpoint.absolute()
    return checkpoint.name.isdecimal() and checkpoint.parent.name in ("checkpoints", "projected")


def listed(directory: Path) -> str:
    """Return a phrase that lists the checkpoints of a run, for error lines."""
    steps = Folder(directory / "checkpoints").steps()
    return f"its checkpoints/STEP are {', '.join(map(str, steps)) or 'none'}"


def run_subject(checkpoint: Path, overrides: dict[str, Any], seed: int | None = None) -> Subject:
    """Return a run's checkpoint with its own language and settings, after overrides.

    A seed replaces the run's probe_seed and draws other sentences and probes. Raises InputError if
    the checkpoint does not exist or an override is wrong.
    """
    directory, snapshot, config = _find(checkpoint)
    if max(config.mesh.data, 1) * config.mesh.model > jax.device_count():
        config.mesh.update(data=-1, model=1)  # this machine is smaller than the run's
    if seed is not None:
        config.probe_seed = seed
    frozen: Config = FrozenConfigDict(validation.validate(loading.override(config, overrides)))
    checks.check(frozen)
    model = experiment.make_model(frozen)
    params = load_params(frozen, Folder(directory), snapshot)
    problem = make_problem(frozen, model, params, snapshot)
    chosen = frozen.flatness
    sizes = f"{chosen.num_microbatches} microbatches of {chosen.microbatch_size}"
    where = f"step {snapshot.step:,}{', projected' if snapshot.projected else ''}"
    about = f"{directory.name}, {where}, {sizes}, labels {chosen.labels}"
    return Subject(problem, frozen, about)


def run_model(checkpoint: Path) -> Any:
    """Return the model of a run's checkpoint; raise InputError if it does not exist."""
    return experiment.make_model(FrozenConfigDict(_find(checkpoint)[2]))


def run_params(checkpoint: Path) -> Any:
    """Return the parameters of a run's checkpoint; raise InputError if it does not exist."""
    directory, snapshot, config = _find(checkpoint)
    return load_params(FrozenConfigDict(config), Folder(directory), snapshot)


def _find(checkpoint: Path) -> tuple[Path, Snapshot, Config]:
    """Return the directory of a run, the snapshot that the path names, and the run's config."""
    checkpoint = checkpoint.absolute()
    directory = checkpoint.parents[1]
    config = stored_config(directory / "config.json")
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such checkpoint; {listed(directory)}")
    snapshot = Snapshot(int(checkpoint.name), checkpoint.parent.name == "projected")
    return directory, snapshot, config


def stored_config(path: Path) -> Config:
    """Return the config of a run's config.json; keys that are newer than the run get defaults.

    Raises InputError if the file has no config.
    """
    config = base_config.base()
    try:
        stored: Config = ConfigDict(json.loads(path.read_text("utf-8"))["config"])
        config.phases = ConfigDict({name: base_config.phase() for name in stored.phases})
        with config.unlocked():
            config.update(stored)
        return validation.validate(config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: not the config.json that a run writes: {reason}") from None
