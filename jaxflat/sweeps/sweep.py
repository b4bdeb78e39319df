"""Run a sweep: expand and check its points, share them with other workers, gather the results.

Overrides identify a point, not its position in the list: the same overrides find the same folder.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from jaxflat.config import Config, Sweep
from jaxflat.config.validation import InputError
from jaxflat.console import Display
from jaxflat.distributed import leases, preemption, ranks
from jaxflat.distributed.preemption import defer_signals
from jaxflat.runs import corpus
from jaxflat.runs.run import Point, is_done
from jaxflat.runs.stages import STAGES
from jaxflat.sweeps import workers
from jaxflat.sweeps.points import expand, select
from jaxflat.sweeps.results import gather, summary
from jaxflat.sweeps.sweep_record import record_sweep


@defer_signals()
def run(
    config: Config,
    points: Sweep,
    workdir: Path | str,
    *,
    stages: Sequence[str] = STAGES,
    selection: str = "",
) -> dict[str, str]:
    """Run the unfinished points of a sweep; return the reasons of those that failed.

    All input is checked before any work starts. `selection` is the command's --points. Several
    processes may run the same sweep: one of them runs each point, and all return when all points
    have ended. Raises InputError on unusable input, Preempted after a signal, OSError if the disk
    is full, and LeaseLost if another process took over a file that this one was writing. After the
    last three the same call resumes.
    """
    workdir = Path(workdir)
    expanded = expand(config, points, workdir)
    chosen = select(expanded, selection)
    _check_agreed(chosen, stages)
    record_sweep(config, expanded, workdir)
    done = {point.name for point in chosen if is_done(point, stages)}
    with Display(len(chosen), done) as display:
        undone = (point.config.language for point in chosen if point.name not in done)
        for section in dict.fromkeys(undone):
            _prepare(section, display)
        display.finish_preparations()
        failures = _share(chosen, stages, display)
    gather(workdir)
    return failures


def _check_agreed(points: list[Point], stages: Sequence[str]) -> None:
    """Raise InputError if the processes of this run have different points or stages."""
    told = repr((stages, [(point.name, point.config.to_json()) for point in points]))
    digest = hashlib.sha256(told.encode()).hexdigest()
    if any(other != digest for other in ranks.all_gather(digest, "points")):
        raise InputError(
            "--config, --points or --stages: the processes of this run have different ones; start "
            "the same command in all"
        )


@ranks.on_rank_0
def _prepare(language: Config, display: Display) -> None:
    try:
        corpus.prepare(language, display)
    except (ValueError, FloatingPointError, OSError) as error:
        raise InputError(str(error)) from error


def _share(points: list[Point], stages: Sequence[str], display: Display) -> dict[str, str]:
    """Run each point, or see another worker run it; return the reasons of those that failed."""
    point_locks = {point.name: leases.Lease(point.directory) for point in points}
    outcomes: dict[str, workers.Done | workers.Failed] = {}
    while left := [point for point in points if point.name not in outcomes]:
        num_ended = len(outcomes)
        for point in left:
            preemption.stop_if_requested()
            if "train" in stages:
                team = [other for other in left if other.team == point.team]
                workers.train_team(team, point_locks, display)
            outcome = workers.run_if_free(point, point_locks[point.name], stages, display)
            if isinstance(outcome, workers.HeldElsewhere):
                continue
            outcomes[point.name] = outcome
            failed = isinstance(outcome, workers.Failed)
            text = f"failed, {outcome.reason}" if failed else summary(point.directory)
            display.finish_point(point.name, text)
        if len(outcomes) == num_ended:
            display.wait(
                f"waiting for {workers.names(left)}: another worker has them, or died; "
                f"taken over after {leases.EXPIRY:g} seconds without a sign of life"
            )
            time.sleep(leases.POLL)
    return {
        name: outcome.reason
        for name, outcome in outcomes.items()
        if isinstance(outcome, workers.Failed)
    }
