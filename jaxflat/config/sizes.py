"""The sizes that configs share at the scales `smoke`, `gpu` and `paper`; configs set the others."""

from collections.abc import Iterable

from jaxflat.config.paper import paper_grammar
from jaxflat.config.ranges import Config


def use_smoke_sizes(config: Config, phases: Iterable[Config]) -> None:
    """Set one layer, because compiling takes most of the time, few sentences and short anneals."""
    config.model.num_layers = 1
    for phase in phases:
        phase.batch_size, phase.schedule.warmup_steps = 32, 10
        phase.anneal_steps = min(phase.anneal_steps, 20)
    config.evaluation.update({"num_sentences": 256, "batch_size": 128})
    config.flatness.update({"num_microbatches": 4, "microbatch_size": 32, "num_probes": 2})
    config.probes.update({"num_validation": 256, "num_test": 512, "shots": (50, 200)})


def use_gpu_sizes(config: Config, phases: Iterable[Config], *, targets: str) -> None:
    """Set a transformer of 11 million parameters, and phases' targets, batches and rates.

    Training a point takes at most 1.6e16 FLOPs of matrix products: 160 seconds at an assumed 100
    TFLOP/s, a third of 8 minutes. The rest is for compiling, measuring and a slower device. Nothing
    of this has been measured on a GPU. docs/scaling.md has the figures of each config.
    """
    config.model.update({"width": 384, "num_layers": 6, "head_size": 48})
    config.training.compute_dtype = "bfloat16"
    for phase in phases:
        phase.targets, phase.batch_size, phase.schedule.learning_rate = targets, 1024, 1e-3


def use_paper_sizes(config: Config, phases: Iterable[Config]) -> None:
    """Set the grammar, a transformer of 184 million parameters, and phases' batches and rates."""
    config.language.update(paper_grammar())
    config.model.update({"width": 768, "num_layers": 26, "head_size": 48})
    for phase in phases:
        phase.batch_size, phase.microbatch_size, phase.schedule.learning_rate = 4096, 256, 1e-3
