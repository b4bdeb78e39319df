"""The provenance of a point: its config, packages, code version and devices."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxflat.config import Config
from jaxflat.runs import builders

PACKAGES = ("jaxflat", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def provenance(config: Config) -> dict[str, Any]:
    """Return the content of config.json: the resolved config, versions, commit and devices."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git on this machine
        commit = ""
    return {
        "config": json.loads(config.to_json()),
        "num_params": builders.num_params(config),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "git_commit": commit.strip() or None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
