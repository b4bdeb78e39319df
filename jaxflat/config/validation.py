"""Check a config before any work starts: each error is one line that names the key."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxflat.config.base import every_key
from jaxflat.config.functions import GIVEN, sections_in, takes, with_functions
from jaxflat.config.ranges import Config, InputError, check_choices, check_ranges, defaults

MODELS_WITH = {
    "head_size": ("transformer", "causal"),
    "block": ("causal",),
    "cls": ("transformer",),
    "features": ("lookup_table",),
}
"""The models that have a key of `model`. Keys without a line belong to all trained models."""

NEED_WHOLE_BATCH = ("hessian_max_eigenvalue", "feature_rank")
"""Flatness penalties that are no sum over sentences, and so know no microbatches."""


def complete(config: Config) -> Config:
    """Return the config with lists as tuples, and ints as floats if the default is a float.

    Raises InputError naming the first key that is unknown, missing or of the wrong type.
    """
    return _merged(defaults(_keys(config)), config, "")


def _keys(config: Config) -> dict[str, Any]:
    """Return every key that a config with these phases and these user's functions has."""
    phases = config.get("phases", {})
    return with_functions(every_key(phases) if _is_dict(phases) else every_key(), config)


def validate(config: Config) -> Config:
    """Return the completed config of a point.

    Raises InputError naming the first key that is wrong or out of range, and the allowed values.
    """
    config = complete(config)
    _check_phases(config)
    check_ranges(_keys(config), config)
    for section, choice in (
        ("language", config.language.name),
        *((f"phases.{n}.optimizer", p.optimizer.name) for n, p in config.phases.items()),
    ):
        choices = [name for name, value in value_at(config, section).items() if _is_dict(value)]
        check_choices(f"{section}.name", [choice], choices)
    model = config.model
    if model.name in MODELS_WITH["head_size"] and model.width % model.head_size:
        raise InputError(
            f"model.width={model.width} is not divisible by model.head_size={model.head_size}; "
            f"the next width that is: {-(-model.width // model.head_size) * model.head_size}"
        )
    if model.name == "causal" and model.block == "modern":
        _check_modern(model)
    if model.cls and model.name not in (*MODELS_WITH["cls"], "lookup_table", *sections_in(model)):
        raise InputError("model.cls=True is for model.name='transformer'; set it to False")
    return config


def _check_modern(model: Config) -> None:
    if model.head_size % 2:
        raise InputError(
            f"model.head_size={model.head_size} must be even for model.block='modern': rotary "
            f"positions turn pairs of channels; set it to {model.head_size + 1}"
        )
    if model.width < 3:
        raise InputError(
            f"model.width={model.width} must be at least 3 for model.block='modern', whose MLP is "
            "8 * (width // 3) wide"
        )


def _check_phases(config: Config) -> None:
    order, names = config.phase_order, set(config.phases)
    if config.model.name == "lookup_table" and order:
        raise InputError("phase_order must be () for model.name='lookup_table': it is exact")
    if not order:  # the lookup table, or an untrained model
        return
    check_choices("phase_order", order, sorted(names))
    if len(set(order)) < len(order):
        raise InputError(f"phase_order={order} names a phase twice")
    for name in order:
        phase, prefix = config.phases[name], f"phases.{name}"
        steps = phase.checkpoint_steps
        if list(steps) != sorted(set(steps)) or (steps and steps[-1] > phase.steps):
            raise InputError(
                f"{prefix}.checkpoint_steps={steps} must increase and end by "
                f"{prefix}.steps={phase.steps}"
            )
        if name == order[0] and 0 in (phase.steps, *steps):
            raise InputError(
                f"{prefix}.steps={phase.steps} and {prefix}.checkpoint_steps={steps} must be at "
                "least 1 in the first phase of phase_order"
            )
        if 0 < phase.rescaling <= 1:
            raise InputError(
                f"{prefix}.rescaling={phase.rescaling} must be above 1, the largest scale, or 0.0"
            )
        schedule = phase.schedule
        if phase.steps and schedule.warmup_steps + schedule.decay_steps > phase.steps:
            raise InputError(
                f"{prefix}.schedule: warmup_steps + decay_steps = "
                f"{schedule.warmup_steps + schedule.decay_steps} exceeds {prefix}.steps="
                f"{phase.steps}"
            )
        _check_penalty(phase, prefix)
        _check_microbatches(phase, prefix)
    if not any(config.phases[name].checkpoint_steps for name in order):
        raise InputError(f"phases.{order[-1]}.checkpoint_steps is empty: nothing to measure")


def _check_penalty(phase: Config, prefix: str) -> None:
    penalty, adversary = phase.flatness_penalty, phase.adversary
    if penalty.max_excess and phase.targets != "exact":
        raise InputError(
            f"{prefix}.flatness_penalty.max_excess={penalty.max_excess} needs {prefix}.targets="
            "'exact', by which the excess loss is known; set it to 0.0"
        )
    if penalty.strength and adversary.strength:
        raise InputError(
            f"{prefix}.flatness_penalty.strength={penalty.strength} and {prefix}."
            f"adversary.strength={adversary.strength} exclude each other; set one to 0.0"
        )


def _check_microbatches(phase: Config, prefix: str) -> None:
    size, penalty, projection = phase.microbatch_size, phase.flatness_penalty, phase.projection
    sizes = {"batch_size": phase.batch_size}
    if projection.checkpoint_steps:
        sizes["projection.batch_size"] = projection.batch_size
    for key, whole in sizes.items():
        if size and whole % size:
            raise InputError(
                f"{prefix}.microbatch_size={size} does not divide {prefix}.{key}={whole}"
            )
    if size and penalty.strength and penalty.measure in NEED_WHOLE_BATCH:
        raise InputError(
            f"{prefix}.microbatch_size={size} must be 0 with {prefix}.flatness_penalty.measure="
            f"{penalty.measure!r}, which needs the whole batch at once"
        )


def check_effects(config: Config, points: Sequence[tuple[Mapping[str, Any], Config]]) -> None:
    """Raise InputError if a key of a sweep has no effect and another value than its default.

    config: the keys that all points share; each needs an effect on one point. points: for each
    point, the keys that it sets itself, and its resolved config. A point is also refused if it sets
    both a key and the choice that leaves it without effect. Example: a point that sets
    model.name='lstm' and model.head_size.
    """
    config = complete(config)
    default = defaults(_keys(config))
    for overrides, own in points:
        for name, choice in (_idle_keys(own) | _idle_alternatives(own)).items():
            for key in overrides if not choice or choice in overrides else ():
                if f"{key}.".startswith(f"{name}."):
                    _check_default(key, default, own, _reason(choice, own))
    _, first = points[0]
    for key, choice in _idle_keys(first).items():
        if all(key in _idle_keys(own) for _, own in points):
            _check_default(key, default, config, _reason(choice, first))
    if len(points) == 1:
        _check_default("training.together", default, config, "with one point")


def _check_default(key: str, default: Config, config: Config, reason: str) -> None:
    """Raise InputError if a key or section without effect differs from its default."""
    old, new = (value_at(c.to_dict(), key) for c in (default, config))
    if difference := first_difference(old, new, key):
        key, old, new = difference
        raise InputError(f"{key}={new!r} has no effect {reason}; leave it at {old!r}")


def _reason(choice: str, config: Config) -> str:
    return f"with {choice}={value_at(config, choice)!r}" if choice else "in a sweep"


def _idle_keys(config: Config) -> dict[str, str]:
    """Return the keys and sections without effect on a point of a sweep: name -> deciding choice.

    The choice is "" for names without effect in any sweep.
    """
    idle = {"flatness.slices": ""}  # python -m jaxflat.measure draws slices
    for key, models in MODELS_WITH.items():
        if config.model.name not in (*models, "lookup_table"):
            idle[f"model.{key}"] = "model.name"
    own = config.model.get(config.model.name)
    for key in [name for name in GIVEN["model"] if name in config.model] if own else ():
        idle.pop(f"model.{key}", None)
        if not takes(own, key):
            idle[f"model.{key}"] = "model.name"
    if config.language.name in ("generated", "text"):  # people gave its labels
        idle["probes.labelings"] = "language.name"
    margin = "loss_margin" if config.language.name == "text" else "loss_margin_nats"
    idle[f"claims.{margin}"] = "language.name"
    if config.language.text.tokenizer:
        idle["language.text.vocabulary"] = "language.text.tokenizer"
    return idle


def _idle_alternatives(config: Config) -> dict[str, str]:
    """Return the same for the keys of languages, optimizers and models that are not chosen.

    The config that points share may set them, so that a flag can switch between choices.
    """
    idle = {}
    chosen = {"language": config.language, "model": config.model}
    chosen |= {f"phases.{name}.optimizer": p.optimizer for name, p in config.phases.items()}
    for prefix, section in chosen.items():
        for name, value in section.items():
            if _is_dict(value) and name != section.name:
                idle[f"{prefix}.{name}"] = f"{prefix}.name"
    for name, phase in config.phases.items():
        for own in sections_in(phase).keys() - {phase.objective}:
            idle[f"phases.{name}.{own}"] = f"phases.{name}.objective"
    for own in sections_in(config.flatness).keys() - set(config.flatness.measures):
        idle[f"flatness.{own}"] = "flatness.measures"
    if config.model.name == "lookup_table":
        idle |= {f"model.{name}": "model.name" for name in set(config.model) - {"name", "features"}}
    return idle


def _merged(base: Config, config: Config, prefix: str) -> Config:
    for name in config:
        check_key(base, prefix, name)
    merged = ConfigDict()
    for name, default in base.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in config:
            raise InputError(f"{key} is missing; start from config.base()")
        value = config[name]
        merged[name] = (
            _merged(default, value, key)
            if _is_dict(default) and _is_dict(value)
            else coerced(key, default, value)
        )
    return merged


def check_key(section: Any, prefix: str, name: str, config: Config | None = None) -> None:
    """Raise InputError if a section has no key `name`; suggest similar keys of it and `config`."""
    if _is_dict(section) and name in section:
        return
    key = f"{prefix}.{name}" if prefix else name
    known = [f"{prefix}.{k}" if prefix else k for k in section] if _is_dict(section) else []
    everywhere = (k.split(".") for k in flatten(config or ConfigDict()))
    paths = {".".join(parts[: end + 1]) for parts in everywhere for end in range(len(parts))}
    elsewhere = sorted(path for path in paths if path.endswith(f".{name}"))
    near = [
        *difflib.get_close_matches(key, known, n=1, cutoff=0.6 if elsewhere else 0.0),
        *difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.0),
    ]
    raise InputError(
        f"{key} is not a config key" + (f"; nearest: {' or '.join(near)}" if near else "")
    )


def coerced(key: str, default: Any, value: Any) -> Any:
    """Return `value` as the type of `default`, or raise InputError."""
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return tuple(coerced(key, default[0], item) for item in value) if default else tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = int if default is None else type(default)
    if (default is None and value is None) or (
        isinstance(value, expected) and isinstance(value, bool) == isinstance(default, bool)
    ):
        return value
    if isinstance(default, ConfigDict):
        names = ", ".join(default.keys())
        raise InputError(f"{key}={value!r}: {key} is a section; set one of {names}")
    raise InputError(
        f"{key}={value!r} is {type(value).__name__}; it must be "
        f"{expected.__name__}, for example {default!r}"
    )


def check_outputs(json: Path | None, figures: Path | None = None) -> None:
    """Raise InputError if --json=FILE or --figures=DIR is unusable; folders may be missing."""
    if json and json.is_dir():
        raise InputError(f"--json={json} is a folder; it must be a file")
    for flag, folder in (("json", json and json.parent), ("figures", figures)):
        if folder:
            check_folder(flag, folder)


def check_folder(flag: str, folder: Path) -> None:
    """Raise InputError if --flag=FOLDER cannot be created or is not writable."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"--{flag}: {there} is a file; it must be a folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"--{flag}: {there} is not writable")


def _is_dict(value: Any) -> bool:
    return isinstance(value, (ConfigDict, dict))


def value_at(config: Config, dotted: str) -> Any:
    """Return the value or the section under a dotted key that exists."""
    for name in dotted.split("."):
        config = config[name]
    return config


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Return the values of a config by their dotted keys."""
    flat = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if _is_dict(value) else {key: value}
    return flat


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Return (dotted key, old value, new value) of the first difference between two configs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (key, old, new)
    for name in sorted(old.keys() | new.keys()):
        dotted = f"{key}.{name}" if key else name
        if difference := first_difference(old.get(name), new.get(name), dotted):
            return difference
    return None
