"""Write a sweep to MLflow: a run whose nested runs are the points, the report its artifact."""

import os

from jaxflat.config.validation import InputError
from jaxflat.export.finished_sweep import FinishedSweep


def write(sweep: FinishedSweep) -> None:
    """Add the runs of a sweep to MLFLOW_EXPERIMENT_NAME ("jaxflat") at MLFLOW_TRACKING_URI.

    Parameters of a run are the point's overrides. A second call adds the runs again. Raises
    ImportError if MLflow is not installed, and InputError if it refuses.
    """
    try:
        import mlflow  # pyright: ignore[reportMissingImports]
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("the package mlflow is missing: pip install 'jaxflat[mlflow]'") from None
    if "MLFLOW_EXPERIMENT_ID" not in os.environ:
        os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", "jaxflat")
    try:
        with mlflow.start_run(run_name=sweep.name):
            for path in sweep.files:
                mlflow.log_artifact(str(path))
            for point in sweep.points:
                with mlflow.start_run(run_name=point.name, nested=True):
                    mlflow.log_params(point.overrides)
                    mlflow.log_dict(point.config, "config.json")
                    for step, numbers in point.history:
                        named = {metric_name(name): value for name, value in numbers.items()}
                        mlflow.log_metrics(named, step=step)
    except MlflowException as error:
        raise InputError(str(error)) from error


def metric_name(column: str) -> str:
    """Return a column's name in MLflow, which allows no "@", and no "/" below another metric."""
    return column.replace("@", ":").replace("/", ".")
