"""Initial phases that several points of a sweep share are trained once.

When a phase ends and others follow, the run's checkpoints so far are copied to WORKDIR/trunks/.
The folder's name is a hash of everything that decides them. A point with the same initial phases
resumes from that copy, as if it had been interrupted at that step.
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
"""The folders of a run's checkpoints. Those to resume from are copied last."""

KEYS = ("language", "model", "training", "data_seed", "init_seed")


@ranks.on_rank_0
def keep(config: Config, directory: Path, phase: Phase) -> None:
    """Copy the run, saved at the end of `phase`, for other points. The last phase is not shared."""
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
    """Copy the longest stored prefix into a run that has not saved anything yet.

    The run's last phase may already be stored, because another point continued from it. A damaged
    prefix is marked and not used.
    """
    if checkpoint.steps(directory / "recovery"):
        return
    for phase in reversed(trajectory.phases(config)):
        folder = _folder(config, directory, phase)
        if folder.exists() and _is_whole(folder):
            _copy(folder, directory)
            return


def _folder(config: Config, directory: Path, phase: Phase) -> Path:
    """Return the folder of a prefix; its name depends on all that decides the bits, devices too."""
    decides = {key: json.loads(json.dumps(config[key], default=_plain)) for key in KEYS}
    del decides["language"]["data_dir"], decides["training"]["keep"]  # these decide no bit
    if config.training.together == 1:  # nor does this; prefixes stored by older versions lack it
        del decides["training"]["together"]
    names = config.phase_order[: config.phase_order.index(phase.name) + 1]
    decides["phases"] = [(name, config.phases[name]) for name in names]
    decides["mesh"] = [*experiment.make_mesh(config).shape.values(), jax.process_count()]
    text = json.dumps(decides, sort_keys=True, default=_plain)
    return directory.parent / "trunks" / hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_whole(trunk: Path) -> bool:
    """Say whether all checkpoints of a prefix are as they were saved; mark it as damaged if not."""
    try:
        for name in FOLDERS:
            for step in checkpoint.steps(trunk / name):
                checkpoint.verify(trunk / name, step)
    except DamagedError as error:
        aside = checkpoint.mark_damaged(trunk)
        print(f"warning: {error}; it is now {aside.name}, and not used", file=sys.stderr)
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy checkpoints and curve, each whole or not at all; recovery checkpoints come last."""
    for name in FOLDERS:
        for step in checkpoint.steps(source / name):
            checkpoint.copy(source / name, target / name, step)
        if name == "projected" and (source / "metrics.jsonl").exists():
            leases.assert_owned()
            shutil.copy2(source / "metrics.jsonl", target)


def _plain(section: Config) -> dict:
    return section.to_dict()
