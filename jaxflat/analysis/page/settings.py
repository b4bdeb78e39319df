"""Read how a sweep was made from its points' folders; missing files are left out."""

import json
import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """`facts` maps versions, git commit and device to the distinct texts of their values.

    `command` has the arguments --config and --workdir that resume the sweep. Folders of older
    versions and sweeps from Python record no --config: FILE stands in its place.
    """

    config_point: str
    config: dict[str, Any]
    facts: dict[str, list[str]]
    seconds: dict[str, float]
    unfinished: dict[str, str]
    num_points: int
    command: str
    is_smoke: bool


def read_provenance(workdir: Path) -> Provenance:
    folders = _point_folders(workdir)
    configs = {folder.name: _read_json(folder / "config.json") for folder in folders}
    first = next((name for name, content in configs.items() if "config" in content), "")
    seconds: defaultdict[str, float] = defaultdict(float)
    for folder in folders:
        for line in _read_json_lines(folder / "timing.jsonl"):
            seconds[str(line.get("stage"))] += float(line.get("seconds", 0.0))
    statuses = {folder.name: _read_json(folder / "status.json") for folder in folders}
    arguments = _read_json(workdir / "sweep.json").get("command", "")
    return Provenance(
        command=f"python -m jaxflat.main {arguments or '--config=FILE'} "
        f"--workdir={shlex.quote(str(workdir))}",
        is_smoke=arguments.partition(" ")[0].strip("'").endswith(":smoke")
        or (not arguments and workdir.resolve().name.endswith("-smoke")),
        config_point=first,
        config=configs[first]["config"] if first else {},
        facts={
            name: _distinct(content[key] for content in configs.values() if key in content)
            for key, name in (
                ("versions", "Versions"),
                ("git_commit", "Commit"),
                ("device", "Device"),
            )
        },
        seconds=dict(seconds),
        unfinished={
            name: ": ".join(status[key] for key in ("state", "reason") if status.get(key))
            or "not started"
            for name, status in statuses.items()
            if status.get("state") != "done"
        },
        num_points=len(folders),
    )


def _point_folders(workdir: Path) -> list[Path]:
    """Return the sweep's points in order; without sweep.json, every folder with a config."""
    points = _read_json(workdir / "sweep.json").get("points", [])
    if points:
        return [workdir / point["name"] for point in points]
    return sorted(path.parent for path in workdir.glob("*/config.json"))


def _distinct(values: Any) -> list[str]:
    texts = [value if isinstance(value, str) else _flat(value) for value in values]
    return list(dict.fromkeys(texts))


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return json.dumps(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines, without one that a killed run left half written."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
