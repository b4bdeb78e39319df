"""Train the first phases that several points have in common only once.

When a phase ends and others follow, the run's checkpoints and curve are copied to
WORKDIR/trunks/<hash of everything that decides them>. A point with the same first phases resumes
from this copy, as if it had itself been interrupted at that step.
"""

import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxflat.config import Config
from jaxflat.runs import builders, trajectory
from jaxflat.runs.trajectory import Phase
from jaxflat.storage.leased_folder import Folder
from jaxflat.storage.manifest import DamagedError

FOLDERS = ("checkpoints", "projected", "recovery")
"""The folders of a run's checkpoints. The recovery checkpoints, which make it resume, come last."""

KEYS = ("language", "model", "training", "data_seed", "init_seed")

# Keys that older shared prefixes lack, with the values that keep their names.
NEWER_TRAINING_KEYS = {"together": 1, "remat": False, "compute_dtype": "float32"}
NEWER_MODEL_KEYS = {"block": "gpt"}
NEWER_PHASE_KEYS = {"rescaling": 0, "objective": "masked_lm", "microbatch_size": 0}


def save(config: Config, folder: Folder, phase: Phase) -> None:
    """Copy the run, saved at the end of `phase`, for other points, unless the phase is the last."""
    if phase.name != config.phase_order[-1]:
        folder.on_rank_0(_store, folder, _prefix(config, folder, phase).path)


def _store(folder: Folder, target: Path) -> None:
    """Copy the run to a shared prefix, unless it exists."""
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        _copy_run(folder, Folder(temporary, folder.lease))
        folder.assert_owned()
        temporary.rename(target)
    except OSError:
        if not target.exists():  # otherwise another process stored it first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_longest(config: Config, folder: Folder) -> None:
    """Copy the longest stored shared prefix to a run that has no recovery checkpoint yet.

    It may include the run's own last phase, if another point has more phases. A damaged shared
    prefix is renamed and not used.
    """
    if (folder / "recovery").steps():
        return
    for phase in reversed(trajectory.phases(config)):
        prefix = _prefix(config, folder, phase)
        if folder.on_rank_0(_is_intact, prefix):
            folder.on_rank_0(_copy_run, prefix, folder)
            return


def _prefix(config: Config, folder: Folder, phase: Phase) -> Folder:
    """Return the folder of a shared prefix, named by a hash of all that decides its bits."""
    decides = {key: json.loads(json.dumps(config[key], default=_to_dict)) for key in KEYS}
    del decides["language"]["data_dir"], decides["training"]["keep"]  # these decide no bit
    _delete_defaults(decides["training"], NEWER_TRAINING_KEYS)
    _delete_defaults(decides["model"], NEWER_MODEL_KEYS)
    if config.language.name != "text":  # older shared prefixes lack the section
        decides["language"].pop("text", None)
    names = config.phase_order[: config.phase_order.index(phase.name) + 1]
    decides["phases"] = [(name, config.phases[name].to_dict()) for name in names]
    for _, settings in decides["phases"]:
        _delete_defaults(settings, NEWER_PHASE_KEYS)
        if settings["flatness_penalty"]["strength"] == 0:  # older shared prefixes lack the section
            del settings["flatness_penalty"]
    decides["mesh"] = [*builders.make_mesh(config).shape.values(), jax.process_count()]
    text = json.dumps(decides, sort_keys=True, default=_to_dict)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Folder(folder.path.parent / "trunks" / name, folder.lease)


def _delete_defaults(section: dict[str, Any], newer: Mapping[str, Any]) -> None:
    for key in [key for key, default in newer.items() if section[key] == default]:
        del section[key]


def _is_intact(prefix: Folder) -> bool:
    """Say whether a shared prefix exists, without damage; rename a damaged one and warn."""
    try:
        for name in FOLDERS:
            for step in (prefix / name).steps():
                (prefix / name).verify(step)
    except DamagedError as error:
        renamed = prefix.mark_damaged()
        message = f"warning: {error}; this shared prefix is renamed {renamed} and not used"
        print(message, file=sys.stderr)
        return False
    return prefix.path.exists()


def _copy_run(source: Folder, target: Folder) -> None:
    """Copy checkpoints and curve, each completely or not at all; recovery checkpoints come last."""
    for name in FOLDERS:
        for step in (source / name).steps():
            (target / name).copy(source.path / name, step)
        if name == "projected" and (source.path / "metrics.jsonl").exists():
            target.assert_owned()
            shutil.copy2(source.path / "metrics.jsonl", target.path)


def _to_dict(section: Config) -> dict:
    return section.to_dict()
