"""Training steps of other frameworks, timed by the user's script in its own interpreter."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jaxflat.benchmark.workload import Shape
from jaxflat.config.validation import InputError

TIME_LIMIT_S = 600
RATE = re.compile(r"([0-9][0-9.]*(?:e[+-]?[0-9]+)?) sentences/s")


@dataclass(frozen=True)
class Peer:
    """The command PYTHON SCRIPT width layers heads batch length sentences.npy.

    It ends with "N sentences/s".
    """

    python: str
    script: Path

    def sentences_per_s(self, shape: Shape, sentences: Path) -> float:
        """Run the script once; raise InputError if it fails or does not report a rate.

        sentences: a file of words_NxT, -1 after the end of a sentence.
        """
        heads = shape.width // shape.head_size
        sizes = (shape.width, shape.layers, heads, shape.batch, shape.length)
        command = [self.python, str(self.script), *map(str, sizes), str(sentences)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"--peers: {error}") from error
        if done.returncode:
            raise InputError(f"--peer_script exited with {done.returncode}: {_last(done.stderr)}")
        found = RATE.search(_last(done.stdout))
        if not found or float(found[1]) <= 0:
            raise InputError(
                "--peer_script's last line must contain 'N sentences/s'; "
                f"it is {_last(done.stdout)!r}"
            )
        return float(found[1])


def check_packages(python: str) -> None:
    """Raise InputError if the interpreter of our script for BERT lacks a package."""
    imports = "import numpy, torch, transformers"
    done = subprocess.run([python, "-c", imports], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"--peers={python} cannot '{imports}': {_last(done.stderr)}")


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
