"""Combine values of config keys into a sweep: product, zipped, chain, arm; and scales' names."""

import itertools
from collections.abc import Iterable
from typing import Any

SCALES = ("smoke", "laptop", "full", "gpu", "paper")
"""A test of all stages; minutes or hours on two cores; minutes a point on a GPU; large clusters."""

Sweep = list[dict[str, Any]]
"""Points of a sweep, each a mapping from dotted keys to values; the key `ARM` has its name."""

ARM = "arm"

SEEDS = ("seed", "data_seed", "init_seed", "probe_seed")
"""The keys of a run's seeds. The first is the default of the others."""


def named_scale(scale: str | None) -> str:
    """Return the scale, "laptop" if None; raise ValueError if it is not in `SCALES`."""
    if scale is not None and scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    return scale or "laptop"


def param(key: str, values: Iterable[Any]) -> Sweep:
    """Return one point per value of a dotted key."""
    return [{key: value} for value in values]


def seeds(num: int, num_languages: int = 1) -> Sweep:
    """Return one point per seed: `num` seeds on each language, no seed on two languages.

    One language leaves `language.seed` to the config.
    """
    if num_languages == 1:
        return param("seed", range(num))
    languages = [language for language in range(num_languages) for _ in range(num)]
    return zipped(param("language.seed", languages), param("seed", range(num * num_languages)))


def product(*sweeps: Sweep) -> Sweep:
    """Return every combination of one point from each sweep; the last one varies fastest."""
    return [_merge(points) for points in itertools.product(*sweeps)]


def zipped(*sweeps: Sweep) -> Sweep:
    """Return the first points merged, the second points merged, ...; lengths must be equal."""
    return [_merge(points) for points in zip(*sweeps, strict=True)]


def chain(*sweeps: Sweep) -> Sweep:
    """Return the points of all sweeps, one sweep after the other."""
    return list(itertools.chain(*sweeps))


def arm(name: str, points: Sweep | dict[str, Any]) -> Sweep:
    """Return the points under a name: arm("SAM", {"phases.on.optimizer.name": "sam"}).

    The name is only a label, which tables, figures and verdicts show. In a product of named points
    the names are joined: "small, SAM".
    """
    return product([{ARM: name}], [points] if isinstance(points, dict) else points)


def _merge(points: Iterable[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for point in points:
        if repeated := (merged.keys() & point.keys()) - {ARM}:
            raise ValueError(f"a sweep sets {sorted(repeated)} twice in one point")
        names = [named[ARM] for named in (merged, point) if ARM in named]
        merged |= point
        if len(names) > 1:
            merged[ARM] = ", ".join(names)
    return merged
