"""The points of a sweep: their names, their resolved configs, and which of them are meant."""

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat import checks, hosts, loading, validation
from jaxflat import config as base_config
from jaxflat.config import Config, Sweep
from jaxflat.locks import alone
from jaxflat.metrics import write_json
from jaxflat.run import STAGES, TRAINING_KEYS, Point, files_of, settings_of
from jaxflat.stages import lanes
from jaxflat.validation import InputError


def expand(config: Config, points: Sweep, workdir: Path) -> list[Point]:
    """Return the points with their resolved configs, each checked as far as it can be.

    Raises InputError naming what is wrong.
    """
    resolved: dict[str, tuple[dict[str, Any], Config]] = {}
    for overrides in points:
        point_config = validation.validate(loading.override(config, overrides))
        for key in ("data_seed", "init_seed", "probe_seed"):
            if point_config[key] is None:
                point_config[key] = point_config.seed
        meant = {key: validation.value_at(point_config, key) for key in sorted(overrides)}
        resolved[point_name(meant)] = (meant, point_config)
    _check_phases_used([point_config for _, point_config in resolved.values()])
    width, num_layers = _common_size([point_config for _, point_config in resolved.values()])
    frozen = []
    for _, point_config in resolved.values():
        if point_config.flatness.embedded_width == 0:
            point_config.flatness.update(embedded_width=width, embedded_layers=num_layers)
        frozen.append(FrozenConfigDict(point_config))
        try:
            checks.check(frozen[-1])
        except ValueError as error:
            raise InputError(str(error)) from error
    return [
        Point(name, meant, point_config, workdir / name, *place)
        for (name, (meant, _)), point_config, place in zip(
            resolved.items(), frozen, lanes.places(frozen), strict=True
        )
    ]


def _check_phases_used(configs: list[Config]) -> None:
    """Raise InputError where a phase is defined that no point runs, though some point trains."""
    orders = [config.phase_order for config in configs if config.phase_order]
    used = {name for order in orders for name in order}
    unused = sorted(name for config in configs for name in config.phases if name not in used)
    if orders and unused:
        where = f"phase_order={orders[0]}" + " or that of any other point" * (len(orders) > 1)
        raise InputError(f"phases.{unused[0]} is not in {where}")


def point_name(overrides: dict[str, Any]) -> str:
    """Return a folder name: the overrides' numbers and words, and a hash of all of them."""
    if not overrides:
        return "run"
    words = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in overrides.items()
        if isinstance(value, (int, float, str))
    ]
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:6]
    return "_".join([*words, digest]).replace("/", "-")


@hosts.first
def record_sweep(config: Config, points: list[Point], workdir: Path) -> None:
    """Write or extend sweep.json: what trains, and the points with what they depend on.

    Raises InputError where the folder cannot be used or holds a sweep that trains otherwise.
    """
    path = workdir / "sweep.json"
    if workdir.is_file():
        raise InputError(f"--workdir={workdir} is a file; it must be a folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _extended(path, config, points)  # what is refused is so before anything is written
        with alone(path):
            write_json(path, _extended(path, config, points))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--workdir={workdir} cannot be used: {error}") from error


def _extended(path: Path, config: Config, points: list[Point]) -> dict[str, Any]:
    """Return what sweep.json is to hold: what it holds, and these points."""
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
        settings = {name: settings_of(point.config, name) for name in files_of(point, STAGES)}
        entry = {"name": point.name, "overrides": point.overrides, "measured": settings}
        entries[point.name] = entry
    return {"trains": _only(trains, used), "points": list(entries.values())}


def select(points: list[Point], selection: str) -> list[Point]:
    """Return the points chosen by "0,3-5" (places in the list) or by a pattern such as "width=16*".

    Raises InputError where nothing matches.
    """
    if not selection:
        return points
    chosen: dict[str, Point] = {}
    for part in selection.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            matches = points[int(first) : int(last or first) + 1]
        else:
            matches = [point for point in points if fnmatch(point.name, part)]
        if not matches:
            raise InputError(
                f"--points={part} matches none of the {len(points)} points; "
                f"the first is 0, {points[0].name}"
            )
        chosen |= {point.name: point for point in matches}
    return list(chosen.values())


def _common_size(configs: list[Config]) -> tuple[int, int]:
    """Return the width and layers in which all trained models embed exactly, else (0, 0).

    Models of one family do where the greatest width is a multiple of each.
    """
    models = [config.model for config in configs if config.model.name != "lookup_table"]
    width = max((model.width for model in models), default=0)
    num_layers = max((model.num_layers for model in models), default=0)
    families = {
        (m.name, m.tied_decoder, m.name == "transformer" and (m.head_size, m.cls)) for m in models
    }
    embeds = len(families) == 1 and all(width % model.width == 0 for model in models)
    return (width, num_layers) if embeds else (0, 0)


def _only(trains: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Without the sections of languages and optimizers not named: those may come and go."""

    def sections(section: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in section.items() if k in names or not isinstance(v, dict)}

    phases = {
        name: phase | {"optimizer": sections(phase["optimizer"])}
        for name, phase in trains["phases"].items()
    }
    return trains | {"language": sections(trains["language"]), "phases": phases}


def _trains(config: Config) -> dict[str, Any]:
    """Return what decides the trained models, as JSON has it."""
    chosen = {key: config[key] for key in ("seed", *TRAINING_KEYS)}
    trains = json.loads(FrozenConfigDict(chosen).to_json())
    del trains["language"]["data_dir"], trains["training"]["keep"]  # these decide no bit
    return trains


def _with_defaults(trains: dict[str, Any]) -> dict[str, Any]:
    """Give keys that are newer than a record their defaults: what was done before they were."""

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
