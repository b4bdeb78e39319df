"""The config keys of flatness: which measures, on how many sentences, how precisely."""

from typing import Any

from jaxflat.config.ranges import Bounded

MEASURES = (
    *("hessian_trace", "gauss_newton_trace", "fisher_trace"),
    *("hessian_eigenvalues", "hessian_density"),
    *("average_sharpness", "adaptive_average_sharpness"),
    *("worst_sharpness", "adaptive_worst_sharpness", "critical_sharpness"),
    *("gradient_noise", "local_learning_coefficient"),
)


def flatness() -> dict[str, Any]:
    """Return the keys of the flatness measurements, with their bounds."""
    return {
        "measures": Bounded(("hessian_trace", "fisher_trace"), choices=MEASURES),
        # The labels of the Hessian's loss: exact conditionals, the model's own distribution, or
        # sampled words (data).
        "labels": Bounded("exact", choices=("exact", "model", "data")),
        # Independent microbatches, each with its own probes.
        "num_microbatches": Bounded(32, least=2),
        "microbatch_size": 128,  # sentences
        "num_probes": 4,  # random vectors (Hessian) or label draws (Fisher) per microbatch
        "probes_per_pass": 4,  # probes in one pass; more need more memory
        # Also give the traces of blocks and kinds of parameters; without them tr H takes less time
        # and memory.
        "by_block": True,
        # Also give traces that no rescaling of the parameters changes (@invariant). They double the
        # time of traces. Memory: 9 width^2 head_size numbers for each layer with attention.
        "invariant": True,
        "remat": False,  # recompute activations instead of storing them: less memory, more time
        # Traces take 1, 2, 4, ..., max_rounds rounds of num_microbatches. They stop at 128 or more
        # microbatches, once the 95% interval reaches at most this fraction of the trace to either
        # side; 0: one round.
        "relative_error": Bounded(0.0, least=0),
        "max_rounds": 16,
        # Size of the common model for @embedded values. If the width is 0, a sweep sets both to its
        # largest sizes, provided that all its models embed in them. Layers 0: the model's own.
        "embedded_width": Bounded(0, least=0),
        "embedded_layers": Bounded(0, least=0),
        # More Lanczos steps give smaller residuals. Memory: num_steps times the parameters.
        "eigenvalues": {
            "num_largest": Bounded(5, least=0),
            "num_smallest": Bounded(1, least=0),
            "num_steps": 40,
        },
        "density": {"num_probes": 4, "num_steps": 30},
        "sharpness": {
            "sigma": 0.01,  # standard deviation of random perturbations
            "radius": 0.05,  # length of the worst perturbation
            "adaptive_sigma": 0.05,  # the same, relative to each parameter's size
            "adaptive_radius": 0.5,
            "ascent_steps": 1,  # gradient steps to the worst perturbation; 1: SAM's
        },
        # Every step of a chain takes the gradient of all microbatches.
        "learning_coefficient": {
            "num_chains": Bounded(4, least=2),
            "num_draws": Bounded(1000, least=8),  # of each chain, after its burn-in
            # Strength of the spring that pulls a chain to the checkpoint, in units of the largest
            # curvature. Directions of less curvature hardly count.
            "relative_localization": 0.1,
        },
        # Figures of `python -m jaxflat.measure`; extent 1: steps as long as the filters.
        "slices": {"num_directions": 5, "num_points": 41, "plane_points": 21, "extent": 1.0},
    }
