"""The command: python -m jaxflat.report WORKDIR [WORKDIR ...] [--output=DIR]"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

EXIT_UNUSABLE_INPUT = 2


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxflat.report",
        description="Write one page over several sweeps: their verdicts side by side, every pair "
        "of models of equal loss in one figure, and each sweep's own report.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "workdirs", nargs="+", type=Path, metavar="WORKDIR", help="of a sweep with results"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/report"), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    from rich.console import Console
    from rich.table import Column, Table

    from jaxflat.analysis.page import joint
    from jaxflat.config.validation import InputError, check_outputs
    from jaxflat.storage.files import write_json

    try:
        check_outputs(flags.json)
        workdirs = _named(flags.workdirs)
        sweeps = joint.read_sweeps(workdirs)
        judged = joint.judge_sweeps(sweeps)
        report = joint.write_joint(sweeps, judged, workdirs, flags.output)
        if flags.json:
            listed = {n: [asdict(v) for v in one.verdicts] for n, one in judged.items()}
            write_json(flags.json, listed)
    except (InputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE_INPUT
    header, *rows = joint.verdicts_table(judged)
    table = Table(*(Column(name, overflow="fold") for name in header[:4]))
    for row in rows:
        table.add_row(*row[:4])
    console = Console()
    console.print(table)
    console.print(joint.summary_sentence(sweeps), highlight=False)
    console.print(f"\nreport   {report}", markup=False)
    return 0


def _named(workdirs: list[Path]) -> dict[str, Path]:
    """Return the folders by name, or by full path if two have the same name."""
    from jaxflat.config.validation import InputError

    for workdir in workdirs:
        if not (workdir / "results.csv").is_file():
            raise InputError(
                f"WORKDIR={workdir} has no results.csv; name the folders of sweeps that "
                "python -m jaxflat.main has run"
            )
    distinct = list(dict.fromkeys(workdir.resolve() for workdir in workdirs))
    names = [workdir.name for workdir in distinct]
    if len(set(names)) < len(names):
        names = [str(workdir) for workdir in distinct]
    return dict(zip(names, distinct, strict=True))


if __name__ == "__main__":
    sys.exit(main())
