"""List the runs (points) of a sweep with their names and configs, and select some of them."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat.config import Config, Sweep, functions, loading, validation
from jaxflat.config.validation import InputError
from jaxflat.runs import checks, slots
from jaxflat.runs.run import Point
from jaxflat.storage.leased_folder import Folder


def expand(config: Config, points: Sweep, workdir: Path) -> list[Point]:
    """Return the points with their resolved configs, after all checks that need no training.

    Raises InputError that names the key and the fault.
    """
    resolved: dict[str, tuple[dict[str, Any], Config]] = {}
    for overrides in points:
        point_config = validation.validate(loading.override(config, overrides))
        for key in ("data_seed", "init_seed", "probe_seed"):
            if point_config[key] is None:
                point_config[key] = point_config.seed
        set_keys = {key: validation.value_at(point_config, key) for key in sorted(overrides)}
        resolved[point_name(set_keys)] = (set_keys, point_config)
    swept = {key for overrides in points for key in overrides}
    for key in sorted(key for key in swept if key.startswith("claims.")):
        raise InputError(f"{key} cannot be swept: a sweep declares its claims once")
    _check_phases_used([point_config for _, point_config in resolved.values()])
    width, num_layers = _common_size([point_config for _, point_config in resolved.values()])
    frozen = []
    for _, point_config in resolved.values():
        if point_config.flatness.embedded_width == 0:
            if point_config.flatness.embedded_layers:
                raise InputError("flatness.embedded_layers needs flatness.embedded_width; set both")
            point_config.flatness.update(embedded_width=width, embedded_layers=num_layers)
        frozen.append(FrozenConfigDict(point_config))
        try:
            checks.check_config(frozen[-1])
            checks.check_claims(frozen[-1])
        except ValueError as error:
            raise InputError(str(error)) from error
    return [
        Point(name, set_keys, point_config, Folder(workdir / name), *team_slot)
        for (name, (set_keys, _)), point_config, team_slot in zip(
            resolved.items(), frozen, slots.assign_slots(frozen), strict=True
        )
    ]


def _check_phases_used(configs: list[Config]) -> None:
    """Raise InputError if some point trains, and a phase is defined that no point runs."""
    orders = [config.phase_order for config in configs if config.phase_order]
    used = {name for order in orders for name in order}
    unused = sorted(name for config in configs for name in config.phases if name not in used)
    if orders and unused:
        others = " or in the phase_order of any other point" if len(orders) > 1 else ""
        raise InputError(f"phases.{unused[0]} is not in phase_order={orders[0]}{others}")


def point_name(overrides: dict[str, Any]) -> str:
    """Return a folder name: the overrides that are numbers or strings, and a hash of all."""
    if not overrides:
        return "run"
    words = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in overrides.items()
        if isinstance(value, (int, float, str))
    ]
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:6]
    return "_".join([*words, digest]).replace("/", "-")


def select(points: list[Point], selection: str) -> list[Point]:
    """Return the points chosen by "0,3-5" (indices in the list) or a pattern such as "width=16*".

    Raises InputError if a part matches no point.
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
    """Return the width and layers of the model in which all trained models embed, else (0, 0).

    Models of one family embed exactly if the largest width is a multiple of every width.
    """
    models = [config.model for config in configs if config.model.name != "lookup_table"]
    if any(functions.sections_in(model).keys() & {model.name} for model in models):
        return 0, 0  # how a user's model embeds is not known
    width = max((model.width for model in models), default=0)
    num_layers = max((model.num_layers for model in models), default=0)
    families = {
        (m.name, m.tied_decoder, m.name == "transformer" and (m.head_size, m.cls)) for m in models
    }
    embeds = len(families) == 1 and all(width % model.width == 0 for model in models)
    return (width, num_layers) if embeds else (0, 0)
