"""The checkpoints that --checkpoint names: one folder, or all that match a glob of one training."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxflat.config.validation import InputError
from jaxflat.datasets.tokenizer import PARTS, WHOLE
from jaxflat.measure.toward import difference
from jaxflat.models.huggingface import read_model
from jaxflat.runs.saved_run import is_checkpoint


def find_checkpoints(pattern: Path, any_file: bool = False) -> list[Path]:
    """Return the paths that match a glob, numbers in natural order; a path that exists is itself.

    Without any_file only checkpoints of runs and folders with a config.json match. Raises
    InputError if nothing matches.
    """
    if pattern.exists() or not glob.has_magic(str(pattern)):
        return [pattern]
    matches = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    found = [
        path
        for path in matches
        if any_file or is_checkpoint(path) or (path / "config.json").is_file()
    ]
    if not found:
        raise InputError(f"--checkpoint={pattern}: no checkpoint matches")
    return sorted(found, key=lambda path: _natural(str(path)))


def check_comparable(paths: Sequence[Path]) -> None:
    """Raise InputError if checkpoints belong to several runs, or differ in model or tokenizer."""
    first = paths[0]
    for path in paths[1:]:
        if is_checkpoint(path) != is_checkpoint(first):
            raise InputError(f"--checkpoint matches a run's {first} and a folder {path}")
        if is_checkpoint(path):
            if path.absolute().parents[1] != first.absolute().parents[1]:
                raise InputError(f"--checkpoint matches several runs: {first}, {path}")
            continue
        models = read_model(first), read_model(path)
        if models[0] != models[1]:
            raise InputError(f"{path} is another model than {first}: {difference(*models)}")
        whole = all((folder / WHOLE).is_file() for folder in (first, path))
        for name in (WHOLE,) if whole else PARTS:
            files = first / name, path / name
            if len({file.read_bytes() for file in files if file.is_file()}) > 1:
                raise InputError(f"{files[1]} is another tokenizer than {files[0]}")


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return each path without the folder that all share."""
    shared = shared_folder(paths)
    return [str(path.relative_to(shared)) for path in paths]


def shared_folder(paths: Sequence[Path]) -> Path:
    """Return the deepest folder that holds all paths."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def steps_of(labels: Sequence[str]) -> list[int] | None:
    """Return the last number in each label; None if one has none, or two have the same.

    A suffix that all labels share, such as .h5, does not count.
    """
    if len({Path(label).suffix for label in labels}) == 1:
        labels = [str(Path(label).with_suffix("")) for label in labels]
    numbers = [int(found[-1]) for label in labels if (found := re.findall(r"\d+", label))]
    return numbers if len(set(numbers)) == len(labels) else None


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers by size: step9 before step10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)
    ]
