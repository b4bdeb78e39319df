"""A checkpoint of a run as the subject of `measure`, on sentences of its language."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config, functions, loading, validation
from jaxflat.config.validation import InputError
from jaxflat.flatness import Problem
from jaxflat.runs import builders, checks
from jaxflat.runs.measure_flatness import flattest_problem, make_problem
from jaxflat.runs.measurements import load_params
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.storage.leased_folder import Folder


class Subject(NamedTuple):
    """A problem, the config whose `flatness` section has its settings, and a description.

    flattest(): the problem in the coordinates of its least Gauss-Newton trace; None if the
    rescalings of the model are not known.
    """

    problem: Problem
    config: Config
    about: str
    flattest: Callable[[], Problem] | None = None


def is_run(path: Path) -> bool:
    """Return whether a path looks like POINT/checkpoints/STEP or POINT/projected/STEP of a run."""
    path = path.absolute()
    return path.name.isdecimal() and path.parent.name in ("checkpoints", "projected")


def listed(directory: Path) -> str:
    """Return a phrase that lists the checkpoints of a run, for error lines."""
    steps = Folder(directory / "checkpoints").steps()
    return f"its checkpoints/STEP are {', '.join(map(str, steps)) or 'none'}"


def run_subject(path: Path, overrides: dict[str, Any], seed: int | None = None) -> Subject:
    """Return a run's checkpoint with its own language and settings, after overrides.

    A seed replaces the run's probe_seed and draws other sentences and probes. Raises InputError if
    the checkpoint does not exist or an override is wrong.
    """
    directory, checkpoint, config = _find(path)
    if max(config.mesh.data, 1) * config.mesh.model > jax.device_count():
        config.mesh.update(data=-1, model=1)  # this machine is smaller than the run's
    if seed is not None:
        config.probe_seed = seed
    frozen: Config = FrozenConfigDict(validation.validate(loading.override(config, overrides)))
    checks.check_config(frozen)
    model = builders.make_model(frozen)
    params = load_params(frozen, Folder(directory), checkpoint)
    problem = make_problem(frozen, model, params, checkpoint)
    chosen = frozen.flatness
    sizes = f"{chosen.num_microbatches} microbatches of {chosen.microbatch_size}"
    where = f"step {checkpoint.step:,}{', projected' if checkpoint.projected else ''}"
    about = f"{directory.name}, {where}, {sizes}, labels {chosen.labels}"
    flattest = cache(partial(flattest_problem, frozen, problem, checkpoint))
    return Subject(problem, frozen, about, flattest if chosen.invariant else None)


def run_model(path: Path) -> Any:
    """Return the model of a run's checkpoint; raise InputError if it does not exist."""
    return builders.make_model(FrozenConfigDict(_find(path)[2]))


def run_params(path: Path) -> Any:
    """Return the parameters of a run's checkpoint; raise InputError if it does not exist."""
    directory, checkpoint, config = _find(path)
    return load_params(FrozenConfigDict(config), Folder(directory), checkpoint)


def _find(path: Path) -> tuple[Path, Checkpoint, Config]:
    """Return the directory of a run, the checkpoint that the path names, and the run's config."""
    path = path.absolute()
    directory = path.parents[1]
    config = stored_config(directory / "config.json")
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint; {listed(directory)}")
    checkpoint = Checkpoint(int(path.name), path.parent.name == "projected")
    return directory, checkpoint, config


def stored_config(path: Path) -> Config:
    """Return the config of a run's config.json; keys that are newer than the run get defaults.

    Keys of `flatness.learning_coefficient` that jaxflat no longer has are dropped.
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
        return validation.validate(config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: unusable as a run's config.json: {reason}") from None


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
