"""Load a config file and apply the --config flags; return the config and its sweep."""

import ast
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxflat.config import Config, Sweep
from jaxflat.config.sweeps import ARM
from jaxflat.config.validation import InputError, check_key, coerced


def load(config_argument: str) -> tuple[Config, Sweep]:
    """Return (config, sweep points) of a "file.py" or "file.py:scale".

    Raises InputError if the file is missing or unusable.
    """
    path, _, scale = config_argument.partition(":")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such config file")
    if Path(path).suffix != ".py":
        raise InputError(f"{path}: a config file is Python and ends in .py")
    try:
        module = import_file(path)
        config = module.get_config(scale or None)
        points = module.get_sweep(scale or None) if hasattr(module, "get_sweep") else [{}]
    except Exception as error:
        place = place_in(path, error)
        raise InputError(f"{config_argument}: {type(error).__name__}: {error}{place}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config must return a ConfigDict made from config.base()")
    if not (isinstance(points, list) and points and all(isinstance(p, dict) for p in points)):
        raise InputError(f"{path}: get_sweep must return a list of {{key: value}} dicts")
    for key in (key for point in points for key in point):
        if not isinstance(key, str) or not all(key.split(".")):
            raise InputError(
                f"{path}: get_sweep: {key!r} is not a key; write for example 'model.width'"
            )
    return config, points


def import_file(path: str) -> ModuleType:
    """Return the module of a user's file, which ends in .py; raise what its code raises."""
    spec = importlib.util.spec_from_file_location("jaxflat_user_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that the source of its classes can be found
    spec.loader.exec_module(module)
    return module


def place_in(path: str | None, error: BaseException) -> str:
    """Return where in a user's file an error arose, as " (own.py, line 12)"; "" if elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        frame.lineno for frame in frames if path and Path(frame.filename) == Path(path).absolute()
    ]
    return f" ({Path(path).name}, line {lines[-1]})" if path and lines else ""


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn ["--config.model.width=32", ...] into {"model.width": 32, ...}.

    Raises InputError if an argument has another form.
    """
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not key.startswith("--config.") or not equals:
            raise InputError(
                f"{argument}: not an argument; config keys are set as --config.model.width=32"
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        overrides[key.removeprefix("--config.")] = value
    return overrides


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a copy of `config` with dotted keys set; raise InputError on a wrong key or type."""
    config = config.copy_and_resolve_references()
    for key, value in overrides.items():
        section: Any = config
        *parents, last = key.split(".")
        for depth, name in enumerate(parents):
            check_key(section, ".".join(parents[:depth]), name, config)
            section = section[name]
        check_key(section, ".".join(parents), last, config)
        default = section.get(last)
        if isinstance(value, str) and _are_names(default):
            value = tuple(value.split(","))
        section[last] = coerced(key, default, value)
    return config


def _are_names(default: Any) -> bool:
    return isinstance(default, tuple) and all(isinstance(item, str) for item in default)


def without_keys(points: Sweep, keys: Iterable[str]) -> Sweep:
    """Return the distinct points without these keys, which the command line sets.

    Arms that differed only in these keys become one, which has no name.
    """
    removed = set(keys)
    kept = [{k: value for k, value in point.items() if k not in removed} for point in points]
    unnamed = [{k: value for k, value in point.items() if k != ARM} for point in kept]
    for place, same in enumerate(unnamed):
        arms = {point.get(ARM) for point, other in zip(kept, unnamed, strict=True) if other == same}
        if removed and len(arms) > 1:
            kept[place] = same
    return [point for place, point in enumerate(kept) if point not in kept[:place]]
