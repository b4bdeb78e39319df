"""Read a run back from its folder: its config, and the model and parameters of a checkpoint."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config, functions, validation
from jaxflat.config.validation import InputError
from jaxflat.runs import builders, trajectory
from jaxflat.runs.measurements import load_params
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder


class SavedModel(NamedTuple):
    """The model of a checkpoint, its parameters, and the config of its run.

    `model.apply({"params": params}, tokens_BxT, lengths_B)` returns (logits_BxTxV, intermediates).
    """

    model: Any
    params: Any
    config: Config


def load(path: Path | str) -> SavedModel:
    """Return (model, params, config) of a run's checkpoint, after its checksums are verified.

    path: a point's folder, for the last checkpoint that it measures and has stored; or
    POINT/checkpoints/STEP or POINT/projected/STEP. A run without phases gives its initial
    parameters.

    Raises InputError if there is no such run or checkpoint, or if the run is a lookup table. Raises
    DamagedError if a file differs from its manifest, and names it.
    """
    path = Path(path)
    if is_checkpoint(path):
        directory, checkpoint, config = find_checkpoint(path)
    else:
        directory, config = path.absolute(), read_config(path / "config.json")
        checkpoint = _last_checkpoint(directory, config)
    if config.model.name == "lookup_table":
        raise InputError(f"{directory} is a lookup table, which has no parameters")
    frozen: Config = FrozenConfigDict(config)
    params = load_params(frozen, Folder(directory), checkpoint)
    return SavedModel(builders.make_model(frozen), params, frozen)


def is_checkpoint(path: Path) -> bool:
    """Return whether a path looks like POINT/checkpoints/STEP or POINT/projected/STEP of a run."""
    path = path.absolute()
    return path.name.isdecimal() and path.parent.name in ("checkpoints", "projected")


def find_checkpoint(path: Path) -> tuple[Path, Checkpoint, Config]:
    """Return the folder of a run, the checkpoint that the path names, and the run's config.

    Raises InputError if there is no such checkpoint.
    """
    path = path.absolute()
    directory = path.parents[1]
    config = read_config(directory / "config.json")
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint; {list_checkpoints(directory)}")
    return directory, Checkpoint(int(path.name), path.parent.name == "projected"), config


def list_checkpoints(directory: Path) -> str:
    """Return a phrase that lists the checkpoints of a run, for error lines."""
    steps = Folder(directory / "checkpoints").steps()
    return f"its checkpoints/STEP are {', '.join(map(str, steps)) or 'none'}"


def read_config(path: Path) -> Config:
    """Return the config of a run's config.json, for use on this machine.

    Keys that are newer than the run get defaults. Keys of `flatness.learning_coefficient` that
    jaxflat no longer has are dropped. The mesh becomes the default if the run had more devices.
    Raises InputError if the file has no config.
    """
    config = base_config.base()
    try:
        stored: Config = ConfigDict(json.loads(path.read_text("utf-8"))["config"])
        for section in (stored.model, stored.language):
            if section.name in functions.sections_in(section):
                raise ValueError(
                    f"{section.name} is a user's function, of which files hold only the name; "
                    "measure this run with --stages=flatness of its own config"
                )
        _drop_functions(stored)
        config.phases = ConfigDict({name: base_config.phase() for name in stored.phases})
        chosen = stored.flatness.get("learning_coefficient", {})
        for key in set(chosen) - set(config.flatness.learning_coefficient):
            del chosen[key]
        with config.unlocked():
            config.update(stored)
        if max(config.mesh.data, 1) * config.mesh.model > jax.device_count():
            config.mesh.update(data=-1, model=1)
        return validation.validate(config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: unusable as a run's config.json: {reason}") from None


def _last_checkpoint(directory: Path, config: Config) -> Checkpoint:
    """Return the last measured checkpoint that the folder has."""
    stored = [
        checkpoint
        for checkpoint in trajectory.measured_checkpoints(config)
        if not config.phase_order or (directory / checkpoint.folder / str(checkpoint.step)).is_dir()
    ]
    if not stored:
        raise InputError(
            f"{directory} has no measured checkpoint; resume its sweep (if the point is finished, "
            "delete its status.json before)"
        )
    return stored[-1]


def _drop_functions(config: Config) -> None:
    """Drop the user's functions that a checkpoint does not need: files hold only their names."""
    default, defaults = base_config.base(), base_config.phase()
    own = functions.sections_in(config.flatness)
    measures = tuple(name for name in config.flatness.measures if name not in own)
    config.flatness.measures = measures or default.flatness.measures
    others = config.flatness, config.probes, config.model, config.language
    choices = [(section, "", None) for section in others]
    for phase in config.phases.values():
        choices.append((phase, "objective", defaults.objective))
        choices.append((phase.optimizer, "name", defaults.optimizer.name))
    for section, choice, other in choices:
        own = functions.sections_in(section)
        if section.get(choice) in own:
            section[choice] = other
        for name in own:
            del section[name]
