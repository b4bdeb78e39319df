"""Shared prefixes: the first phases that several points have in common are trained once.

When a phase ends and others follow, the run's checkpoints and curve are copied to
WORKDIR/trunks/<hash of everything that decides them>. A point with the same first phases resumes
from this copy, as if it had itself been interrupted at that step.
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
from jaxflat.runs import builders, trajectory
from jaxflat.runs.trajectory import Phase
from jaxflat.storage import checkpoints
from jaxflat.storage.manifest import DamagedError

FOLDERS = ("checkpoints", "projected", "recovery")
"""The folders of a run's checkpoints. The recovery checkpoints, which make it resume, come last."""

KEYS = ("language", "model", "training", "data_seed", "init_seed")


@ranks.on_rank_0
def save(config: Config, directory: Path, phase: Phase) -> None:
    """Copy the run, saved at the end of `phase`, for other points, unless the phase is the last."""
    target = _prefix_folder(config, directory, phase)
    if phase.name == config.phase_order[-1] or target.exists():
        return
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        _copy_run(directory, temporary)
        leases.assert_owned()
        temporary.rename(target)
    except OSError:
        if not target.exists():  # otherwise another process stored it first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@ranks.on_rank_0
def load_longest(config: Config, directory: Path) -> None:
    """Copy the longest stored shared prefix to a run that has no recovery checkpoint yet.

    It may include the run's own last phase, if another point has more phases. A damaged shared
    prefix is renamed and not used.
    """
    if checkpoints.steps(directory / "recovery"):
        return
    for phase in reversed(trajectory.phases(config)):
        folder = _prefix_folder(config, directory, phase)
        if folder.exists() and _is_intact(folder):
            _copy_run(folder, directory)
            return


def _prefix_folder(config: Config, directory: Path, phase: Phase) -> Path:
    """Return the folder of a shared prefix, named by a hash of all that decides its bits."""
    decides = {key: json.loads(json.dumps(config[key], default=_to_dict)) for key in KEYS}
    del decides["language"]["data_dir"], decides["training"]["keep"]  # these decide no bit
    if config.training.together == 1:  # the default; older shared prefixes lack the key
        del decides["training"]["together"]
    names = config.phase_order[: config.phase_order.index(phase.name) + 1]
    decides["phases"] = [(name, config.phases[name]) for name in names]
    decides["mesh"] = [*builders.make_mesh(config).shape.values(), jax.process_count()]
    text = json.dumps(decides, sort_keys=True, default=_to_dict)
    return directory.parent / "trunks" / hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_intact(folder: Path) -> bool:
    """Verify all checkpoints of a shared prefix. If one is damaged, rename the prefix and warn."""
    try:
        for name in FOLDERS:
            for step in checkpoints.steps(folder / name):
                checkpoints.verify(folder / name, step)
    except DamagedError as error:
        renamed = checkpoints.mark_damaged(folder)
        message = f"warning: {error}; this shared prefix is renamed {renamed.name} and not used"
        print(message, file=sys.stderr)
        return False
    return True


def _copy_run(source: Path, target: Path) -> None:
    """Copy checkpoints and curve, each completely or not at all; recovery checkpoints come last."""
    for name in FOLDERS:
        for step in checkpoints.steps(source / name):
            checkpoints.copy(source / name, target / name, step)
        if name == "projected" and (source / "metrics.jsonl").exists():
            leases.assert_owned()
            shutil.copy2(source / "metrics.jsonl", target)


def _to_dict(section: Config) -> dict:
    return section.to_dict()
