"""What the eight commands share: the line and the exit code of an error, and quick parsing."""

import errno
import importlib
import subprocess
import sys

import pytest

from jaxflat.config.validation import InputError
from jaxflat.console import command
from jaxflat.distributed import leases, preemption, ranks

COMMANDS = {
    "main": ["--config=configs/model_size_sweep.py"],
    "build": ["--config=configs/model_size_sweep.py", "--output=none", "--num_sentences=1"],
    "status": ["none"],
    "report": ["none"],
    "export.__main__": ["wandb", "none"],
    "measure.__main__": ["--checkpoint=none"],
    "benchmark.__main__": [],
    "theory.__main__": ["dyck"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_flag_is_one_line_and_exit_code_2(name, capsys):
    module = importlib.import_module(f"jaxflat.{name}")
    assert module.main([*COMMANDS[name], "--jsno=x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert "--jsno=x" in line


def test_arguments_are_parsed_without_jax():
    """`build` and `measure` import JAX at the top, because they always need it."""
    names = ["main", "status", "report", "export.__main__", "benchmark.__main__"]
    names += ["theory.__main__"]
    program = f"""
import importlib, sys
for name in {names}:
    arguments = ["--config=none.py", "--jsno=x"] if name == "main" else ["--jsno=x"]
    assert importlib.import_module("jaxflat." + name).main(arguments) == 2
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


ERRORS = [
    (InputError("no such\nfile"), 2, "error: no such file"),
    (ranks.ClusterError("no cluster"), 2, "error: no cluster"),
    (KeyError("name"), 2, "error: 'name'"),
    (OSError(errno.EACCES, "denied", "x"), 2, "error: [Errno 13] denied: 'x'"),
    (
        OSError(errno.ENOSPC, "full", "x"),
        3,
        "error: [Errno 28] full: 'x'. Free some space and rerun the same command to continue.",
    ),
    (
        preemption.Preempted("SIGTERM"),
        75,
        "Interrupted by SIGTERM; state saved. Run the same command to resume.",
    ),
    (leases.LeaseLost("x: taken"), 75, "Stopped: x: taken. Run the same command to resume."),
]


@pytest.mark.parametrize(("error", "code", "line"), ERRORS)
def test_an_error_is_a_line_and_an_exit_code(error, code, line, capsys):
    @command(KeyError, OSError)
    def main(arguments):
        raise error

    assert main([]) == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EACCES, "denied")])
def test_an_unexpected_error_keeps_its_traceback(error):
    @command()
    def main(arguments):
        raise error

    with pytest.raises(type(error)) as caught:
        main([])
    assert caught.value is error
