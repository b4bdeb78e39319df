"""What a point was run with: its config, the packages, the code and the devices."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxflat.config import Config
from jaxflat.runs import experiment

PACKAGES = ("jaxflat", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def provenance(config: Config) -> dict[str, Any]:
    """Return what config.json holds: the resolved config and what it runs on."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git on this machine
        commit = ""
    return {
        "config": json.loads(config.to_json()),
        "num_params": experiment.num_params(config),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "git_commit": commit.strip() or None,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
