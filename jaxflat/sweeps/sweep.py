"""Run a sweep: expand its points, check them, run or resume them, and write the results.

A point is identified by its overrides, not by its index: the same overrides give the same folder.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from jaxflat.config import Config, Sweep
from jaxflat.config.validation import InputError
from jaxflat.console import Display, point_kind
from jaxflat.distributed import leases, preemption, ranks
from jaxflat.distributed.compilation_time import compile_seconds
from jaxflat.distributed.preemption import defer_signals
from jaxflat.runs import corpus
from jaxflat.runs.run import Done, Failed, HeldElsewhere, Point, was_done
from jaxflat.runs.stages import STAGES, num_stages
from jaxflat.storage.files import DISK_FULL
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps import workers
from jaxflat.sweeps.points import check_stages, expand, select
from jaxflat.sweeps.results import summary, write_results
from jaxflat.sweeps.sweep_record import record_sweep


@defer_signals()
def run(
    config: Config,
    points: Sweep,
    workdir: Path | str,
    *,
    stages: Sequence[str] = STAGES,
    selection: str = "",
    command: str = "",
) -> dict[str, str]:
    """Run the points of a sweep that are not done yet; return the reasons of those that failed.

    All points are checked before the first one starts. `selection` is the command's --points.
    `command` has its --config and config keys, which sweep.json records for the report.
    Several workers may run the same sweep concurrently. One of them runs each point, and all return
    when all points have ended.

    Raises InputError if the input cannot be used, Preempted after a signal, and OSError if the disk
    is full. Raises LeaseLost if another worker took over a file or language that this suspended one
    was writing. After Preempted, OSError and LeaseLost, calling `run` again resumes the sweep.
    """
    folder = Folder(Path(workdir))
    expanded = expand(config, points, folder.path)
    chosen = select(expanded, selection)
    check_stages(chosen, stages)
    _check_agreed(chosen, stages)
    record_sweep(config, expanded, folder, command)
    done = {point.title for point in chosen if was_done(point, stages)}
    kinds = {p.title: point_kind(p.overrides, num_stages(p.config)) for p in chosen}
    with Display(len(chosen), done, kinds, compile_seconds) as display:
        undone = (point.config.language for point in chosen if point.title not in done)
        for section in dict.fromkeys(undone):
            folder.on_rank_0(_prepare, section, display)
        display.finish_preparations()
        failures = _run_or_wait(chosen, stages, display)
    write_results(folder)
    return failures


def _check_agreed(points: list[Point], stages: Sequence[str]) -> None:
    """Raise InputError if the processes of this run have different points or stages."""
    requested = repr((stages, [(point.name, point.config.to_json()) for point in points]))
    digest = hashlib.sha256(requested.encode()).hexdigest()
    if any(other != digest for other in ranks.all_gather(digest, "points")):
        raise InputError(
            "--config, --points or --stages differ between the processes of this run; start the "
            "same command in all of them"
        )


def _prepare(language: Config, display: Display) -> None:
    try:
        corpus.prepare_language(language, display)
    except (ValueError, FloatingPointError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise InputError(str(error)) from error


def _run_or_wait(points: list[Point], stages: Sequence[str], display: Display) -> dict[str, str]:
    """Run each point or wait until another worker has; return the reasons of failed points."""
    outcomes: dict[str, Done | Failed] = {}
    while left := [point for point in points if point.name not in outcomes]:
        num_ended = len(outcomes)
        for point in left:
            preemption.stop_if_requested()
            if "train" in stages:
                team = [other for other in left if other.team == point.team]
                workers.train_team(team, display)
            outcome = workers.run_if_free(point, stages, display)
            if isinstance(outcome, HeldElsewhere):
                continue
            outcomes[point.name] = outcome
            failed = isinstance(outcome, Failed)
            text = (
                f"failed, {outcome.reason}"
                if failed
                else point.folder.on_rank_0(summary, point.folder)
            )
            display.finish_point(point.title, text)
        if len(outcomes) == num_ended:
            display.print_wait(
                f"Waiting for {workers.list_names(left)}: another worker holds them, or died; they "
                f"are taken over after {leases.EXPIRY:g} seconds without a heartbeat"
            )
            time.sleep(leases.POLL)
    return {
        name: outcome.reason for name, outcome in outcomes.items() if isinstance(outcome, Failed)
    }
