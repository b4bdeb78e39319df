"""List the runs (points) of a sweep with their names and configs, and select some of them."""

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from jaxflat.config import Config, Sweep, functions, loading, validation
from jaxflat.config.sweeps import ARM, SEEDS
from jaxflat.config.validation import InputError
from jaxflat.runs import checks, slots
from jaxflat.runs.labelled_sentences import check_shares
from jaxflat.runs.run import Point
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps.sweep_record import read_entries


class _Resolved(NamedTuple):
    """A point's name, its arm's name or "", its overrides and its config with all keys."""

    name: str
    arm: str
    overrides: dict[str, Any]
    config: Config


def expand(config: Config, points: Sweep, workdir: Path) -> list[Point]:
    """Return the points with their resolved configs, after all checks that need no training.

    Points that set the same values are one point; a key at its default counts as not set. Points
    that the folder records keep the names that they have there.

    Raises InputError that names the key and the fault.
    """
    defaults = validation.flatten(validation.complete(config))
    entries = Folder(workdir).on_rank_0(read_entries, workdir)
    recorded: dict[str, str] = {}
    for entry in entries:
        recorded.setdefault(_identity(entry["overrides"], defaults), entry["name"])
    distinct: dict[str, _Resolved] = {}
    for point in points:
        one = _resolve(config, point)
        identity = _identity(one.overrides, defaults)
        first = distinct.setdefault(identity, one._replace(name=recorded.get(identity, one.name)))
        if one.arm and first.arm and one.arm != first.arm:
            raise InputError(
                f"arms {first.arm!r} and {one.arm!r} are one point, {first.name}: their values are "
                "the same in every key, defaults included; keep one of them"
            )
        merged = first.overrides | one.overrides
        distinct[identity] = first._replace(arm=first.arm or one.arm, overrides=merged)
    resolved = list(distinct.values())
    _check_arms(resolved, entries, defaults, workdir)
    swept = {key for one in resolved for key in one.overrides}
    for key in sorted(key for key in swept if key.startswith("claims.")):
        raise InputError(f"{key} cannot be swept: a sweep declares its claims once")
    _check_phases_used([one.config for one in resolved])
    width, num_layers = _common_size([one.config for one in resolved])
    frozen = []
    for one in resolved:
        if one.config.flatness.embedded_width == 0:
            if one.config.flatness.embedded_layers:
                raise InputError("flatness.embedded_layers needs flatness.embedded_width; set both")
            one.config.flatness.update(embedded_width=width, embedded_layers=num_layers)
        frozen.append(FrozenConfigDict(one.config))
        try:
            checks.check_config(frozen[-1])
            checks.check_claims(frozen[-1])
        except ValueError as error:
            raise InputError(str(error)) from error
    return [
        Point(name, overrides, point_config, Folder(workdir / name), *team_slot, arm)
        for (name, arm, overrides, _), point_config, team_slot in zip(
            resolved, frozen, slots.assign_slots(frozen), strict=True
        )
    ]


def _resolve(config: Config, point: dict[str, Any]) -> _Resolved:
    overrides, arm = {key: point[key] for key in point if key != ARM}, point.get(ARM, "")
    if ARM in point and not (isinstance(arm, str) and arm.strip() and arm.isprintable()):
        raise InputError(f"arm {arm!r}: a name must be text on one line, for example 'SAM'")
    if "$" in arm:  # figures would read it as a formula
        raise InputError(f"arm {arm!r}: a name must not have a $")
    resolved = validation.validate(loading.override(config, overrides))
    for key in SEEDS:
        if resolved[key] is None:
            resolved[key] = resolved.seed
    set_keys = {key: validation.value_at(resolved, key) for key in sorted(overrides)}
    return _Resolved(point_name(set_keys), arm, set_keys, resolved)


def _with_seeds(overrides: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the value of every key at its default; the seeds that are not set follow `seed`."""
    seed = overrides.get("seed", defaults["seed"])
    return defaults | {key: seed for key in SEEDS if defaults[key] is None}


def _identity(overrides: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return the overrides that differ from the defaults, as JSON."""
    unset = _with_seeds(overrides, defaults)
    changed = {
        key: value
        for key, value in overrides.items()
        if json.dumps(value) != json.dumps(unset.get(key))
    }
    return json.dumps(changed, sort_keys=True)


def _check_arms(
    resolved: list[_Resolved],
    entries: list[dict[str, Any]],
    defaults: dict[str, Any],
    workdir: Path,
) -> None:
    """Raise InputError if one name is on two points of one seed, here or in the folder."""
    present = {one.name for one in resolved}
    named = [(one.arm, one.overrides, "") for one in resolved if one.arm]
    named += [
        (entry["arm"], entry["overrides"], f", in {workdir},")
        for entry in entries
        if entry.get("arm") and entry["name"] not in present
    ]
    swept = sorted({key for _, overrides, _ in named for key in overrides})
    first_of: dict[tuple[Any, ...], dict[str, Any]] = {}
    for arm, overrides, place in named:
        values = _with_seeds(overrides, defaults) | overrides
        seeds = [values[key] for key in (*SEEDS, "language.seed")]
        settings = {key: values.get(key) for key in swept}
        first = first_of.setdefault((arm, *seeds), settings)
        if difference := validation.first_difference(*json.loads(json.dumps([first, settings]))):
            key, one, other = difference
            raise InputError(
                f"arm {arm!r} has two points of seed {seeds[0]}: one with {key}={one!r} and{place} "
                f"one with {key}={other!r}; give each its own name"
            )


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
    """Return the points chosen by "0,3-5" (indices), an arm's name or a pattern ("*width=16*").

    Raises InputError if a part matches no point.
    """
    if not selection:
        return points
    chosen = {point.name: point for point in points if point.arm == selection}
    for part in [] if chosen else selection.split(","):
        first, _, last = part.partition("-")
        if named := [point for point in points if part and point.arm == part]:
            matches = named
        elif first.isdigit() and (last or first).isdigit():
            matches = points[int(first) : int(last or first) + 1]
        else:
            matches = [
                p for p in points if fnmatch(p.name, part) or (p.arm and fnmatch(p.arm, part))
            ]
        if not matches:
            raise InputError(
                f"--points={part} matches none of the {len(points)} points; "
                f"the first is 0, {points[0].title}"
            )
        chosen |= {point.name: point for point in matches}
    return list(chosen.values())


def check_stages(points: Sequence[Point], stages: Sequence[str]) -> None:
    """Raise InputError if `probes` is requested and a task has too few labelled sentences."""
    for point in points if "probes" in stages else ():
        try:
            check_shares(point.config)
        except ValueError as error:
            raise InputError(str(error)) from error


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
        (
            m.name,
            m.tied_decoder,
            m.name in validation.MODELS_WITH["head_size"] and (m.head_size, m.cls, m.block),
        )
        for m in models
    }
    embeds = len(families) == 1 and all(width % model.width == 0 for model in models)
    return (width, num_layers) if embeds else (0, 0)
