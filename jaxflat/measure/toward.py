"""The checkpoint given by --toward: the end of a path through the loss."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxflat.config.validation import InputError
from jaxflat.measure.subjects import Subject, run_model
from jaxflat.models.huggingface import load_model, read_model
from jaxflat.runs.saved_run import is_checkpoint, load


def lead_toward(subject: Subject, start: Path, end: Path) -> Subject:
    """Return the subject of the checkpoint `start` with the parameters of `end` as its goal.

    Raises InputError if `end` is not a checkpoint or has another model.
    """
    if is_checkpoint(end):
        there = run_model(end)
    elif (end / "config.json").is_file():
        there = read_model(end)
    else:
        raise InputError(
            f"--toward={end} is neither POINT/checkpoints/STEP of a run nor a "
            "folder with a config.json"
        )
    here = run_model(start) if is_checkpoint(start) else read_model(start)
    if here != there:
        raise InputError(f"--toward={end} is another model: {difference(here, there)}")
    params = load(end).params if is_checkpoint(end) else load_model(end).params
    return subject._replace(problem=subject.problem._replace(toward=params))


def difference(here: Any, there: Any) -> str:
    """Return the first difference between two models."""
    if type(here) is not type(there):
        return f"a {type(there).__name__}, not a {type(here).__name__}"
    names = (field.name for field in dataclasses.fields(here))
    name = next(name for name in names if getattr(here, name) != getattr(there, name))
    return f"{name}={getattr(there, name)!r}, not {getattr(here, name)!r}"
