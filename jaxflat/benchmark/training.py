"""The speed of training steps: alone, relative to the machine's peak, and to a peer's steps."""

import tempfile
from pathlib import Path

import numpy as np

from jaxflat.benchmark.peers import Peer
from jaxflat.benchmark.timing import Figure, Stopwatch, summarize
from jaxflat.benchmark.workload import Shape, resolved_config, sample_sentences, step_flops
from jaxflat.config import Config
from jaxflat.runs import builders, recovery, slots, trajectory

NUM_SENTENCES = 4096


class TrainingRuns:
    """Runs that each call continues: sampling inside, AdamW, the runs' own mesh."""

    def __init__(self, config: Config):
        (phase,) = trajectory.phases(config)
        self._calls = {}
        for slot in range(config.training.together):
            state = recovery.fresh_state(config, builders.init_params(config), phase)
            self._calls[slot] = slots.Call(config, phase, state, 0, 0, "trunk")

    def train(self, num_steps: int) -> list[float]:
        """Take this many steps of all runs in one compiled call; return their mean losses."""
        calls = {i: call._replace(stop=call.stop + num_steps) for i, call in self._calls.items()}
        outcomes = slots.run_calls(calls)
        self._calls = {i: call._replace(state=outcomes[i].state) for i, call in calls.items()}
        return [outcome.loss for outcome in outcomes.values()]


def start_training(
    shape: Shape, seconds: float, *, together: int = 1, penalty_strength: float = 0.0
) -> Stopwatch:
    """Return a stopwatch of training steps, compiled and warm, of a `resolved_config`."""
    config = resolved_config(shape, together, penalty_strength)
    return Stopwatch(TrainingRuns(config).train, seconds)


def compare_together(shape: Shape, number: int, seconds: float, rounds: int) -> dict[str, Figure]:
    """Return how many times faster runs are in one program than one by one, timed in turn."""
    one, together = (start_training(shape, seconds, together=count) for count in (1, number))
    ratios = [number * one.seconds() / together.seconds() for _ in range(rounds)]
    return {f"sweep/{number}_together_over_in_turn": summarize(ratios, "times as fast")}


def measure_training(
    shape: Shape, watch: Stopwatch, peak_gflops: float, repeats: int
) -> dict[str, Figure]:
    """Return a step's time, sentences a second, and the matrix products' share of the peak.

    Products with padding do not count.
    """
    flops = step_flops(shape, sample_sentences(shape, NUM_SENTENCES))
    times = [watch.seconds() for _ in range(repeats)]
    shares = [flops / t / (1e9 * peak_gflops) for t in times]
    return {
        "training/step_ms": summarize([1e3 * t for t in times], "ms"),
        "training/sentences_per_s": summarize([shape.batch / t for t in times], "sentences/s"),
        "training/matmul_share": summarize(shares, "of peak"),
    }


def compare_with_penalty(
    shape: Shape, watch: Stopwatch, seconds: float, rounds: int
) -> dict[str, Figure]:
    """Return a step's time with the Gauss-Newton penalty, in plain steps, timed in turn."""
    penalized = start_training(shape, seconds, penalty_strength=1e-5)
    ratios = [penalized.seconds() / watch.seconds() for _ in range(rounds)]
    return {"training/gauss_newton_penalty_in_steps": summarize(ratios, "plain steps")}


def compare_with_peer(shape: Shape, watch: Stopwatch, peer: Peer, rounds: int) -> dict[str, Figure]:
    """Return the peer's sentences a second, and the ratio of ours to them, timed in turn.

    Both have sentences of the same language; the peer reads them from a file. The ratio is
    meaningful only on an idle machine: frameworks lose different amounts by shared cores.
    """
    rates, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sentences.npy"
        np.save(file, sample_sentences(shape, NUM_SENTENCES))
        for _ in range(rounds):
            ours = shape.batch / watch.seconds()
            rates.append(peer.sentences_per_s(shape, file))
            ratios.append(ours / rates[-1])
    return {
        "training/peer_sentences_per_s": summarize(rates, "sentences/s"),
        "training/sentences_per_s_over_peer": summarize(ratios, "times"),
    }
