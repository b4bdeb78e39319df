"""The command: python -m jaxflat.main --config=FILE.py[:smoke|laptop|full|gpu|paper]"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Column, Table

from jaxflat.config import loading, validation
from jaxflat.console import EXIT_SOME_FAILED, CommandParser, command, make_console
from jaxflat.distributed import preemption, ranks


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and the arguments that set config keys; InputError on a wrong flag."""
    parser = CommandParser(
        prog="python -m jaxflat.main",
        description="Train the points of a sweep, measure them, and report. "
        "After an interruption, run the same command to resume.",
        epilog="Any config key: --config.phases.pretrain.steps=500 (overrides the sweep).",
    )
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:SCALE")
    parser.add_argument("--workdir", type=Path, help="default: runs/<config>-<scale>")
    parser.add_argument("--points", default="", help='points to run: "0,3-5", "*width=16*", an arm')
    parser.add_argument(
        "--stages",
        help="stages to run, e.g. train,flatness (default: all, including report)",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="list the points, their memory, their languages and what the sweep could decide; "
        "train nothing",
    )
    parser.add_argument(
        "--multihost",
        default="auto",
        help="on: join the other processes of one run; off: run on this host only; auto (default): "
        "join them if JAX detects a cluster",
    )
    return parser.parse_known_args(arguments)


@command()
def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    flags, override_arguments = parse_arguments(arguments)
    overrides = loading.parse_overrides(override_arguments)
    # Imported late: parsing the arguments needs no JAX.
    from jaxflat import dry_run
    from jaxflat.distributed import compilation_cache
    from jaxflat.runs.stages import STAGES
    from jaxflat.storage.leased_folder import Folder
    from jaxflat.sweeps import points, sweep, sweep_record

    validation.check_choices("--multihost", [flags.multihost], ranks.MODES)
    ranks.join_cluster(flags.multihost)
    config, listed = loading.load(flags.config)
    config = loading.override(config, overrides)
    listed = loading.without_keys(listed, overrides)
    stages = STAGES if flags.stages is None else tuple(flags.stages.split(","))
    validation.check_choices("--stages", stages, STAGES)
    path, _, scale = flags.config.partition(":")
    workdir = flags.workdir or Path("runs") / f"{Path(path).stem}-{scale or 'laptop'}"
    if flags.dry_run:
        expanded = points.expand(config, listed, workdir)
        sweep_record.check_sweep(config, expanded, workdir)
        names = {point.name for point in points.select(expanded, flags.points)}
        chosen = [(number, point) for number, point in enumerate(expanded) if point.name in names]
        points.check_stages([point for _, point in chosen], stages)
        dry_run.show_points(chosen)
        dry_run.show_languages([point for _, point in chosen])
        dry_run.show_drift([point for _, point in chosen])
        dry_run.show_power(expanded)
        return 0
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every exception it raises
    cache = compilation_cache.enable()
    command_text = shlex.join([f"--config={flags.config}", *override_arguments])
    failures = sweep.run(
        config, listed, workdir, stages=stages, selection=flags.points, command=command_text
    )
    console = make_console()
    console.print(f"compiled programs: {cache}", highlight=False, markup=False)
    if "report" in stages:
        Folder(workdir).on_rank_0(show_report, workdir)
    for name, reason in failures.items():
        console.print(f"failed: {name}: {reason}", style="red", markup=False)
    return EXIT_SOME_FAILED if failures else 0


def show_report(workdir: Path) -> None:
    """Write the report, and print its table, its findings and its path."""
    from jaxflat.analysis.comparison import read_comparison
    from jaxflat.analysis.mixed_settings import mixed_settings
    from jaxflat.analysis.page import evidence
    from jaxflat.analysis.page.document import write_report
    from jaxflat.analysis.page.findings import console_lines
    from jaxflat.analysis.page.settings import read_provenance
    from jaxflat.analysis.page.tables import summary_table
    from jaxflat.distributed import leases

    with leases.acquire_lease(workdir / "report.html"):
        comparison = read_comparison(workdir)
        judged = evidence.examine(comparison)
        report = write_report(workdir, comparison, judged)
    header, *rows = summary_table(comparison)
    console = make_console()
    columns = [Column(name, no_wrap=True) for name in header]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for line in console_lines(comparison, judged.verdicts):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    made = read_provenance(workdir)
    warnings = mixed_settings(workdir)
    if made.unfinished:
        warnings.append(f"{len(made.unfinished)} of {made.num_points} points are not finished")
    for line in warnings:
        console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nresults  {workdir / 'results.csv'}\nreport   {report}", markup=False)


if __name__ == "__main__":
    preemption.install_handlers()  # before the slow imports
    from jaxflat.distributed.sharding import set_up_devices

    set_up_devices()
    sys.exit(main())
