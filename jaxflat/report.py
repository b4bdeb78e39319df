"""The command: python -m jaxflat.report WORKDIR [WORKDIR ...] [--output=DIR]"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from jaxflat.config.validation import InputError, check_outputs
from jaxflat.console import CommandParser, command, make_console
from jaxflat.storage.files import write_json


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the flags; raise InputError if one is wrong."""
    parser = CommandParser(
        prog="python -m jaxflat.report",
        description="Write one page about several sweeps: their verdicts side by side, all pairs "
        "of models of equal loss in one figure, and the report of each sweep.",
    )
    parser.add_argument(
        "workdirs", nargs="+", type=Path, metavar="WORKDIR", help="a sweep's directory"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/report"), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    return parser.parse_args(arguments)


@command(OSError, ValueError)
def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    flags = parse_arguments(arguments)
    # Imported late: parsing the arguments needs no plots.
    from rich.markup import escape
    from rich.table import Column, Table

    from jaxflat.analysis.page import joint

    check_outputs(flags.json)
    workdirs = _named(flags.workdirs)
    sweeps = joint.read_sweeps(workdirs)
    judged = joint.judge_sweeps(sweeps)
    report = joint.write_joint(sweeps, judged, workdirs, flags.output)
    if flags.json:
        listed = {n: [asdict(v) for v in one.verdicts] for n, one in judged.items()}
        write_json(flags.json, listed)
    header, *rows = joint.verdicts_table(judged)
    table = Table(*(Column(name, overflow="fold") for name in header[:4]))
    for row in rows:
        table.add_row(*map(escape, row[:4]))
    console = make_console()
    console.print(table)
    console.print(joint.summary_sentence(sweeps, judged), highlight=False)
    console.print(f"\nreport   {report}", markup=False)
    return 0


def _named(workdirs: list[Path]) -> dict[str, Path]:
    """Return the directories by their names, or by their paths if two have the same name."""
    for workdir in workdirs:
        if not (workdir / "results.csv").is_file():
            raise InputError(
                f"WORKDIR={workdir} has no results.csv; name directories of python -m jaxflat.main"
            )
    distinct = list(dict.fromkeys(workdir.resolve() for workdir in workdirs))
    names = [workdir.name for workdir in distinct]
    if len(set(names)) < len(names):
        names = [str(workdir) for workdir in distinct]
    return dict(zip(names, distinct, strict=True))


if __name__ == "__main__":
    sys.exit(main())
