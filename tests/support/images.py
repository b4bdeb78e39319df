"""A tiny run, and images of its folder at every moment: what a death then would have left."""

import re
import shutil
from pathlib import Path

from ml_collections import ConfigDict

from jaxflat.console import Display
from jaxflat.sweeps import sweep
from tests.support.sweeps import tiny_config

TRAIN = ("train",)  # and evaluate


def config() -> ConfigDict:
    """Both phases and the projection have the same settings, so that one program is compiled."""
    config = tiny_config()
    config.flatness.measures = ("fisher_trace",)
    config.phases.drift.targets = "exact"
    config.phases.drift.optimizer.name = "adamw"
    return config


def run(workdir: Path, points=({},), stages=TRAIN) -> None:
    assert sweep.run(config(), list(points), workdir, stages=stages) == {}


def take_images(workdir: Path, images: Path, monkeypatch) -> list[Path]:
    """Run to the end in `workdir`; return a copy of it for each time progress was shown."""
    advance, taken = Display.advance_stage, []

    def advance_and_copy(self, *arguments):
        advance(self, *arguments)
        image = Path(shutil.copytree(workdir, images / str(len(taken))))
        shutil.rmtree(image / "locks")  # their holder, this process, is not dead
        taken.append(image)

    with monkeypatch.context() as patched:
        patched.setattr(Display, "advance_stage", advance_and_copy)
        run(workdir)
    return taken


def warnings_in(text: str) -> dict[str, str]:
    """Return what stderr says of each damaged folder; every line of it is such a warning."""
    lines = [re.fullmatch(r"warning: (\S+): (.*)", line) for line in text.splitlines()]
    return {line[1]: line[2] for line in lines}
