"""Phases that several points of a sweep begin with: trained once, for all of them.

When a phase ends and others follow, what the run has left so far is copied to
WORKDIR/trunks/<hash of all that decided it>. A point that begins alike starts from there, as if it
had been interrupted at that step itself.
"""

import hashlib
import json
import shutil
import sys
import uuid
from pathlib import Path

import jax

from jaxflat.config import Config
from jaxflat.distributed import leases, ranks
from jaxflat.runs import experiment, trajectory
from jaxflat.runs.trajectory import Phase
from jaxflat.storage import checkpoint
from jaxflat.storage.manifest import DamagedError

FOLDERS = ("checkpoints", "projected", "recovery")
"""Where a run's checkpoints are; what to go on from is the last that is copied."""

KEYS = ("language", "model", "training", "data_seed", "init_seed")


@ranks.on_rank_0
def keep(config: Config, directory: Path, phase: Phase) -> None:
    """Leave a copy of the run, saved at the end of `phase`, for others; not of the last phase."""
    target = _folder(config, directory, phase)
    if phase.name == config.phase_order[-1] or target.exists():
        return
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        _copy(directory, temporary)
        leases.assert_owned()
        temporary.rename(target)
    except OSError:
        if not target.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@ranks.on_rank_0
def start_from(config: Config, directory: Path) -> None:
    """Copy the longest trunk there is for a run that has not saved anything itself.

    Its own last phase may be one that another point has gone on from. A damaged trunk is set aside.
    """
    if checkpoint.steps(directory / "recovery"):
        return
    for phase in reversed(trajectory.phases(config)):
        folder = _folder(config, directory, phase)
        if folder.exists() and _is_whole(folder):
            _copy(folder, directory)
            return


def _folder(config: Config, directory: Path, phase: Phase) -> Path:
    """Return the folder of a trunk: named by what decides its bits, the devices too."""
    decides = {key: json.loads(json.dumps(config[key], default=_plain)) for key in KEYS}
    del decides["language"]["data_dir"], decides["training"]["keep"]  # these decide no bit
    if config.training.together == 1:  # nor does this, which trunks of before it do not have
        del decides["training"]["together"]
    names = config.phase_order[: config.phase_order.index(phase.name) + 1]
    decides["phases"] = [(name, config.phases[name]) for name in names]
    decides["mesh"] = [*experiment.make_mesh(config).shape.values(), jax.process_count()]
    text = json.dumps(decides, sort_keys=True, default=_plain)
    return directory.parent / "trunks" / hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_whole(trunk: Path) -> bool:
    """Say whether all checkpoints of a trunk are as they were saved; set it aside where not."""
    try:
        for name in FOLDERS:
            for step in checkpoint.steps(trunk / name):
                checkpoint.verify(trunk / name, step)
    except DamagedError as error:
        aside = checkpoint.mark_damaged(trunk)
        print(f"warning: {error}; the trunk is now {aside.name}, and not used", file=sys.stderr)
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy checkpoints and curve, each whole or not at all; the one to go on from is the last."""
    for name in FOLDERS:
        for step in checkpoint.steps(source / name):
            checkpoint.copy(source / name, target / name, step)
        if name == "projected" and (source / "metrics.jsonl").exists():
            leases.assert_owned()
            shutil.copy2(source / "metrics.jsonl", target)


def _plain(section: Config) -> dict:
    return section.to_dict()
