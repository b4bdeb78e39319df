"""Curvature in PyTorch beside ours, by `torch_peer.py` in the user's interpreter.

Both sides time Hessian-vector products in turn, on models of the same sizes. Both estimate the
trace of G of the same BERT on random sentences. PyTorch draws its parameters, and we read them.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxflat import config as base_config
from jaxflat.benchmark.flatness import Probes
from jaxflat.benchmark.timing import Figure, summarize
from jaxflat.benchmark.workload import Shape
from jaxflat.config.validation import InputError
from jaxflat.flatness import TraceTerms, gauss_newton_trace_samples
from jaxflat.measure.texts import MaskedTexts, masked_losses
from jaxflat.models.bert import Bert
from jaxflat.models.huggingface import load_model

TIME_LIMIT_S = 1800
SPECIAL, MASK = 5, 4  # as in torch_peer
NUM_SAMPLES = 64  # samples of PyTorch's trace in a round
PRECISION = 0.02  # standard error over trace


def compare_with_torch(
    shape: Shape, python: str, rounds: int, probes: Probes, per_pass: int
) -> dict[str, Figure]:
    """Return the times of a Hessian-vector product and of a precise trace of G, ours and PyTorch's.

    Ours is one more product on a microbatch; curvlinops takes a whole one. `torch_peer` describes
    the official way. The seconds to a relative standard error e are the measured seconds times
    (measured error / e)^2. Every round draws new samples, so the range includes the error of the
    measured error.
    """
    ours, theirs, seconds_to_aim = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            theirs.append(_run(python, shape, number, folder))
            ours.append(1e3 * probes.seconds("hvp_probe")[0])
            if number == 0:
                draw_terms = trace_of_saved(Path(folder), shape, per_pass)
                jax.block_until_ready(draw_terms(rounds))
            start = time.perf_counter()
            total = jax.block_until_ready(draw_terms(number)).total()
            seconds = time.perf_counter() - start
            seconds_to_aim.append(seconds * float(total.sem / total.mean / PRECISION) ** 2)
    official = [1e-3 * t["sample_ms"] * _needed(t["samples"]) for t in theirs]
    products = [t["product_ms"] for t in theirs]
    return {
        "flatness/hvp_probe_ms": summarize(ours, "ms"),
        "flatness/curvlinops_product_ms": summarize(products, "ms"),
        "flatness/torch_gradient_ms": summarize([t["gradient_ms"] for t in theirs], "ms"),
        "flatness/curvlinops_over_hvp_probe": summarize(_ratios(products, ours), "times"),
        "flatness/ggn_trace_to_2_percent_s": summarize(seconds_to_aim, "s"),
        "flatness/official_trace_to_2_percent_s": summarize(official, "s"),
        "flatness/official_over_ggn_trace": summarize(_ratios(official, seconds_to_aim), "times"),
    }


def trace_of_saved(folder: Path, shape: Shape, per_pass: int) -> Callable[[int], TraceTerms]:
    """Return a function from a round's number to samples of tr G of a saved BERT.

    It draws as many samples as a run does by default, with new sentences in each round, as
    PyTorch's side does.
    """
    model, params, *_ = load_model(folder)
    assert isinstance(model, Bert)
    settings, (_, log_probs_fn) = base_config.base().flatness, masked_losses(model)
    size = (settings.num_microbatches, shape.batch, shape.length)

    @jax.jit
    def sentences(key: jax.Array) -> MaskedTexts:
        keys = jax.random.split(key)
        words = jax.random.randint(keys[0], size, SPECIAL, SPECIAL + shape.words)
        positions = jax.random.randint(keys[1], (*size[:2], 1), 0, shape.length)
        hidden = jnp.arange(shape.length)[None, None] == positions
        hidden_words = jnp.take_along_axis(words, positions, axis=2)
        lengths = jnp.full(size[:2], shape.length)
        return MaskedTexts(jnp.where(hidden, MASK, words), lengths, positions, hidden_words)

    def draw(number: int) -> TraceTerms:
        keys = jax.random.split(jax.random.key(number))
        return gauss_newton_trace_samples(
            log_probs_fn,
            params,
            sentences(keys[0]),
            keys[1],
            num_probes=settings.num_probes,
            probes_per_pass=per_pass,
        )

    return draw


def _needed(samples: list[float]) -> float:
    """Return how many samples make the standard error of the mean PRECISION times the mean."""
    return float(np.var(samples, ddof=1) / (PRECISION * np.mean(samples)) ** 2)


def _ratios(first: list[float], second: list[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]


def _run(python: str, shape: Shape, number: int, folder: str) -> dict[str, Any]:
    """Run the number-th round of the PyTorch side; raise InputError if it fails."""
    heads = shape.width // shape.head_size
    sizes = (shape.width, shape.layers, heads, shape.batch, shape.length, shape.words)
    script = Path(__file__).with_name("torch_peer.py")
    last = (*sizes, NUM_SAMPLES, number, folder)
    command = [python, "-W", "ignore", str(script), *map(str, last)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--torch: {error}") from error
    except (IndexError, ValueError):
        last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(
            f"--torch={python} needs torch, transformers and curvlinops-for-pytorch: {last_line}"
        ) from None
