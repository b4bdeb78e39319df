"""The command: python -m jaxflat.benchmark [training|flatness|languages|calibration ...]"""

import argparse
import dataclasses
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

GROUPS = ("training", "flatness", "languages")
LONG_GROUPS = ("calibration",)  # minutes each, and only where they are named
EXIT_UNUSABLE_INPUT = 2
MIN_PEER_ROUNDS = 3
AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}

PEER_HELP = """
--peers=PYTHON --peer_script=FILE times another framework's training step beside ours. FILE runs as
  PYTHON FILE width layers heads batch length
and takes training steps of that shape, one masked word a sentence, on the same device. The last
line that it prints must hold its rate as "N sentences/s". Our steps and the script take turns.
"""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxflat.benchmark",
        description="Measure this machine's peak, how near training and flatness come to it, "
        "and the speed of languages: these have sizes of their own. Or, where it is named, how "
        "often the error bars of flatness hold the truth: calibration.",
        epilog=PEER_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = (*GROUPS, *LONG_GROUPS)
    some = f"of: {', '.join(groups)} (all but {', '.join(LONG_GROUPS)})"
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=some)
    sizes = {"width": 64, "layers": 2, "head_size": 16, "batch": 64, "length": 16, "words": 200}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=_positive, default=default, help="(%(default)s)")
    parser.add_argument(
        "--repeats", type=_positive, default=7, help="timed calls of each kind (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="least length of a timed call (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=_positive, default=2000, help="estimates of a calibration (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the peer script")
    parser.add_argument("--peer_script", type=Path, metavar="FILE", help="see below")
    flags = parser.parse_args(arguments)
    for group in flags.groups:
        if group not in groups:
            parser.error(f"GROUP {group!r} is not one of {', '.join(groups)}")
    flags.groups = flags.groups or list(GROUPS)
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    # Imported late: --help and a misspelt flag need no JAX.
    from jaxflat.metrics import write_json
    from jaxflat.validation import InputError

    console, figures, load = Console(), {}, os.getloadavg()[0]
    try:
        _check(flags)
        for name, figure in measure(flags, console):
            figures[name] = figure
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE_INPUT
    console.print(device_line(load), **AS_IT_IS)
    _print({n: f for n, f in figures.items() if not n.startswith("calibration/")}, console)
    if flags.json:
        write_json(flags.json, {n: dataclasses.asdict(figure) for n, figure in figures.items()})
    return 0


def measure(flags: argparse.Namespace, console: Console) -> Iterator[tuple[str, Any]]:
    """Yield each figure with its name, as groups get done."""
    from jaxflat.benchmark import flatness, languages, machine, peers, training, workload

    sizes = (flags.width, flags.layers, flags.head_size, flags.batch, flags.length, flags.words)
    shape = workload.Shape(*sizes)
    workload.resolved_config(shape)  # unusable sizes end here, before anything is timed
    console.print("machine: matrix products")
    peak = machine.measure_matmul(flags.repeats, flags.seconds)
    yield "machine/matmul_gflops", peak
    if "training" in flags.groups:
        console.print("training: steps")
        watch = training.start_training(shape, flags.seconds)
        yield from training.measure_training(shape, watch, peak.max, flags.repeats).items()
        if flags.peers:
            rounds = max(flags.repeats, MIN_PEER_ROUNDS)
            console.print(f"training: steps and {flags.peer_script.name} in turn, {rounds} rounds")
            peer = peers.Peer(flags.peers, flags.peer_script)
            yield from training.compare_with_peer(shape, watch, peer, rounds).items()
    if "flatness" in flags.groups:
        console.print("flatness: probes and gradients in turn")
        yield from flatness.measure_flatness(shape, flags.repeats, flags.seconds).items()
    if "languages" in flags.groups:
        console.print("languages: sentences, conditionals and labels")
        if not languages.has_nltk():
            console.print("languages: 'pip install nltk' adds a comparison with its chart parser")
        yield from languages.measure_languages(flags.repeats, flags.seconds)
    if "calibration" in flags.groups:
        yield from _calibrate(flags.seeds, console)


def _calibrate(num_seeds: int, console: Console) -> Iterator[tuple[str, Any]]:
    """Yield the figures of each row; print rows as they get done, and then all of them in order."""
    from jaxflat.benchmark import calibration, calibration_table

    if not calibration.has_matfree():
        console.print("calibration: 'pip install matfree' adds rows of its estimators")
    rows = []
    for row in calibration.measure_calibration(num_seeds):
        console.print(f"{row.problem}: {row.line()}", **AS_IT_IS)
        rows.append(row)
        yield from row.figures().items()
    console.print(calibration_table.tables(rows), **AS_IT_IS)


def device_line(load: float) -> str:
    """Name the devices, the versions of what ran on them, and who else did: the load before."""
    import jax

    devices = jax.devices()
    versions = [f"{name} {version(name)}" for name in ("jax", "flax", "optax")]
    return ", ".join(
        [
            f"{len(devices)} x {devices[0].device_kind} ({platform.machine()})",
            *versions,
            f"Python {platform.python_version()}",
            f"load {load:.1f} at the start",
        ]
    )


def _print(figures: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("name", no_wrap=True, min_width=max(map(len, figures)))
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for name, figure in figures.items():
        values = (figure.median, figure.min, figure.max)
        texts = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
        table.add_row(name, *texts, figure.unit)
    console.print(table)


def _check(flags: argparse.Namespace) -> None:
    """Raise InputError on flags that do not go together."""
    from jaxflat.validation import InputError

    if flags.width % flags.head_size:
        raise InputError(f"--width={flags.width} is not divisible by --head_size={flags.head_size}")
    if (flags.peers is None) != (flags.peer_script is None):
        raise InputError("--peers and --peer_script need each other")
    if flags.peers and "training" not in flags.groups:
        raise InputError("--peers compares training; name that group too")
    if "calibration" in flags.groups and flags.seeds < 2:
        raise InputError(f"--seeds={flags.seeds}: a coverage takes at least 2")
    if flags.peers and not shutil.which(flags.peers):
        raise InputError(f"--peers={flags.peers} is not a program")
    if flags.peer_script and not flags.peer_script.is_file():
        raise InputError(f"--peer_script={flags.peer_script} is not a file")
    if flags.json and not flags.json.parent.is_dir():
        raise InputError(f"--json={flags.json}: there is no folder {flags.json.parent}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    from jaxflat.sharding import use_cpu_cores

    use_cpu_cores()
    sys.exit(main())
