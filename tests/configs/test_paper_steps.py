"""Real steps of the smallest and the largest model of each config at the scale `paper`."""

import json
import math
import subprocess
import sys

import pytest

from tests.support import paper_step
from tests.support.counts import FULL

MOST_GIB = 24
WIDTHS = {
    "model_size_sweep": (96, 1536),
    "causal_size_sweep": (96, 1536),
    "lstm_size_sweep": (480, 1920),
    "factorial_sweep": (384, 768),
    "generated_text": (96, 768),
    "continued_training_sweep": (768, 768),
}
"""Widths of the smallest and the largest model of configs that have different ones."""
SAME = ("flatness_dial_sweep", "optimizer_sweep", "penalty_sweep")
"""Their models are those of continued_training_sweep."""
CASES = [(name, width) for name, widths in WIDTHS.items() for width in dict.fromkeys(widths)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in paper_step.CONFIGS.glob("*.py")))
def test_the_smallest_and_the_largest_model_of_each_config_are_among_the_cases(name):
    shapes = {config.model: config.model.width for config in paper_step.paper_configs(name)}
    case = "continued_training_sweep" if name in SAME else name
    assert (min(shapes.values()), max(shapes.values())) == WIDTHS[case]
    if name in SAME:
        assert shapes.keys() == {config.model for config in paper_step.paper_configs(case)}


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="up to ten minutes and 16 GiB each")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "width"), CASES)
def test_steps_and_a_trace_fit_a_machine_of_24_gib(name, width):
    """An untrained model predicts words about as well as a uniform guess."""
    command = [sys.executable, "-m", "tests.support.paper_step", f"--config={name}"]
    done = subprocess.run([*command, f"--width={width}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    print(name, width, figures)
    assert len(figures["losses"]) == paper_step.NUM_STEPS
    uniform = math.log(figures["words"])
    assert all(0.5 * uniform < loss < 2 * uniform for loss in figures["losses"])
    assert math.isfinite(figures["trace"])
    assert figures["gib"] < MOST_GIB
