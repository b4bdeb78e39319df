"""The theory command: exit codes, strict JSON, figures, and one line for bad input."""

import json
import os
import subprocess
import sys

import pytest

from jaxflat.theory import __main__ as theory
from jaxflat.theory import check_bartlett as bartlett
from jaxflat.theory.check import Check, CheckOutcome
from tests.support.counts import in_full

FIRST, *OTHERS = theory.RESULTS

GOOD = Check("two and two", 4.0, 4.01, 0.02, "tolerance")
BAD = Check("two and three", 5.0, 4.0, 0.5, "tolerance")


@pytest.mark.parametrize(
    ("relation", "measured", "holds"),
    [
        *(("=", 1.2, True), ("=", 0.8, True), ("=", 1.3, False), ("=", float("nan"), False)),
        *((">", 1.2, False), (">", 1.3, True), (">", 0.5, False), (">", float("nan"), False)),
        *(("<", 0.8, False), ("<", 0.7, True), ("<", 1.5, False), ("<", float("nan"), False)),
    ],
)
def test_a_check_holds_within_its_error_or_beyond_it(relation, measured, holds):
    assert Check("x", 1.0, measured, 0.25, "", relation).holds is holds


@pytest.mark.parametrize(("checks", "code"), [([GOOD], 0), ([GOOD, BAD], 1), ([], 0)])
def test_the_exit_code_and_the_json_say_what_holds(checks, code, monkeypatch, tmp_path, capsys):
    panels = [("A line", lambda ax: ax.plot([0, 1]))]
    monkeypatch.setattr(bartlett, "run", lambda: CheckOutcome(checks, panels, ["a remark"]))
    new = tmp_path / "new" / "folder"
    out = (f"--json={new / 'out.json'}", f"--figures={new / 'pictures'}")
    assert theory.main(["bartlett", *out]) == code
    expected = [
        {"name": "two and two", "expected": 4, "measured": 4.01, "error_bar": 0.02, "holds": True},
        {"name": "two and three", "expected": 5, "measured": 4, "error_bar": 0.5, "holds": False},
    ]
    assert json.loads((new / "out.json").read_text()) == {"checks": expected[: len(checks)]}
    drawn = sorted(path.name for path in (new / "pictures").iterdir())
    assert drawn == ["bartlett.png", "bartlett.svg"]
    printed = capsys.readouterr()
    assert "a remark" in printed.out
    for check in checks:
        assert check.name in printed.out
    assert printed.err == ("does not hold: two and three\n" if code else "")


def test_nan_is_null_and_does_not_hold():
    fields = Check("x", 1.0, float("nan"), float("inf"), "").as_json()
    assert fields["measured"] is None
    assert fields["error_bar"] is None
    assert fields["holds"] is False


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "RESULT"),
        (["dick"], "'dick' is not one of bartlett, drift, dyck"),
        (["dyck", "--jsn=x"], "--jsn"),
        (["dyck", "--json=setup.cfg/x/y.json"], "setup.cfg is a file"),
        (["dyck", "--json=."], "is a folder"),
        (["dyck", "--figures=setup.cfg"], "is a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, capsys):
    assert theory.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_help_names_every_result(capsys):
    with pytest.raises(SystemExit) as stop:
        theory.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in theory.RESULTS)


@pytest.mark.slow
@pytest.mark.parametrize("result", [FIRST, *in_full(*OTHERS)])
def test_every_check_of_the_command_holds(result, tmp_path):
    """Run in a subprocess, because this process compiles without optimizations, much slower."""
    command = [sys.executable, "-m", "jaxflat.theory", result, f"--json={tmp_path / 'out.json'}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(command, env=environment, check=True)
    checks = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert checks
    for check in checks:
        assert set(check) == {"name", "expected", "measured", "error_bar", "holds"}
        assert check["holds"]
    assert len({check["name"] for check in checks}) == len(checks)
