"""Record a sweep in sweep.json, and refuse to resume it with other training settings."""

import json
from collections.abc import Callable, Iterable, Iterator
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
    trains = _training_settings(validation.complete(config))
    used = {name for point in points for name in _chosen(point.config)}
    entries = {}
    if stored:
        stored["trains"] = _with_defaults(stored["trains"])
        phases = stored["trains"]["phases"].values()
        recorded = {*stored["trains"]["language"], *stored["trains"]["model"]}
        recorded |= {name for phase in phases for name in (*phase, *phase["optimizer"])}
        used |= recorded
        if difference := validation.first_difference(
            stored["trains"], _keep_sections(trains, recorded)
        ):
            key, old, new = difference
            raise InputError(
                f"{path.parent} holds a sweep with {key}={old}, this one has {key}={new}; "
                "choose another --workdir"
            )
        entries = {entry["name"]: entry for entry in stored["points"]}
    for point in points:
        measured = {m.section: m.recorded(point.config) for m in stages.MEASUREMENTS}
        entry = {"name": point.name, "overrides": point.overrides, "measured": measured}
        entries[point.name] = entry
    return {"trains": _keep_sections(trains, used), "points": list(entries.values())}


def _chosen(config: Config) -> set[str]:
    """Return the names that a config chooses among sections: its language, optimizers, ..."""
    by_phase = [(phase.optimizer.name, phase.objective) for phase in config.phases.values()]
    return {config.language.name, config.model.name, *(n for names in by_phase for n in names)}


def _keep_sections(trains: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Keep the languages, optimizers and user's functions in `names`; others may come and go."""

    def kept(section: dict[str, Any], always: Callable[[Any], bool]) -> dict[str, Any]:
        return {name: value for name, value in section.items() if name in names or always(value)}

    def is_plain(value: Any) -> bool:
        return not isinstance(value, dict)

    def is_own(value: Any) -> bool:
        return not is_function(value)

    phases = {
        name: kept(phase, is_own) | {"optimizer": kept(phase["optimizer"], is_plain)}
        for name, phase in trains["phases"].items()
    }
    sections = {
        "language": kept(trains["language"], is_plain),
        "model": kept(trains["model"], is_own),
    }
    return trains | sections | {"phases": phases}


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
