"""The command: python -m jaxflat.measure --checkpoint=DIR|--problem=FILE.py --measures=NAME,..."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxflat import config as base_config
from jaxflat.analysis.page.checkpoint_figures import save_curves, save_trajectory
from jaxflat.config import loading, validation
from jaxflat.config.validation import InputError
from jaxflat.console import EXIT_SOME_FAILED, CommandParser, command, first_line, make_console
from jaxflat.distributed import compilation_cache, preemption
from jaxflat.flatness import MEASURES, Estimate, mean_loss
from jaxflat.flatness.measures import TRACES
from jaxflat.measure import subjects
from jaxflat.measure.checkpoints import (
    check_comparable,
    find_checkpoints,
    labels_of,
    shared_folder,
    steps_of,
)
from jaxflat.measure.output import (
    as_json,
    plain,
    remarks,
    table,
    trajectories,
    trajectory_table,
)
from jaxflat.measure.problem_file import load_function, problem_subject
from jaxflat.measure.subjects import Subject
from jaxflat.measure.texts import text_subject
from jaxflat.measure.toward import lead_toward
from jaxflat.runs import checks, saved_run
from jaxflat.storage.files import write_json

OF_TEXTS = {"data": "language", "length": "sentences"}
"""The flags for Hugging Face folders, and their counterparts in a run."""

OF_A_PROBLEM = {"data": "the batches", "length": "the batches", "toward": "Problem.toward"}
"""The flags without effect on a problem, and their counterparts in its file."""


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags and the arguments that set config keys; raise InputError on a wrong flag."""
    parser = CommandParser(
        prog="python -m jaxflat.measure",
        description="Measure the flatness of the loss around a checkpoint: of a run, on sentences "
        "of its language; of a GPT-2, OPT or BERT (Hugging Face folder), on texts of a file; or of "
        "any JAX model, by a file of your own.",
        epilog="Settings: --config.flatness.num_probes=8 and all keys of that section; a run's own "
        "settings are its defaults. Measures: " + ", ".join(MEASURES),
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR",
        help="WORKDIR/POINT/checkpoints/STEP, or a folder with config.json and safetensors; "
        "'DIR/step*', in quotes, measures all that match, with the same sentences and probes",
    )  # fmt: skip
    parser.add_argument(
        "--problem", type=Path, metavar="FILE.py",
        help="a file with a function get_problem() that returns a jaxflat.flatness.Problem; with "
        "--checkpoint: get_problem(checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="FILE",
        help="for a Hugging Face folder: a file with a text on each line, for its tokenizer, "
        "or .jsonl with a list of token ids on each line",
    )  # fmt: skip
    parser.add_argument("--measures", default="hessian_trace,fisher_trace", help="(%(default)s)")
    parser.add_argument(
        "--toward", type=Path, metavar="DIR",
        help="a second checkpoint of the same model: loss_path draws the loss on the line to it",
    )  # fmt: skip
    parser.add_argument("--length", type=int, help="with --data: cut texts there (64)")
    parser.add_argument(
        "--seed", type=int,
        help="for sentences and probes (a run: its probe_seed; --data: 0; --problem: its key)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="save the figures there")
    flags, rest = parser.parse_known_args(arguments)
    check_flags(flags)
    return flags, rest


def check_flags(flags: argparse.Namespace) -> None:
    """Raise InputError on a flag that is wrong by itself or with the others."""
    asked = set(flags.measures.split(","))
    validation.check_choices("--measures", flags.measures.split(","), MEASURES)
    if flags.checkpoint is None and flags.problem is None:
        raise InputError("set --checkpoint=DIR or --problem=FILE.py")
    for name, own in OF_A_PROBLEM.items():
        if flags.problem and getattr(flags, name) is not None:
            raise InputError(f"--{name} has no effect with --problem: its file gives {own}")
    if not flags.problem and ("loss_path" in asked) != (flags.toward is not None):
        raise InputError("--toward=DIR and --measures=loss_path need each other")
    if flags.length is not None and flags.length < 2:
        raise InputError(f"--length={flags.length} must be at least 2")
    if flags.seed is not None and not 0 <= flags.seed < 2**32:
        raise InputError(f"--seed={flags.seed} must be at least 0 and below 2^32")
    validation.check_outputs(flags.json, flags.figures)
    pictures = asked & {"loss_slices", "loss_plane"}
    if pictures and not (flags.json or flags.figures):
        raise InputError(f"{sorted(pictures)[0]} makes figures: set --figures or --json")


@command(
    *(ValueError, OSError, jax.errors.JaxRuntimeError),
    interrupted="of several checkpoints, only --json is saved, with the finished ones. Run the "
    "same command to start again.",
)
def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    flags, rest = parse_arguments(arguments)
    preemption.install_handlers()
    compilation_cache.enable()
    overrides = check_overrides(flags, loading.parse_overrides(rest))
    paths = [flags.checkpoint]
    if flags.checkpoint:
        paths = find_checkpoints(flags.checkpoint, any_file=flags.problem is not None)
    if len(paths) > 1:
        if flags.toward:
            raise InputError(f"--toward needs one checkpoint; {len(paths)} match --checkpoint")
        if not flags.problem:
            check_comparable(paths)
    subject = find_subject(flags, overrides, paths[0], same_draws=len(paths) > 1)
    with jax.default_matmul_precision("highest"):
        if len(paths) == 1:
            return measure_one(flags, subject)
        return measure_several(flags, subject, paths)


def measure_one(flags: argparse.Namespace, subject: Subject) -> int:
    """Measure one checkpoint; print the estimates and write the files; return the exit code."""
    asked = flags.measures.split(",")
    console = make_console()
    console.print(subject.about, highlight=False, markup=False)
    measured = measure(subject, asked)
    console.print(table(measured.estimates))
    for line in remarks(measured.estimates, subject.config.flatness):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if flags.json:
        write_json(flags.json, {"about": subject.about, **measured.as_json()})
    for path in save_curves(measured.curves, flags.figures) if flags.figures else []:
        console.print(f"figure {path}", highlight=False, markup=False, soft_wrap=True)
    without = [n for n in asked if n not in measured.curves and n not in measured.failures]
    if flags.figures and without:
        console.print(f"no figure: {', '.join(without)} (single numbers)", highlight=False)
    for name, reason in measured.failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return EXIT_SOME_FAILED if measured.failures else 0


def measure_several(flags: argparse.Namespace, subject: Subject, paths: list[Path]) -> int:
    """Measure checkpoints of one training; print one table, draw one picture; return the code.

    subject: of the first. The line of a later one that cannot be loaded comes last; the others are
    measured. The JSON file is written after each checkpoint.
    """
    labels, asked, failed = labels_of(paths), flags.measures.split(","), []
    numbers, axis = steps_of(labels), "Step"
    if numbers is None:
        numbers, axis = range(len(labels)), "Checkpoint, in the order of names"
    steps = dict(zip(labels, numbers, strict=True))
    about = f"{shared_folder(paths)}: {len(paths)} checkpoints, {subject.how}"
    if flags.problem:
        about = f"{flags.problem}, {about}"
    console, how, at = make_console(), subject.config.flatness, subject.at
    console.print(about, highlight=False, markup=False, soft_wrap=True)
    found: dict[str, Measurements] = {}
    lines: list[dict[str, Any]] = []
    for number, (label, path) in enumerate(zip(labels, paths, strict=True), start=1):
        print(f"checkpoint {label} ({number}/{len(paths)})", file=sys.stderr)
        try:
            subject = subject if number == 1 else at(path)
            found[label] = measure(subject, asked)
        except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
            failed.append(f"{label}: {first_line(error)}")
        else:
            failed += [f"{label}: {name}: {why}" for name, why in found[label].failures.items()]
            step = steps[label] if axis == "Step" else None
            lines.append({"checkpoint": label, "step": step, **found[label].as_json()})
        if flags.json:
            write_json(flags.json, {"about": about, "checkpoints": lines})
    console.print(trajectory_table({label: one.estimates for label, one in found.items()}))
    for label, one in found.items():
        for line in remarks(one.estimates, how):
            console.print(f"{label}: {line}", highlight=False, markup=False, soft_wrap=True)
    if flags.figures and found:
        scalars = trajectories([one.estimates for one in found.values()])
        saved = save_trajectory([steps[label] for label in found], scalars, axis, flags.figures)
        for label, one in found.items():
            saved += save_curves(one.curves, flags.figures / label)
        for path in saved:
            console.print(f"figure {path}", highlight=False, markup=False, soft_wrap=True)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return EXIT_SOME_FAILED if failed else 0


def check_overrides(flags: argparse.Namespace, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the measures; raise InputError on a key of another section."""
    asked = flags.measures.split(",")
    measures = tuple(m for m in asked if m in base_config.MEASURES)
    for key in overrides:
        if not key.startswith("flatness.") or key == "flatness.measures":
            raise InputError(f"--config.{key}: only keys of flatness other than measures count")
    # Pictures have no settings to check; the trace, in place of them, has none either.
    return {**overrides, "flatness.measures": measures or ("hessian_trace",)}


def find_subject(
    flags: argparse.Namespace, overrides: dict[str, Any], checkpoint: Path, same_draws: bool
) -> Subject:
    """Return the problem to measure; raise InputError or ValueError, of one line, if none fits.

    same_draws: as of `run_subject`.
    """
    asked = flags.measures.split(",")
    if flags.problem:
        get_problem = load_function(flags.problem)
        return problem_subject(flags.problem, get_problem, asked, overrides, flags.seed, checkpoint)
    if saved_run.is_checkpoint(checkpoint):
        for name, own in OF_TEXTS.items():
            if getattr(flags, name) is not None:
                raise InputError(f"--{name} is for Hugging Face folders; a run has its own {own}")
        subject = subjects.run_subject(checkpoint, overrides, flags.seed, same_draws=same_draws)
    elif (checkpoint / "checkpoints").is_dir():
        raise InputError(
            f"--checkpoint={checkpoint} is a run: {saved_run.list_checkpoints(checkpoint)}"
        )
    elif not (checkpoint / "config.json").is_file():
        raise InputError(
            f"--checkpoint={checkpoint} is neither POINT/checkpoints/STEP of a run nor a "
            "folder with a config.json"
        )
    elif flags.data is None:
        raise InputError("--data=FILE is missing: a Hugging Face model is measured on its texts")
    else:
        length, seed = flags.length or 64, flags.seed or 0
        subject = text_subject(checkpoint, flags.data, length, seed, overrides)
    checks.check_labels(subject.config.flatness.labels, asked)  # for pictures too
    return lead_toward(subject, checkpoint, flags.toward) if flags.toward else subject


class Measurements(NamedTuple):
    """The mean loss and all estimates by name, the curves by measure, and reasons of failures."""

    estimates: dict[str, Estimate]
    curves: dict[str, dict[str, Any]]
    failures: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the estimates and the curves for JSON."""
        measured = {name: as_json(estimate) for name, estimate in self.estimates.items()}
        curves = {name: jax.tree.map(plain, curve) for name, curve in self.curves.items()}
        return {"measured": measured, "curves": curves}


def measure(subject: Subject, measures: list[str]) -> Measurements:
    """Return the mean loss and the results of these measures at one checkpoint.

    Prints the current measure, and the seconds of each finished one, to stderr.
    """
    problem, settings = subject.problem, subject.config.flatness
    estimates = {"loss": mean_loss(problem.loss_fn, problem.params, problem.sample(0))}
    curves, failures = {}, {}
    for number, name in enumerate(measures, start=1):
        preemption.stop_if_requested()
        print(f"[{number}/{len(measures)}] {name} ...", end=" ", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            measured = jax.block_until_ready(MEASURES[name](problem, settings))
            if name in TRACES and subject.flattest:
                trace = MEASURES[name](subject.flattest(), settings).estimates[name]
                measured.estimates[f"{name}@invariant"] = jax.block_until_ready(trace)
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # for example: no memory left
            failures[name] = first_line(error)
        else:
            estimates |= measured.estimates
            if measured.curves:
                curves[name] = measured.curves
        print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    return Measurements(estimates, curves, failures)


if __name__ == "__main__":
    from jaxflat.distributed.sharding import set_up_devices

    set_up_devices()
    sys.exit(main())
