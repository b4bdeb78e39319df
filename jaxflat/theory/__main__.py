"""The command: python -m jaxflat.theory bartlett|drift|dyck."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from jaxflat.config.validation import check_choices, check_outputs
from jaxflat.console import EXIT_NOT_HOLDING, CommandParser, command, make_console

RESULTS = {
    "bartlett": "if the model is the true conditional, the gradient covariance is the Hessian",
    "drift": "label noise makes SGD drift along the minimisers to a smaller Hessian trace",
    "dyck": "on zero-sum strings the flattest solution transfers, others do not",
}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the flags; raise InputError if one is wrong."""
    parser = CommandParser(
        prog="python -m jaxflat.theory",
        description="Check a theoretical result of Liu, Xie, Li & Ma (2023) by computation: "
        + "; ".join(f"{name}: {claim}" for name, claim in RESULTS.items()) + ".",
        epilog="Exit code 0: every check holds; 1: one does not; 2: unusable input.",
    )  # fmt: skip
    parser.add_argument("result", metavar="RESULT", help=" | ".join(RESULTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the checks there")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the figure there")
    flags = parser.parse_args(arguments)
    check_choices("RESULT", [flags.result], RESULTS)
    check_outputs(flags.json, flags.figures)
    return flags


@command()
def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    flags = parse_arguments(arguments)
    # Imported late: parsing the arguments needs no JAX.
    import jax

    from jaxflat.storage.files import write_json
    from jaxflat.theory.check import table
    from jaxflat.theory.picture import save

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        outcome = import_module(f"jaxflat.theory.check_{flags.result}").run()
    console = make_console()
    for line in outcome.remarks:
        console.print(line, highlight=False, markup=False)
    console.print(table(outcome.checks), highlight=False)
    if flags.json:
        write_json(flags.json, {"checks": [check.as_json() for check in outcome.checks]})
    for path in save(flags.result, outcome.panels, flags.figures) if flags.figures else []:
        console.print(f"figure {path}", highlight=False, markup=False, soft_wrap=True)
    broken = [check.name for check in outcome.checks if not check.holds]
    for name in broken:
        print(f"does not hold: {name}", file=sys.stderr)
    return EXIT_NOT_HOLDING if broken else 0


if __name__ == "__main__":
    sys.exit(main())
