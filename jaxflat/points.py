"""The points of a sweep: their names, their resolved configs, and which of them are meant."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat import experiment, loading, validation
from jaxflat.config import Config, Sweep
from jaxflat.run import Point
from jaxflat.validation import InputError


def expand(config: Config, points: Sweep, workdir: Path) -> list[Point]:
    """Return the points with their resolved configs, each checked as far as it can be."""
    named = {point_name(overrides): overrides for overrides in points}
    resolved: dict[str, Config] = {}
    for name, overrides in named.items():
        point_config = validation.validate(loading.override(config, overrides))
        for key in ("data_seed", "init_seed", "probe_seed"):
            if point_config[key] is None:
                point_config[key] = point_config.seed
        resolved[name] = point_config
    widest = _common_width(list(resolved.values()))
    expanded = []
    for name, point_config in resolved.items():
        if point_config.flatness.embedded_width == 0:
            point_config.flatness.embedded_width = widest
        frozen = FrozenConfigDict(point_config)
        try:
            experiment.check(frozen)
        except ValueError as error:
            raise InputError(str(error)) from error
        expanded.append(Point(name, named[name], frozen, workdir / name))
    return expanded


def point_name(overrides: dict[str, Any]) -> str:
    """Return a folder name: the overrides' numbers and words, and a hash of all of them."""
    words = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in overrides.items()
        if isinstance(value, (int, float, str))
    ]
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:6]
    return "_".join([*words, digest]).replace("/", "-") if overrides else "run"


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


def _common_width(configs: list[Config]) -> int:
    """Return the width of the largest model if all others embed in it exactly, else 0."""
    models = [config.model for config in configs if config.model.name == "transformer"]
    widest = max((model.width for model in models), default=0)
    shapes = {(m.num_layers, m.head_size, m.tied_decoder) for m in models}
    embeds = len(shapes) == 1 and all(widest % model.width == 0 for model in models)
    return widest if embeds else 0
