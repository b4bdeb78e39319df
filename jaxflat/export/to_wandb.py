"""Write a sweep to Weights & Biases: a group of runs, one for each point, and the report."""

import os
import re
from functools import partial

from jaxflat.config.validation import InputError
from jaxflat.export.finished_sweep import FinishedSweep


def write(sweep: FinishedSweep) -> None:
    """Add the runs of a sweep to WANDB_PROJECT ("jaxflat"); WANDB_MODE and WANDB_DIR say where.

    Every number has the key "step" beside it, the x-axis: checkpoints of anneals are not in the
    order of steps. A second call adds the runs again. Raises ImportError if wandb is not installed,
    and InputError if Weights & Biases refuses.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("the package wandb is missing: pip install 'jaxflat[wandb]'") from None
    start = partial(
        wandb.init, project=os.environ.get("WANDB_PROJECT", "jaxflat"), group=sweep.name
    )
    try:
        for point in sweep.points:
            with start(name=point.name, job_type="point", config=point.config) as run:
                run.define_metric("*", step_metric="step")
                for step, numbers in point.history:
                    run.log({"step": step, **numbers})
        with start(name=f"{sweep.name}: report", job_type="report") as run:
            name = re.sub(r"[^\w.-]", "-", sweep.name)  # W&B allows no other characters
            report = wandb.Artifact(f"{name}-report", type="report")
            for path in sweep.files:
                report.add_file(str(path))
            run.log_artifact(report)
    except wandb.Error as error:
        raise InputError(f"{error}; WANDB_MODE=offline needs no account") from error
