"""List the columns of results.csv that measure sharpness, in order of precedence.

A larger value means a sharper loss; for the learning coefficient, a less degenerate one. In a
comparison the first measured column of COMPARED decides, even if its result is undecided.
"""

from collections.abc import Iterable

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
EMBEDDED = {
    f"{column}@embedded": f"embedded {name if '_trace' in column else name[0].lower() + name[1:]}"
    for column, name in SHARPNESS.items()
}
INVARIANT = {
    f"{column}@embedded_invariant": f"invariant {name}"
    for column, name in SHARPNESS.items()
    if column.endswith("_trace")
}
COMPARED = INVARIANT | EMBEDDED
"""The columns in which models are compared. Verdicts rest on the first that was measured."""


def own_measures(columns: Iterable[str]) -> dict[str, str]:
    """Return the columns of measures that SHARPNESS does not list, such as a user's own, by name.

    Of a measure with embedded values, it is their column. Whether a larger value means a sharper
    loss is not known.
    """
    columns = dict.fromkeys(columns)
    listed = {*SHARPNESS, "loss", "optimal_loss", "excess_loss"}
    names = (name for name in columns if f"{name}_sem" in columns and not set("/@ ") & set(name))
    return {
        f"{name}@embedded" if f"{name}@embedded" in columns else name: name
        for name in names
        if name not in listed
    }
