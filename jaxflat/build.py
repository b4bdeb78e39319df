"""The command: python -m jaxflat.build --config=FILE.py[:SCALE] --output=DIR --num_sentences=N"""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ml_collections import FrozenConfigDict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxflat.config import Config, loading, validation
from jaxflat.config.validation import InputError
from jaxflat.console import CommandParser, Display, command, make_console
from jaxflat.distributed import preemption
from jaxflat.runs.corpus import SHARD_SIZE, build_dataset
from jaxflat.runs.languages import language_kind


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and the arguments that set config keys; InputError on a wrong flag."""
    parser = CommandParser(
        prog="python -m jaxflat.build",
        description="Write sentences of a config's language to a directory that TensorFlow "
        "Datasets reads. After an interruption, run the same command to resume.",
        epilog="Any config key: --config.language.hmm.length=32.",
    )
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:SCALE")
    parser.add_argument("--output", type=Path, required=True, help="directory of the data set")
    parser.add_argument("--num_sentences", type=int, required=True)
    parser.add_argument(
        "--shard_size", type=int, default=SHARD_SIZE, help="sentences in each file (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, help="decides the sentences; default: the config's data_seed"
    )
    parser.add_argument(
        "--labels",
        action="store_true",
        help="also write the tasks' labels, by probes.labelings",
    )
    parser.add_argument(
        "--conditionals", action="store_true", help="also write exact conditional log-probabilities"
    )
    flags, rest = parser.parse_known_args(arguments)
    for name, lowest in (("num_sentences", 1), ("shard_size", 1), ("seed", 0)):
        value = getattr(flags, name)
        if value is not None and not lowest <= value < 2**32:
            raise InputError(f"--{name}={value} must be at least {lowest} and below 2^32")
    return flags, rest


@command(ValueError, FloatingPointError, OSError)
def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    flags, rest = parse_arguments(arguments)
    loaded, _ = loading.load(flags.config)
    loaded = loading.override(loaded, loading.parse_overrides(rest))
    config: Config = FrozenConfigDict(validation.validate(loaded))
    kind = language_kind(config.language)
    if flags.labels and not kind.has_tasks:
        raise InputError(f"--labels: sentences of language.name={config.language.name!r} have none")
    if flags.conditionals and not kind.has_optimum:
        raise InputError(
            f"--conditionals: those of language.name={config.language.name!r} are not known"
        )
    kind.check_uses(config) if flags.labels else kind.check(config.language)
    preemption.install_handlers()
    with preemption.defer_signals():
        show_build(flags, config)
    return 0


def show_build(flags: argparse.Namespace, config: Config) -> None:
    """Build the data set behind a progress bar, then print its size."""
    kind = language_kind(config.language)
    if not kind.is_prepared(config.language):
        with Display(1) as display:
            kind.prepare(config.language, display)
    console, start, made = make_console(), time.monotonic(), 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA")
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    bar = progress.add_task("sentences", total=flags.num_sentences)

    def on_shard(size: int, is_new: bool) -> None:
        nonlocal made
        made += size * is_new
        rate = made / (time.monotonic() - start)
        progress.update(bar, advance=size, description=f"{rate:,.0f} sentences/s")
        if size == 0:
            stack.enter_context(progress)

    seed = config.seed if config.data_seed is None else config.data_seed
    with ExitStack() as stack:
        dataset = build_dataset(
            config.language,
            flags.output,
            num_sentences=flags.num_sentences,
            seed=seed if flags.seed is None else flags.seed,
            shard_size=flags.shard_size,
            labelings=config.probes.labelings if flags.labels else (),
            conditionals=flags.conditionals,
            on_shard=on_shard,
        )
    rate = made / (time.monotonic() - start)
    num_bytes = sum(file.stat().st_size for file in flags.output.iterdir())
    console.print(
        f"{len(dataset):,} sentences ({made:,} new, {rate:,.0f}/s) in {dataset.num_shards} shards, "
        f"{num_bytes:,} bytes: {flags.output}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    from jaxflat.distributed.sharding import set_up_devices

    set_up_devices()
    sys.exit(main())
