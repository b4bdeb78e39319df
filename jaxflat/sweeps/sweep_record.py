"""The record of a work directory, sweep.json: the settings that decide training, and the points."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config, validation
from jaxflat.config.validation import InputError
from jaxflat.distributed.leases import hold
from jaxflat.runs import stages
from jaxflat.runs.run import TRAINING_KEYS, Point
from jaxflat.storage.files import write_json
from jaxflat.storage.leased_folder import Folder


def check_sweep(config: Config, points: list[Point], workdir: Path) -> None:
    """Raise InputError if the folder is unusable, or holds a sweep with another training config.

    A new sweep is also refused if one of its keys has no effect.
    """
    path = workdir / "sweep.json"
    with _usable(workdir):
        validation.check_folder("workdir", workdir)
        _extended(path, config, points)
        if not path.exists():  # an older sweep continues with the keys that it recorded
            validation.check_effects(config, [(p.overrides, p.config) for p in points])


def record_sweep(config: Config, points: list[Point], folder: Folder) -> None:
    """Write or extend sweep.json: the training settings, and the points with their measurements.

    Raises InputError if the folder cannot be used or its sweep has other training settings.
    """
    path = folder.path / "sweep.json"

    def record() -> None:
        check_sweep(config, points, folder.path)  # refuse before writing anything
        with _usable(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
            with hold(path) as lease:
                write_json(path, _extended(path, config, points), lease.assert_owned)

    folder.on_rank_0(record)


@contextmanager
def _usable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--workdir={workdir} cannot be used: {error}") from error


def _extended(path: Path, config: Config, points: list[Point]) -> dict[str, Any]:
    """Return the new content of sweep.json: its stored points, and these."""
    stored = json.loads(path.read_text()) if path.exists() else None
    trains = _trains(validation.complete(config))
    used = {point.config.language.name for point in points}
    used |= {phase.optimizer.name for point in points for phase in point.config.phases.values()}
    entries = {}
    if stored:
        stored["trains"] = _with_defaults(stored["trains"])
        phases = stored["trains"]["phases"].values()
        recorded = {*stored["trains"]["language"], *(n for p in phases for n in p["optimizer"])}
        used |= recorded
        if difference := validation.first_difference(stored["trains"], _only(trains, recorded)):
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
    return {"trains": _only(trains, used), "points": list(entries.values())}


def _only(trains: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Keep the language and optimizer sections in `names`; unused ones may be added or removed."""

    def sections(section: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in section.items() if k in names or not isinstance(v, dict)}

    phases = {
        name: phase | {"optimizer": sections(phase["optimizer"])}
        for name, phase in trains["phases"].items()
    }
    return trains | {"language": sections(trains["language"]), "phases": phases}


def _trains(config: Config) -> dict[str, Any]:
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
    return known(_trains(defaults), trains)
