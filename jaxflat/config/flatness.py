"""The keys of the curvature measurements."""

from ml_collections import ConfigDict

from jaxflat.config.languages import Config

MEASURES = (
    *("hessian_trace", "gauss_newton_trace", "fisher_trace"),
    *("hessian_eigenvalues", "hessian_density"),
    *("average_sharpness", "adaptive_average_sharpness"),
    *("worst_sharpness", "adaptive_worst_sharpness", "critical_sharpness"),
    *("gradient_noise", "local_learning_coefficient"),
)


def flatness() -> Config:
    """Return the keys of the curvature measurements."""
    return ConfigDict(
        {
            "measures": ("hessian_trace", "fisher_trace"),  # of MEASURES above
            # Whose labels the Hessian's loss has: exact conditionals, the model's own
            # distribution, or sampled words (data).
            "labels": "exact",
            "num_microbatches": 32,  # independent; each draws its own probes
            "microbatch_size": 128,  # sentences
            "num_probes": 4,  # random vectors (Hessian) or label draws (Fisher) each
            "probes_per_pass": 4,  # of these at once; costs memory
            # Traces of blocks and kinds of parameters too; without them tr H takes less time
            # and memory.
            "by_block": True,
            "remat": False,  # compute activations again instead of keeping them: memory for time
            # Traces take 1, 2, 4, ..., max_rounds rounds of num_microbatches, until there are 128
            # and the 95% interval is at most this share of the trace to either side; 0: one round.
            "relative_error": 0.0,
            "max_rounds": 16,
            # The common width that @embedded values refer to. A sweep sets the largest of its
            # models here; 0: none. Layers: its most, 0: the model's own.
            "embedded_width": 0,
            "embedded_layers": 0,
            # Lanczos steps; more make small residuals. Memory: num_steps times the parameters.
            "eigenvalues": {"num_largest": 5, "num_smallest": 1, "num_steps": 40},
            "density": {"num_probes": 4, "num_steps": 30},
            "sharpness": {
                "sigma": 0.01,  # standard deviation of random perturbations
                "radius": 0.05,  # length of the worst perturbation
                "adaptive_sigma": 0.05,  # the same, relative to each parameter's size
                "adaptive_radius": 0.5,
                "ascent_steps": 1,  # gradient steps to the worst perturbation; 1: SAM's
            },
            "learning_coefficient": {
                "num_chains": 4,
                "num_burnin": 200,  # steps of each chain before those that count
                "num_draws": 500,
                "step_size": 0.01,  # in units of 1 / (n beta), n the sentences trained on
                "localization": 100.0,  # strength of the spring to the checkpoint
            },
            # Pictures that `python -m jaxflat.measure` draws; extent 1: as long as the filters.
            "slices": {"num_directions": 5, "num_points": 41, "plane_points": 21, "extent": 1.0},
        }
    )
