"""List the stages of a run, in order: training, then each measurement of its checkpoints.

A new measurement is one line in MEASUREMENTS. This list decides `--stages`, the files of a run,
which runs are done, and the columns of results.csv.
"""

from jaxflat.config import Config
from jaxflat.runs import measure_flatness, measure_loss, measure_probes, trajectory
from jaxflat.runs.measurements import Measurement

MEASUREMENTS = (
    Measurement("train", "evaluation", measure_loss.settings, measure_loss.measure),
    Measurement("flatness", "flatness", measure_flatness.settings, measure_flatness.measure),
    Measurement("probes", "probes", measure_probes.settings, measure_probes.measure),
)

STAGES = tuple(dict.fromkeys(["train", *(m.stage for m in MEASUREMENTS), "report"]))


def num_stages(config: Config) -> int:
    """Return the number of a run's stages: each phase, and each measurement of each checkpoint."""
    measured = [m for m in MEASUREMENTS if m.settings(config)]
    return len(config.phase_order) + len(measured) * len(trajectory.measured_checkpoints(config))
