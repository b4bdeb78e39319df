"""The checkpoint that a path through the loss leads to."""

from pathlib import Path
from typing import Any

import jax

from jaxflat.flatness.terms import path_name
from jaxflat.measure.subjects import Subject, is_run, run_params
from jaxflat.models.huggingface import load_model
from jaxflat.validation import InputError


def lead_toward(subject: Subject, checkpoint: Path) -> Subject:
    """Return the subject with the parameters of a second checkpoint to go to.

    Raises InputError where there is none or its parameters have other names or shapes.
    """
    if is_run(checkpoint):
        params = run_params(checkpoint)
    elif (checkpoint / "config.json").is_file():
        params = load_model(checkpoint).params
    else:
        raise InputError(
            f"--toward={checkpoint} is neither POINT/checkpoints/STEP of a run nor a "
            "folder with a config.json"
        )
    here, there = _shapes(subject.problem.params), _shapes(params)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            shapes = f"{here.get(name, 'missing')} at --checkpoint, {there.get(name, 'missing')}"
            raise InputError(f"--toward={checkpoint} is another model: {name} is {shapes} there")
    return subject._replace(problem=subject.problem._replace(toward=params))


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): leaf.shape for path, leaf in leaves}
