"""The examples of docs/extending.md, applied to a copy of the package by the text of the page."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.config import loading
from jaxflat.flatness import Problem

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


def own_functions() -> str:
    """Return the config file that the page's blocks make, in their order."""
    section = section_of("Your own functions in a config file")
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    return "\n\n".join(blocks[1:])  # the first one is an extract


@pytest.fixture
def own(tmp_path) -> ModuleType:
    (tmp_path / "own_functions.py").write_text(own_functions())
    loading.load(str(tmp_path / "own_functions.py"))
    return sys.modules["jaxflat_user_config"]


def test_own_functions_run_in_a_sweep(copy):
    """Results and report have the columns of each; the same command again measures nothing."""
    (copy / "own.py").write_text(own_functions())
    small = {
        **{"language.sticky_hmm.num_words": 6, "language.sticky_hmm.length": 4},
        **{"model.width": 8, "model.num_layers": 1, "mesh.data": 1},
        **{"phases.pretrain.steps": 6, "phases.pretrain.anneal_steps": 2},
        **{"phases.pretrain.checkpoint_steps": "6,", "phases.pretrain.batch_size": 8},
        **{"phases.pretrain.schedule.warmup_steps": 2, "training.steps_per_call": 3},
        **{"evaluation.num_sentences": 16, "evaluation.batch_size": 8},
        **{"flatness.num_microbatches": 2, "flatness.microbatch_size": 8},
        **{"probes.shots": "16,", "probes.num_validation": 16, "probes.num_test": 32},
    }
    flags = ["--config=own.py", *(f"--config.{key}={value}" for key, value in small.items())]
    columns = run(copy, *flags)
    assert {"gradient_curvature", "gradient_curvature_sem", "model.convolution.kernel_size"} <= set(
        columns
    )
    assert any(re.fullmatch(r"nearest_mean/state_2\.map/16", name) for name in columns)
    page = (copy / "run" / "report.html").read_text()
    assert "gradient_curvature" in page
    assert "nearest mean" in page
    files = {path: path.read_bytes() for path in copy.glob("run/*/*.jsonl")}
    run(copy, *flags)
    assert {path: path.read_bytes() for path in copy.glob("run/*/*.jsonl")} == files


def test_the_curvature_of_a_quadratic_loss(own):
    """L = x'Ax / 2 has gradient g = Ax and Hessian A."""
    A = jnp.diag(jnp.array([1.0, 2.0, 5.0]))
    x = jnp.array([1.0, -1.0, 0.5])

    def loss_fn(params, batch):
        return batch * params @ A @ params / 2, batch

    ones_M = jnp.ones(4)  # four equal microbatches
    problem = Problem(loss_fn, loss_fn, x, lambda i: ones_M, jax.random.key(0), 1)
    g = A @ x
    np.testing.assert_allclose(own.gradient_curvature(problem).mean, g @ A @ g / (g @ g), rtol=1e-6)


def test_the_convolution_does_not_see_padding_and_selects_positions(own):
    V = 5
    tokens_BxT = np.array([[0, 1, 2, 3], [4, V + 1, 0, V]], np.int32)
    lengths_B = np.array([4, 3], np.int32)
    positions_BxM = np.array([[3, 0], [1, 2]], np.int32)
    model = own.Convolution(num_words=V, width=4, num_layers=2)
    params = model.init(jax.random.key(0), tokens_BxT, lengths_B)
    logits_BxTxV, _ = model.apply(params, tokens_BxT, lengths_B)
    other_BxT = tokens_BxT.copy()
    other_BxT[1, 3] = 2  # behind the end of its sentence
    np.testing.assert_array_equal(
        model.apply(params, other_BxT, lengths_B)[0][1, :3], logits_BxTxV[1, :3]
    )
    chosen_BxMxV, _ = model.apply(params, tokens_BxT, lengths_B, positions_BxM)
    expected_BxMxV = np.take_along_axis(logits_BxTxV, positions_BxM[:, :, None], axis=1)
    np.testing.assert_allclose(chosen_BxMxV, expected_BxMxV, rtol=1e-5)


def test_the_sticky_language_is_a_chain(own):
    hmm = own.sticky_hmm(0)
    np.testing.assert_allclose(hmm.transitions_KxK.sum(1), 1, rtol=1e-6)
    assert jnp.diag(hmm.transitions_KxK).min() >= 0.9


def test_a_measurement(copy):
    apply(copy, "A measurement")
    assert {"confidence", "confidence_sem"} <= set(run(copy, "--stages=train,confidence"))
    before = (copy / "run" / "run" / "metrics.jsonl").stat().st_mtime_ns
    run(copy, "--stages=confidence", "--config.confidence.num_sentences=64")
    assert (copy / "run" / "run" / "metrics.jsonl").stat().st_mtime_ns == before
