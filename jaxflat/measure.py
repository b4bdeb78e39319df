"""The command: python -m jaxflat.measure --checkpoint=RUN_STEP_DIR|HF_FOLDER --measures=NAME,..."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxflat import config as base_config
from jaxflat import loading, preemption, subjects, validation
from jaxflat.analysis.curves import save_curves
from jaxflat.flatness import MEASURES, Estimate, mean_loss
from jaxflat.metrics import write_json
from jaxflat.subjects import Subject
from jaxflat.validation import InputError

EXIT_UNUSABLE_INPUT, EXIT_PREEMPTED = 2, 75


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and the arguments that set config keys; InputError on a wrong flag."""
    parser = _Parser(
        prog="python -m jaxflat.measure",
        description="Measure how flat the loss is around a checkpoint: of a run, on sentences of "
        "its own language, or of a GPT-2, OPT or BERT (Hugging Face folder), on texts of a file.",
        epilog="How to measure: --config.flatness.num_probes=8 and all keys of that section; for "
        "a run those it was measured with are the defaults. Measures: " + ", ".join(MEASURES),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR",
        help="WORKDIR/POINT/checkpoints/STEP, or a folder with config.json and safetensors",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="FILE",
        help="for a Hugging Face folder: a text on each line (its tokenizer.json makes tokens), "
        "or .jsonl with a list of token ids on each",
    )  # fmt: skip
    parser.add_argument("--measures", default="hessian_trace,fisher_trace", help="(%(default)s)")
    parser.add_argument("--length", type=int, default=64, help="cut texts there (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is random with --data (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw what has a picture there")
    flags, rest = parser.parse_known_args(arguments)
    validation.check_choices("--measures", flags.measures.split(","), MEASURES)
    if flags.length < 2 or not 0 <= flags.seed < 2**32:
        raise InputError(f"--length={flags.length} --seed={flags.seed}: at least 2 and 0")
    for name in ("json", "figures"):
        path = getattr(flags, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"--{name}={path}: there is no folder {path.absolute().parent}")
    return flags, rest


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        flags, rest = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        preemption.install()
        subject = find_subject(flags, loading.parse_overrides(rest))
        console = Console()
        if not console.is_terminal:  # a file has room for the whole table
            console = Console(width=120)
        console.print(subject.about, highlight=False, markup=False)
        with jax.default_matmul_precision("highest"):
            estimates, curves = measure(subject, flags.measures.split(","), console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE_INPUT
    except preemption.Preempted as signal:
        print(f"stopped by {signal}", file=sys.stderr)
        return EXIT_PREEMPTED
    console.print(table(estimates))
    if flags.json:
        measured = {name: as_json(estimate) for name, estimate in estimates.items()}
        listed = {name: jax.tree.map(_plain, curve) for name, curve in curves.items()}
        write_json(flags.json, {"about": subject.about, "measured": measured, "curves": listed})
    for path in save_curves(curves, flags.figures) if flags.figures else []:
        console.print(f"figure {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def find_subject(flags: argparse.Namespace, overrides: dict[str, Any]) -> Subject:
    """Return what to measure; InputError, or ValueError of one line, where there is none."""
    measures = tuple(m for m in flags.measures.split(",") if m in base_config.MEASURES)
    for key in overrides:
        if not key.startswith("flatness.") or key == "flatness.measures":
            raise InputError(f"--config.{key}: only keys of flatness other than measures count")
    if measures:  # those with settings to check; pictures have none
        overrides = {**overrides, "flatness.measures": measures}
    if subjects.is_run(flags.checkpoint):
        if flags.data:
            raise InputError("--data is for Hugging Face folders; a run has its own language")
        return subjects.run_subject(flags.checkpoint, overrides)
    if not (flags.checkpoint / "config.json").is_file():
        raise InputError(
            f"--checkpoint={flags.checkpoint} is neither POINT/checkpoints/STEP of a run nor a "
            "folder with a config.json"
        )
    if flags.data is None:
        raise InputError("--data=FILE is missing: the texts to measure a Hugging Face model on")
    return subjects.text_subject(flags.checkpoint, flags.data, flags.length, flags.seed, overrides)


def measure(
    subject: Subject, measures: list[str], console: Console
) -> tuple[dict[str, Estimate], dict[str, dict[str, Any]]]:
    """Return the mean loss and all estimates by name, and the curves by measure."""
    problem, settings = subject.problem, subject.config.flatness
    estimates = {"loss": mean_loss(problem.loss_fn, problem.params, problem.sample(0))}
    curves = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA")
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("loss", total=len(measures))
        for name in measures:
            preemption.check()
            progress.update(bar, description=name)
            measured = MEASURES[name](problem, settings)
            estimates |= jax.block_until_ready(measured.estimates)
            if measured.curves:
                curves[name] = measured.curves
            progress.advance(bar)
    return estimates, curves


def table(estimates: dict[str, Estimate]) -> Table:
    """Return the estimates with their 95% intervals, groups of parameters indented."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("measure", no_wrap=True)
    for column in ("mean", "± SEM", "95% interval", "samples"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("error over", no_wrap=True)
    for name, estimate in estimates.items():
        first, slash, last = name.partition("/")
        shown = f"  {last}" if slash and first in estimates else name
        fields = as_json(estimate)
        numbers = [_text(fields[key]) for key in ("mean", "sem")]
        interval = f"{_text(fields['low'])} to {_text(fields['high'])}" if fields["sem"] else "–"
        count = str(estimate.num_samples) if fields["sem"] else "–"
        made.add_row(shown, *numbers, interval, count, estimate.over if fields["sem"] else "–")
    return made


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate with its 95% interval as JSON has it: null where there is no number."""
    low, high = estimate.interval()
    numbers = {"mean": estimate.mean, "sem": estimate.sem, "low": low, "high": high}
    finite = {key: _plain(value) for key, value in numbers.items()}
    return {**finite, "num_samples": estimate.num_samples, "over": estimate.over}


def _plain(value: Any) -> Any:
    """Return an array as nested lists of numbers, null where one is not finite."""
    listed = value.tolist()
    return jax.tree.map(lambda x: x if math.isfinite(x) else None, listed)


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    from jaxflat.sharding import use_cpu_cores

    use_cpu_cores()
    sys.exit(main())
