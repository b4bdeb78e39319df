"""Record a sweep in sweep.json, and refuse to resume it with other training settings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxflat.config import Config, validation
from jaxflat.config.training_settings import recorded_settings
from jaxflat.config.validation import InputError
from jaxflat.distributed.leases import acquire_lease
from jaxflat.runs import stages
from jaxflat.runs.run import Point
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


def record_sweep(config: Config, points: list[Point], folder: Folder, command: str = "") -> None:
    """Write or extend sweep.json: the training settings, the points with their measurements, and
    the arguments of the command. Without arguments, as from Python, recorded ones stay.

    Raises InputError if the folder cannot be used or its sweep has other training settings.
    """
    path = folder.path / "sweep.json"

    def record() -> None:
        check_sweep(config, points, folder.path)  # refuse before writing anything
        with _unusable_as_input_error(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
            with acquire_lease(path) as lease:
                record = _extended_record(path, config, points)
                record |= {"command": command} if command else {}
                write_json(path, record, lease.assert_owned)

    folder.on_rank_0(record)


def read_entries(workdir: Path) -> list[dict[str, Any]]:
    """Return the points that a folder records: their names, overrides, measurements and arms."""
    path = workdir / "sweep.json"
    with _unusable_as_input_error(workdir):
        return json.loads(path.read_text())["points"] if path.exists() else []


@contextmanager
def _unusable_as_input_error(workdir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--workdir={workdir} cannot be used: {error}") from error


def _extended_record(path: Path, config: Config, points: list[Point]) -> dict[str, Any]:
    """Return the new content of sweep.json: its stored points, and these."""
    stored = json.loads(path.read_text()) if path.exists() else None
    old = stored["trains"] if stored else None
    own = [point.config for point in points]
    trains = recorded_settings(old, config, own, f"{path.parent} holds a sweep")
    entries = {entry["name"]: entry for entry in stored["points"]} if stored else {}
    for point in points:
        entries[point.name] = {
            "name": point.name,
            "overrides": entries.get(point.name, {}).get("overrides", {}) | point.overrides,
            "measured": {m.section: m.recorded(point.config) for m in stages.MEASUREMENTS},
            "settings": {
                m.section: m.digests_without_seed(point.config) for m in stages.MEASUREMENTS
            },
            **({"arm": point.arm} if point.arm else {}),
        }
    return (stored or {}) | {"trains": trains, "points": list(entries.values())}
