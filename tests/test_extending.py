"""The examples of docs/extending.md, applied to a copy of the package by the text of the page."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"([^\n]+(?:\n[^\n]+)*):\n\n```python\n(.*?)```", re.S)
TINY = """
from tests.support.sweeps import tiny_config

def get_config(scale=None):
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    config.flatness.update({"num_microbatches": 2, "measures": ("gradient_noise",)})
    config.flatness.num_microbatches = 6
    return config
"""

pytestmark = pytest.mark.slow


def section_of(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def apply(package: Path, title: str) -> None:
    """Write each code block of a section where the sentence above it says that it belongs."""
    path = None
    for sentence, code in BLOCK.findall(section_of(title)):
        if named := re.findall(r"`((?:jaxflat|tests)/\S+\.py)`", sentence):
            path = package / named[-1]
        assert path is not None, sentence
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
        else:
            path.write_text(inserted(path.read_text(), sentence, code))


def inserted(text: str, sentence: str, code: str) -> str:
    """Return a file's text with code in it: at its top, above a name, or in a name's brackets."""
    lines, name = text.splitlines(keepends=True), re.findall(r"`([A-Za-z_]+)(?:\(\))?`", sentence)
    if "top of" in sentence:
        first = next(node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom))
        return "".join([*lines[: first.lineno - 1], code, *lines[first.lineno - 1 :]])
    (node,) = (node for node in ast.parse(text).body if names(node) == name[0])
    if "above" in sentence:
        return "".join([*lines[: node.lineno - 1], code, "\n\n", *lines[node.lineno - 1 :]])
    holder = next(
        n
        for n in ast.walk(node)
        if isinstance(n, (ast.Dict, ast.Tuple)) and n.lineno < n.end_lineno
    )
    return "".join([*lines[: holder.end_lineno - 1], code, *lines[holder.end_lineno - 1 :]])


def names(node: ast.stmt) -> str | None:
    """Return the name that a statement defines."""
    if isinstance(node, ast.FunctionDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else None


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in ("jaxflat", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tiny.py").write_text(TINY)
    return tmp_path


def run(copy: Path, *flags: str) -> list[str]:
    """Run a sweep in the copy; return the columns of its results."""
    environment = os.environ | {"PYTHONPATH": str(copy), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "jaxflat.main", "--config=tiny.py", "--workdir=run", *flags]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (copy / "run" / "results.csv").read_text().partition("\n")[0].split(",")


def test_an_optimizer(copy):
    apply(copy, "An optimizer")
    run(copy, "--config.phases.pretrain.optimizer.name=ademamix", "--stages=train")


def test_a_measure_of_flatness(copy):
    apply(copy, "A measure of flatness")
    own_test = "tests/flatness/test_gradient_curvature.py"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", own_test]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    tested = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout
    measures = "--config.flatness.measures=gradient_curvature"
    columns = run(copy, measures, "--stages=train,flatness,report")
    assert {"gradient_curvature", "gradient_curvature_sem", "gradient_curvature@embedded"} <= set(
        columns
    )
    assert "Curvature along the gradient" in (copy / "run" / "report.html").read_text()


def test_a_measurement(copy):
    apply(copy, "A measurement")
    assert {"confidence", "confidence_sem"} <= set(run(copy, "--stages=train,confidence"))
    before = (copy / "run" / "run" / "metrics.jsonl").stat().st_mtime_ns
    run(copy, "--stages=confidence", "--config.confidence.num_sentences=64")
    assert (copy / "run" / "run" / "metrics.jsonl").stat().st_mtime_ns == before
