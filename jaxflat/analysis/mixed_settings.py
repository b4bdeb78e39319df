"""Find columns of results.csv whose numbers were measured under different settings."""

import csv
from pathlib import Path


def mixed_settings(workdir: Path) -> list[str]:
    """Return a sentence for each way in which settings divide the points of some measures.

    Reads the digests in measurements.csv; a number with none, of an older version, is left out.
    """
    path = workdir / "measurements.csv"
    if not path.exists():
        return []
    points: dict[str, dict[str, dict[str, None]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["settings"]:
                by_settings = points.setdefault(row["measure"], {})
                by_settings.setdefault(row["settings"], {})[row["point"]] = None
    measures: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for measure, by_settings in points.items():
        if len(by_settings) > 1:
            division = tuple(tuple(names) for names in by_settings.values())
            measures.setdefault(division, []).append(measure)
    return [_sentence(names, division) for division, names in measures.items()]


def _sentence(measures: list[str], division: tuple[tuple[str, ...], ...]) -> str:
    parts = ", ".join(f"{len(names)} like {names[0]}" for names in division)
    return (
        f"{', '.join(measures)}: points were measured under {len(division)} settings ({parts}); "
        "their config.json files show the difference"
    )
