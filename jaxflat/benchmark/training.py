"""How fast training steps run: alone, against the machine's peak, and against someone else's."""

import jax

from jaxflat import experiment, sharding, trajectory
from jaxflat.benchmark.peers import Peer
from jaxflat.benchmark.timing import Figure, Stopwatch, summarize
from jaxflat.benchmark.workload import Shape, resolved_config, step_flops
from jaxflat.config import Config
from jaxflat.languages.batches import Source


class TrainingRun:
    """A run that goes on from call to call: language sampled inside, AdamW, the run's own mesh."""

    def __init__(self, config: Config):
        (phase,) = trajectory.phases(config)
        mesh = experiment.make_mesh(config)
        model, masking = experiment.make_model(config), config.language.masking
        self._steps = experiment.train_steps(model, phase.settings, masking, mesh)
        self._source = Source(experiment.make_language(config.language))
        self._key = experiment.purpose_key(config.data_seed, phase.name)
        self._schedule = experiment.schedule(phase.settings, anneal=False)
        state = experiment.init_state(experiment.init_params(config), phase)
        self._state = sharding.replicate(mesh, state)
        self._stop = 0

    def advance(self, num_steps: int) -> jax.Array:
        """Take this many steps in one compiled call; return their mean loss."""
        self._stop += num_steps
        self._state, loss = self._steps(
            self._state, self._source, self._key, self._schedule, 0, self._stop
        )
        return loss


def start_training(shape: Shape, seconds: float) -> Stopwatch:
    """Return a stopwatch of training steps, compiled and warm."""
    return Stopwatch(TrainingRun(resolved_config(shape)).advance, seconds)


def measure_training(
    shape: Shape, watch: Stopwatch, peak_gflops: float, repeats: int
) -> dict[str, Figure]:
    """Return a step's time, the sentences a second, and the matrix products' share of the peak."""
    times = [watch.seconds() for _ in range(repeats)]
    shares = [step_flops(shape) / t / (1e9 * peak_gflops) for t in times]
    return {
        "training/step_ms": summarize([1e3 * t for t in times], "ms"),
        "training/sentences_per_s": summarize([shape.batch / t for t in times], "sentences/s"),
        "training/matmul_share": summarize(shares, "of peak"),
    }


def compare_with_peer(shape: Shape, watch: Stopwatch, peer: Peer, rounds: int) -> dict[str, Figure]:
    """Return the peer's sentences a second, and ours over them: one of each in turn, paired.

    Meaningful on an idle machine only: frameworks suffer very differently from sharing cores.
    """
    rates, ratios = [], []
    for _ in range(rounds):
        ours = shape.batch / watch.seconds()
        rates.append(peer.sentences_per_s(shape))
        ratios.append(ours / rates[-1])
    return {
        "training/peer_sentences_per_s": summarize(rates, "sentences/s"),
        "training/sentences_per_s_over_peer": summarize(ratios, "times"),
    }
