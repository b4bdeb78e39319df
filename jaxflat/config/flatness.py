"""The keys of the flatness measurements."""

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
    """Return the keys of the flatness measurements."""
    return ConfigDict(
        {
            "measures": ("hessian_trace", "fisher_trace"),  # from MEASURES above
            # Labels of the Hessian's loss: exact (the exact conditionals), model (the model's own
            # distribution), or data (sampled words).
            "labels": "exact",
            "num_microbatches": 32,  # independent microbatches, each with its own probes
            "microbatch_size": 128,  # sentences
            "num_probes": 4,  # per microbatch: random vectors (Hessian) or label draws (Fisher)
            "probes_per_pass": 4,  # probes computed together; more of them need more memory
            # Also measure traces by block and by kind of parameter. Without them, tr H takes less
            # time and memory.
            "by_block": True,
            "remat": False,  # recompute activations instead of storing them: less memory, more time
            # Traces take 1, 2, 4, ..., max_rounds rounds of num_microbatches. They stop once there
            # are 128 microbatches and the 95% interval extends at most this fraction of the trace
            # to either side. 0: one round.
            "relative_error": 0.0,
            "max_rounds": 16,
            # Size of the common model of @embedded values. A sweep replaces width 0 by its largest
            # width and depth if all its models embed there; otherwise 0 means no @embedded values.
            # Layers 0: the model's own depth.
            "embedded_width": 0,
            "embedded_layers": 0,
            # More Lanczos steps reduce the residuals. Memory: num_steps times the parameters.
            "eigenvalues": {"num_largest": 5, "num_smallest": 1, "num_steps": 40},
            "density": {"num_probes": 4, "num_steps": 30},
            "sharpness": {
                "sigma": 0.01,  # standard deviation of random perturbations
                "radius": 0.05,  # length of the worst perturbation
                "adaptive_sigma": 0.05,  # the same, relative to each parameter's size
                "adaptive_radius": 0.5,
                "ascent_steps": 1,  # gradient steps to the worst perturbation; 1: as in SAM
            },
            "learning_coefficient": {
                "num_chains": 4,
                "num_burnin": 200,  # discarded steps at the start of each chain
                "num_draws": 500,  # steps of each chain that count
                "step_size": 0.01,  # in units of 1 / (n beta), with n training sentences
                "localization": 100.0,  # strength of the spring to the checkpoint
            },
            # Figures of `python -m jaxflat.measure`. extent 1: steps as long as the filters.
            "slices": {"num_directions": 5, "num_points": 41, "plane_points": 21, "extent": 1.0},
        }
    )
