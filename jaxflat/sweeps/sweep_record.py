"""Record a sweep in sweep.json, and refuse to resume it with other training settings."""

import copy
import json
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config, validation
from jaxflat.config.functions import is_function
from jaxflat.config.validation import InputError
from jaxflat.distributed.leases import acquire_lease
from jaxflat.runs import stages
from jaxflat.runs.run import TRAINING_KEYS, Point
from jaxflat.storage.files import write_json
from jaxflat.storage.leased_folder import Folder


def check_sweep(config: Config, points: list[Point], workdir: Path) -> None:
    """Raise InputError if the folder is unusable, or holds a sweep with another training config.

    A new sweep is also refused if one of its keys has no effect.
    """
    path = workdir / "sweep.json"
    with _unusable_as_input_error(workdir):
        validation.check_folder("workdir", workdir)
        _extended_record(path, config, points)
        if not path.exists():  # an older sweep continues with the keys that it recorded
            validation.check_effects(config, [(p.overrides, p.config) for p in points])


def record_sweep(config: Config, points: list[Point], folder: Folder) -> None:
    """Write or extend sweep.json: the training settings, and the points with their measurements.

    Raises InputError if the folder cannot be used or its sweep has other training settings.
    """
    path = folder.path / "sweep.json"

    def record() -> None:
        check_sweep(config, points, folder.path)  # refuse before writing anything
        with _unusable_as_input_error(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
            with acquire_lease(path) as lease:
                write_json(path, _extended_record(path, config, points), lease.assert_owned)

    folder.on_rank_0(record)


@contextmanager
def _unusable_as_input_error(workdir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--workdir={workdir} cannot be used: {error}") from error


def _extended_record(path: Path, config: Config, points: list[Point]) -> dict[str, Any]:
    """Return the new content of sweep.json: its stored points, and these."""
    stored = json.loads(path.read_text()) if path.exists() else None
    settings = _training_settings(validation.complete(config))
    used = {key for point in points for key in _chosen_sections(point.config)}
    entries, forgotten = {}, {}
    if stored:
        old = _with_defaults(stored["trains"])
        recorded, present = _optional_sections(old), _optional_sections(settings)
        # A config may drop the function of earlier points, unless a point still chooses it.
        forgotten = {key: value for key, value in recorded.items() if key not in {*present, *used}}
        used |= recorded.keys() - forgotten.keys()
        shared = used & recorded.keys()
        if difference := validation.first_difference(
            _with_sections(old, shared), _with_sections(settings, shared)
        ):
            key, before, now = difference
            source = "the source has changed; " if key.endswith(".function") else ""
            raise InputError(
                f"{path.parent} holds a sweep with {key}={before}, this one has {key}={now}; "
                f"{source}choose another --workdir"
            )
        entries = {entry["name"]: entry for entry in stored["points"]}
    for point in points:
        measured = {m.section: m.recorded(point.config) for m in stages.MEASUREMENTS}
        entry = {"name": point.name, "overrides": point.overrides, "measured": measured}
        entries[point.name] = entry
    trains = _with_sections(settings, used)
    for key, value in forgotten.items():
        parent, _, name = key.rpartition(".")
        validation.value_at(trains, parent)[name] = value
    return {"trains": trains, "points": list(entries.values())}


def _chosen_sections(config: Config) -> list[str]:
    """Return the keys of the sections that a point chooses: its language, model, optimizers, ..."""
    phases = config.phases.items()
    return [
        f"language.{config.language.name}",
        f"model.{config.model.name}",
        *(f"phases.{name}.{phase.objective}" for name, phase in phases),
        *(f"phases.{name}.optimizer.{phase.optimizer.name}" for name, phase in phases),
    ]


def _optional_sections(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the sections that matter only if chosen, by key: languages, optimizers, functions."""
    phases = [f"phases.{name}" for name in settings["phases"]]
    return {
        f"{parent}.{name}": value
        for parent in ("language", "model", *phases, *(f"{phase}.optimizer" for phase in phases))
        for name, value in validation.value_at(settings, parent).items()
        if is_function(value)
        or (isinstance(value, dict) and parent.endswith(("language", ".optimizer")))
    }


def _with_sections(settings: dict[str, Any], keys: Set[str]) -> dict[str, Any]:
    """Return the settings with only those optional sections whose keys are given."""
    chosen = copy.deepcopy(settings)
    for key in _optional_sections(settings).keys() - keys:
        parent, _, name = key.rpartition(".")
        del validation.value_at(chosen, parent)[name]
    return chosen


def _training_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide the trained models, as JSON values."""
    chosen = {key: config[key] for key in ("seed", *TRAINING_KEYS)}
    trains = json.loads(FrozenConfigDict(chosen).to_json())
    del trains["language"]["data_dir"], trains["training"]["keep"]  # these decide no bit
    return trains


def _with_defaults(trains: dict[str, Any]) -> dict[str, Any]:
    """Add keys that are newer than the record, with defaults that keep its meaning."""

    def known(section: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
        new = {k: v for k, v in section.items() if k not in recorded and not isinstance(v, dict)}
        old = {
            key: known(section[key], value) if isinstance(section.get(key), dict) else value
            for key, value in recorded.items()
        }
        return new | old

    defaults = base_config.base()
    defaults.phases = {name: base_config.phase() for name in trains["phases"]}
    return known(_training_settings(defaults), trains)
