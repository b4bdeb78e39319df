"""The command: python -m jaxflat.export wandb|mlflow WORKDIR"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from jaxflat.console import CommandParser, command, make_console

TRACKERS = ("wandb", "mlflow")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the flags; raise InputError if one is wrong."""
    parser = CommandParser(
        prog="python -m jaxflat.export",
        description="Write a sweep to Weights & Biases or MLflow: a run for each point, with its "
        "training curve and its numbers of results.csv, and the report as an artifact.",
        epilog="Where to: WANDB_MODE, WANDB_DIR, ... or MLFLOW_TRACKING_URI.",
    )
    parser.add_argument("tracker", choices=TRACKERS)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR", help="directory of a sweep")
    return parser.parse_args(arguments)


@command(OSError, ValueError, KeyError, ImportError, interrupted="the export is not complete.")
def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    flags = parse_arguments(arguments)
    from jaxflat.export.finished_sweep import read_sweep

    sweep = read_sweep(flags.workdir)
    import_module(f"jaxflat.export.to_{flags.tracker}").write(sweep)
    text = f"{len(sweep.points)} points of {sweep.name} written to {flags.tracker}"
    make_console().print(text, highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
