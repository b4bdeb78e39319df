"""The settings that a sweep cannot change once it has begun, as sweep.json records them."""

import copy
import json
from collections.abc import Iterable, Set
from typing import Any

from ml_collections import FrozenConfigDict

from jaxflat.config.base import base, phase
from jaxflat.config.functions import is_function
from jaxflat.config.ranges import Config, InputError
from jaxflat.config.validation import complete, first_difference, value_at

KEYS = (
    *("seed", "language", "model", "phase_order", "phases", "training"),
    *("data_seed", "init_seed", "claims"),
)
"""The keys that decide the trained models, and the claims declared before they were trained.

Other keys decide the measurements, or where they run.
"""

Settings = dict[str, Any]


def recorded_settings(
    stored: Settings | None, config: Config, points: Iterable[Config], holder: str
) -> Settings:
    """Return the recorded settings of a sweep that had `stored` ones and now has this config.

    The sections of languages, models, optimizers and objectives count only if a point has chosen
    them, now (`points`) or when the stored settings were recorded.

    Raises InputError if a stored setting differs; `holder` names the sweep in its message.
    """
    settings = _training_settings(complete(config))
    used = {key for point in points for key in _chosen_sections(point)}
    forgotten = {}
    if stored is not None:
        old = _with_defaults({"claims": settings["claims"]} | stored)
        recorded, present = _optional_sections(old), _optional_sections(settings)
        # A config may drop the function of earlier points, unless a point still chooses it.
        forgotten = {key: value for key, value in recorded.items() if key not in {*present, *used}}
        used |= recorded.keys() - forgotten.keys()
        shared = used & recorded.keys()
        if difference := first_difference(
            _with_sections(old, shared), _with_sections(settings, shared)
        ):
            key, before, now = difference
            source = "the source has changed; " if key.endswith(".function") else ""
            raise InputError(
                f"{holder} with {key}={before}, this one has {key}={now}; "
                f"{source}choose another --workdir"
            )
    result = _with_sections(settings, used)
    if stored is not None and "claims" not in stored:  # an older sweep, which declared none
        del result["claims"]
    for key, value in forgotten.items():
        parent, _, name = key.rpartition(".")
        value_at(result, parent)[name] = value
    return result


def _training_settings(config: Config) -> Settings:
    """Return the settings that decide the trained models, as JSON values."""
    settings = json.loads(FrozenConfigDict({key: config[key] for key in KEYS}).to_json())
    del settings["language"]["data_dir"], settings["training"]["keep"]  # these decide no bit
    return settings


def _chosen_sections(config: Config) -> list[str]:
    """Return the keys of the sections that a point chooses: its language, model, optimizers, ..."""
    phases = config.phases.items()
    return [
        f"language.{config.language.name}",
        f"model.{config.model.name}",
        *(f"phases.{name}.{phase.objective}" for name, phase in phases),
        *(f"phases.{name}.optimizer.{phase.optimizer.name}" for name, phase in phases),
    ]


def _optional_sections(settings: Settings) -> Settings:
    """Return the sections that matter only if chosen, by key: languages, optimizers, functions."""
    phases = [f"phases.{name}" for name in settings["phases"]]
    return {
        f"{parent}.{name}": value
        for parent in ("language", "model", *phases, *(f"{phase}.optimizer" for phase in phases))
        for name, value in value_at(settings, parent).items()
        if is_function(value)
        or (isinstance(value, dict) and parent.endswith(("language", ".optimizer")))
    }


def _with_sections(settings: Settings, keys: Set[str]) -> Settings:
    """Return the settings with only those optional sections whose keys are given."""
    chosen = copy.deepcopy(settings)
    for key in _optional_sections(settings).keys() - keys:
        parent, _, name = key.rpartition(".")
        del value_at(chosen, parent)[name]
    return chosen


def _with_defaults(settings: Settings) -> Settings:
    """Add keys that are newer than the record, with defaults that keep its meaning."""

    def known(section: Settings, recorded: Settings) -> Settings:
        new = {key: value for key, value in section.items() if key not in recorded}
        old = {
            key: known(section[key], value) if isinstance(section.get(key), dict) else value
            for key, value in recorded.items()
        }
        return new | old

    defaults = base()
    defaults.phases = {name: phase() for name in settings["phases"]}
    sections = _optional_sections(settings).keys()  # others count only if a point chooses them
    return known(_with_sections(_training_settings(defaults), sections), settings)
