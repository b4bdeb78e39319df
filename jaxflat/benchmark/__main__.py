"""The command: python -m jaxflat.benchmark [training|flatness|languages|sweep|calibration|...]"""

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxflat.benchmark.arguments import BERT_SCRIPT, parse_arguments
from jaxflat.console import command, make_console

MIN_PEER_ROUNDS = 3
PRINTED_AS_TABLES = ("calibration/", "verdicts/")
AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


@command()
def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    flags = parse_arguments(arguments)
    # Imported late: parsing the arguments needs no JAX.
    from jaxflat.storage.files import write_json

    console, load = make_console(), os.getloadavg()[0]
    figures = dict(measure(flags, console))
    console.print(device_line(load), **AS_IT_IS)
    _print({n: f for n, f in figures.items() if not n.startswith(PRINTED_AS_TABLES)}, console)
    if flags.json:
        write_json(flags.json, {n: dataclasses.asdict(figure) for n, figure in figures.items()})
    return 0


def measure(flags: argparse.Namespace, console: Console) -> Iterator[tuple[str, Any]]:
    """Yield each figure with its name, group by group."""
    from jaxflat.benchmark import languages, machine, peers, training, workload

    sizes = (flags.width, flags.layers, flags.head_size, flags.batch, flags.length, flags.words)
    shape = workload.Shape(*sizes, language=flags.language)
    # Both raise InputError before anything is timed.
    workload.resolved_config(shape)
    if flags.peers and flags.peer_script == BERT_SCRIPT:
        peers.check_packages(flags.peers)
    console.print("machine: matrix products")
    peak = machine.measure_matmul(flags.repeats, flags.seconds)
    yield "machine/matmul_gflops", peak
    if "training" in flags.groups:
        console.print("training: steps")
        watch = training.start_training(shape, flags.seconds)
        yield from training.measure_training(shape, watch, peak.max, flags.repeats).items()
        console.print("training: steps with a flatness penalty and without, in turn")
        yield from training.compare_with_penalty(shape, watch, flags.seconds, flags.repeats).items()
        if flags.peers:
            rounds = max(flags.repeats, MIN_PEER_ROUNDS)
            console.print(f"training: steps and {flags.peer_script.name} in turn, {rounds} rounds")
            peer = peers.Peer(flags.peers, flags.peer_script)
            yield from training.compare_with_peer(shape, watch, peer, rounds).items()
    if "sweep" in flags.groups:
        console.print(f"sweep: {flags.together} runs in one program and one run, in turn")
        yield from training.compare_together(
            shape, flags.together, flags.seconds, flags.repeats
        ).items()
    if "flatness" in flags.groups:
        yield from _measure_flatness(flags, shape, console).items()
    if "languages" in flags.groups:
        console.print("languages: sentences, conditionals, next symbols and labels")
        if not languages.has_nltk():
            console.print("languages: 'pip install nltk' adds a comparison with its chart parser")
        yield from languages.measure_languages(flags.repeats, flags.seconds)
    if "calibration" in flags.groups:
        yield from _calibrate(flags.seeds, console)
    if "verdicts" in flags.groups:
        yield from _count_verdicts(flags.sweeps, console)


def _measure_flatness(flags: argparse.Namespace, shape: Any, console: Console) -> dict[str, Any]:
    """Return the figures of flatness, with matrix products at full precision, as in a run."""
    import jax

    from jaxflat.benchmark import flatness, flatness_peers

    console.print("flatness: probes and gradients in turn")
    with jax.default_matmul_precision("highest"):
        probes = flatness.Probes(shape, flags.probes_per_pass, flags.seconds)
        figures = flatness.measure_flatness(probes, flags.repeats)
        if flags.torch:
            console.print("flatness: probes and PyTorch in turn")
            figures |= flatness_peers.compare_with_torch(
                shape, flags.torch, MIN_PEER_ROUNDS, probes, flags.probes_per_pass
            )
    return figures


def _calibrate(num_seeds: int, console: Console) -> Iterator[tuple[str, Any]]:
    """Yield the figures of each row; print each finished row, then all rows in order."""
    from jaxflat.benchmark import calibration, calibration_table

    if not calibration.has_matfree():
        console.print("calibration: 'pip install matfree' adds rows of its estimators")
    rows = []
    for row in calibration.measure_calibration(num_seeds):
        console.print(f"{row.problem}: {row.line()}", **AS_IT_IS)
        rows.append(row)
        yield from row.figures().items()
    console.print(calibration_table.tables(rows), **AS_IT_IS)


def _count_verdicts(num_sweeps: int, console: Console) -> Iterator[tuple[str, Any]]:
    """Yield the figures of each scenario; print the table row by row."""
    from jaxflat.benchmark import verdict_table

    console.print(verdict_table.header(), **AS_IT_IS)
    for scenario, figures in verdict_table.measure_verdicts(num_sweeps):
        console.print(verdict_table.line(scenario, figures), **AS_IT_IS)
        yield from ((f"verdicts/{scenario}/{name}", figure) for name, figure in figures.items())


def device_line(load: float) -> str:
    """Return a line with the devices, the versions, and the machine's load before the benchmark."""
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


if __name__ == "__main__":
    from jaxflat.distributed.sharding import set_up_devices

    set_up_devices()
    sys.exit(main())
