"""The columns of results.csv that say how sharp the loss is, in the order they are looked for.

Each is larger where the loss is sharper; the learning coefficient, where it is less degenerate.
In a comparison the first that was measured decides, also where it leaves things undecided.
"""

SHARPNESS = {
    "hessian_trace": "Hessian trace",
    "fisher_trace": "Fisher trace",
    "gauss_newton_trace": "Gauss-Newton trace",
    "hessian_eigenvalue/largest_1": "Largest Hessian eigenvalue",
    "average_sharpness": "Average sharpness",
    "adaptive_average_sharpness": "Adaptive average sharpness",
    "worst_sharpness": "Worst-case sharpness",
    "adaptive_worst_sharpness": "Adaptive worst-case sharpness",
    "critical_sharpness": "Critical sharpness",
    "local_learning_coefficient": "Local learning coefficient",
}
PARAMETRISATION = (
    "The embedded trace is taken in one parametrisation, which is a choice: rescalings of the "
    "weights that leave the function as it is change the trace, and can change which of two models "
    "is the flatter."
)
EMBEDDED = {f"{column}@embedded": name for column, name in SHARPNESS.items()}
