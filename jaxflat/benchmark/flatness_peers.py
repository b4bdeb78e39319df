"""Curvature in PyTorch beside ours, by `torch_peer.py` in an interpreter of the user's.

Both sides take their steps at models of the same sizes, in turn. Models and batches are random:
what is compared is time, and how many samples of a trace an error of 2% takes.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxflat.benchmark.timing import Figure, summarize
from jaxflat.benchmark.workload import Shape
from jaxflat.flatness import TraceTerms
from jaxflat.validation import InputError

TIME_LIMIT_S = 1800
NUM_SAMPLES = 64  # of PyTorch's trace, over all rounds
PRECISION = 0.02  # standard error over trace


def compare_with_torch(
    shape: Shape,
    python: str,
    rounds: int,
    probe_seconds: Callable[[], float],
    draw_terms: Callable[[], TraceTerms],
) -> dict[str, Figure]:
    """Return times of a Hessian-vector product and to a precise trace of G, ours and PyTorch's.

    probe_seconds() times one more of our products on one microbatch; draw_terms() samples tr G.
    The official way is the one described in `torch_peer`. Seconds to a relative standard error e
    are the measured seconds times (measured error / e)^2.
    """
    ours, theirs, seconds_to_aim = [], [], []
    jax.block_until_ready(draw_terms())
    for number in range(rounds):
        ours.append(1e3 * probe_seconds())
        start = time.perf_counter()
        total = jax.block_until_ready(draw_terms()).total()
        seconds = time.perf_counter() - start
        seconds_to_aim.append(seconds * float(total.sem / total.mean / PRECISION) ** 2)
        theirs.append(_run(python, shape, -(-NUM_SAMPLES // rounds), number))
    samples = np.concatenate([t["samples"] for t in theirs])
    needed = samples.var(ddof=1) / (PRECISION * samples.mean()) ** 2
    official = [1e-3 * t["sample_ms"] * needed for t in theirs]
    products = [t["product_ms"] for t in theirs]
    own = statistics.median(seconds_to_aim)
    return {
        "flatness/hvp_probe_ms": summarize(ours, "ms"),
        "flatness/curvlinops_product_ms": summarize(products, "ms"),
        "flatness/torch_gradient_ms": summarize([t["gradient_ms"] for t in theirs], "ms"),
        "flatness/curvlinops_over_hvp_probe": summarize(
            [p / o for p, o in zip(products, ours, strict=True)], "times"
        ),
        "flatness/ggn_trace_to_2_percent_s": summarize(seconds_to_aim, "s"),
        "flatness/official_trace_to_2_percent_s": summarize(official, "s"),
        "flatness/official_over_ggn_trace": summarize([o / own for o in official], "times"),
    }


def _run(python: str, shape: Shape, num_samples: int, number: int) -> dict[str, Any]:
    """Run the number-th round of the PyTorch side; InputError where it fails."""
    heads = shape.width // shape.head_size
    sizes = (shape.width, shape.layers, heads, shape.batch, shape.length, shape.words)
    script = Path(__file__).with_name("torch_peer.py")
    command = [python, "-W", "ignore", str(script), *map(str, (*sizes, num_samples, number))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--torch: {error}") from error
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(
            f"--torch={python} needs torch, transformers and curvlinops-for-pytorch: {last}"
        ) from None
