"""Show, before any training, a sweep's memory, languages, drift and what it could decide."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from jaxflat.analysis.loss_scale import EXCESS_LOSS, HELD_OUT_LOSS
from jaxflat.analysis.plan import Plan
from jaxflat.analysis.power import PLANTED, ClaimPower, predict_verdicts
from jaxflat.analysis.results_csv import LANGUAGE, OF_LANGUAGE, SEEDS
from jaxflat.analysis.synthetic import EXCESS, PlantedTruth, SyntheticArm
from jaxflat.config import Config
from jaxflat.console import make_console
from jaxflat.flatness import Estimate
from jaxflat.runs import builders, checks, memory, trajectory
from jaxflat.runs.drift import predicted_drift
from jaxflat.runs.language_figures import measure_language
from jaxflat.runs.languages import has_labels, language_kind, make_language
from jaxflat.runs.real_text import describe_text
from jaxflat.runs.run import Point
from jaxflat.runs.trajectory import Checkpoint

UNTRAINED = [Checkpoint(0)]  # also a lookup table's
LANGUAGE_SENTENCES = 2048  # sampled for the figures of a language


def show_points(chosen: Sequence[tuple[int, Point]]) -> None:
    """Print the memory of numbered points, and which of them one program trains."""
    console = make_console()
    found = memory.step_memories([point.config for _, point in chosen])
    steps = [(*one, step) for one, step in zip(chosen, found, strict=True)]
    rows = [(escape(f"{n} {point.title}"), point.config, step) for n, point, step in steps]
    console.print(memory.table(rows))
    advice: dict[str, list[str]] = {}
    for number, point, step in steps:
        if step and (line := memory.advice(point.config, step)):
            advice.setdefault(line, []).append(str(number))
    for line, numbers in advice.items():
        text = f"A training step does not fit these devices at {', '.join(numbers)}. {line}"
        console.print(text, highlight=False)
    unmeasured = dict.fromkeys(filter(None, (_unmeasured_steps(p.config) for _, p in chosen)))
    for line in unmeasured:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    teams: dict[tuple[str, int], list[str]] = {}
    for number, point in chosen:
        if point.config.phase_order:
            team = point.team, point.config.training.together
            teams.setdefault(team, []).append(str(number))
    for (_, slots), numbers in teams.items():
        if len(numbers) > 1:
            text = f"trained in one program of {slots} slots: {', '.join(numbers)}"
            console.print(f"{text}; a row is of one slot", highlight=False)


def _unmeasured_steps(config: Config) -> str:
    """Return a line about steps that train after the last checkpoint of a run, "" if none do."""
    run_phases = trajectory.phases(config)
    if not run_phases or not run_phases[-1].branches:
        return ""
    last = run_phases[-1]
    if last.settings.schedule.decay_steps or (step := max(last.branches)) == last.stop:
        return ""
    return (
        f"phases.{last.name} trains {last.stop - step:,} steps after its last checkpoint, and no "
        f"measurement sees them: set phases.{last.name}.steps={step - last.start}"
    )


def show_languages(points: Sequence[Point]) -> None:
    """Print the entropies of the points' languages, and the accuracies that their tasks allow."""
    console = make_console()
    entropies = _figures_table("optimum of the loss", "unigram entropy", "context gives")
    tasks = _figures_table("task", "Bayes accuracy", "majority", "sentences that have it")
    sections = dict.fromkeys(point.config.language for point in points)
    if any(language_kind(section).has_tasks for section in sections):
        console.print("languages: computing exact conditionals and posteriors of sampled sentences")
    for section in sections:
        name = escape(f"{section.name}, seed {section.seed}")
        if not language_kind(section).has_optimum:
            text = f"{name}: {describe_text(section)}. Its optimum is not known."
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            continue
        if not language_kind(section).has_tasks:
            text = "no figures here, because its exact conditionals take a model's time"
            console.print(f"{name}: {text}; results.csv has its optimum", highlight=False)
            continue
        language, key = make_language(section), builders.purpose_key(section.seed, "figures")
        figures = measure_language(language, section.masking, key, num_sentences=LANGUAGE_SENTENCES)
        entropies.add_row(name, *map(_cell, figures[:3]))
        for task, accuracies in figures.tasks.items():
            tasks.add_row(name, escape(task), *map(_cell, accuracies))
    for table, title in (
        (entropies, "Nats of a prediction ± standard error"),
        (
            tasks,
            "Latent labels ± standard error (the Bayes accuracy of map labels is 1)",
        ),
    ):
        if table.row_count:
            table.title = title
            console.print(table)


def show_drift(points: Sequence[Point]) -> None:
    """Print how far label noise moves the parameters in each phase, where theory predicts it."""
    columns = ("phase", "learning rate", "batch", "steps", "targets", "t")
    table, without, console = Table(*columns, box=box.SIMPLE_HEAD), {}, make_console()
    rows: dict[tuple[str, ...], None] = {}
    for point in points:
        for phase in trajectory.phases(point.config):
            settings = phase.settings
            drift = predicted_drift(point.config.language, settings)
            if drift is None:
                if settings.optimizer.name == "sgd":
                    without[phase.name] = None
                continue
            sizes = settings.schedule.learning_rate, settings.batch_size, settings.steps
            rows[(phase.name, *map(str, sizes), settings.targets, f"{drift:.2g}")] = None
    for row in rows:
        table.add_row(*map(escape, row))
    if rows:
        table.title = "Drift of label noise, t = sum of (learning rate)² / batch over the steps"
        console.print(table)
        console.print(
            "The label noise of SGD slowly moves the parameters to lower Hessian traces, along the "
            "minimisers of the loss: the larger t, the farther. It follows the flow "
            "d theta / dt = -1/4 grad tr H for time t.",
            highlight=False,
        )
    if without:
        console.print(
            f"No drift is predicted for {', '.join(without)}: t is defined for SGD without "
            "momentum or a penalty, on new sentences with one masked word.",
            highlight=False,
            markup=False,
        )


def _figures_table(*columns: str) -> Table:
    return Table("language", *columns, box=box.SIMPLE_HEAD)


def _cell(estimate: Estimate) -> str:
    return f"{float(estimate.mean):.3f} ± {float(estimate.sem):.3f}"


def show_power(points: Sequence[Point]) -> None:
    """Print which claims the sweep could decide, and with what power, from made-up results."""
    console, arms, noise = make_console(), synthetic_arms(points), PlantedTruth()
    config = points[0].config
    measures = {
        f"phases.{name}.flatness_penalty.measure": phase.flatness_penalty.measure
        for name, phase in config.phases.items()
    }
    claims = predict_verdicts(arms, Plan(**config.claims, penalties=measures)) if arms else []
    if not claims:
        console.print("No point measures a trained model, so there will be no verdicts.")
        return
    scale = EXCESS_LOSS if language_kind(config.language).has_optimum else HELD_OUT_LOSS
    console.print(
        f"What this sweep could decide, from {max(c.answers.total() for c in claims)} made-up "
        f"results of its shape. Assumed noise of a run: {noise.accuracy.run:g} points of accuracy "
        f"and {noise.log_trace.run:g} of log trace; all arms reach the same {scale.nouns}.",
        highlight=False,
    )
    if scale is HELD_OUT_LOSS:
        console.print(
            "The prediction leaves out the error over held-out documents, which is not known "
            "before training. So the sweep may decide less.",
            highlight=False,
        )
    _print_claims(claims, console)
    if (primary := points[0].config.claims.primary) not in {claim.kind for claim in claims}:
        console.print(
            f"This sweep has no claim of the declared primary kind, claims.primary={primary!r}.",
            highlight=False,
        )
    console.print(
        "Power: how often the report says 'supported' if the effect is real. The assumed effects "
        f"are: {', '.join(PLANTED.values())}. The power does not depend on the language.",
        highlight=False,
    )


def synthetic_arms(points: Sequence[Point]) -> list[SyntheticArm]:
    """Return the trained arms of a sweep with their seeds and measured checkpoints.

    The excess loss falls by sqrt(2) from one checkpoint of a phase to the next, to 0.003 nats.
    """
    trained = [p for p in points if trajectory.measured_checkpoints(p.config) != UNTRAINED]
    keys = dict.fromkeys(
        key for p in points for key in p.overrides if key not in (LANGUAGE, *SEEDS)
    )
    arms: dict[tuple[str, ...], list[Point]] = {}  # by name and swept values
    for point in trained:
        swept = (_text(point.overrides.get(key, "")) for key in keys)
        arms.setdefault((point.arm, *swept), []).append(point)
    return [
        _synthetic_arm(dict(zip(keys, values, strict=True)), runs)
        for (_, *values), runs in arms.items()
    ]


def _synthetic_arm(swept: dict[str, str], runs: Sequence[Point]) -> SyntheticArm:
    config = runs[0].config
    checkpoints = trajectory.measured_checkpoints(config)
    later = {  # the number of later branches of the same phase, by the checkpoint's step
        branch + phase.settings.anneal_steps: len(phase.branches[i + 1 :])
        for phase in trajectory.phases(config)
        for i, branch in enumerate(phase.branches)
    }
    return SyntheticArm(
        swept,
        seeds=[_seed(point) for point in runs],
        steps=[checkpoint.step for checkpoint in checkpoints],
        excess_losses=[EXCESS * 2 ** (later[checkpoint.step] / 2) for checkpoint in checkpoints],
        num_params=builders.num_params(config),
        projected=[checkpoint.projected for checkpoint in checkpoints],
        shots=config.probes.shots if has_labels(config.language) else (),
        sharpness_columns=_sharpness_columns(config),
        has_optimum=language_kind(config.language).has_optimum,
        name=runs[0].arm,
    )


def _sharpness_columns(config: Config) -> list[str]:
    """Return the columns of sharpness that the results will have."""
    columns = checks.sharpness_columns(config.flatness)
    if not config.flatness.embedded_width:
        return columns
    has_invariant = config.flatness.invariant and builders.is_ours(config)
    traces = [name for name in columns if name.endswith("_trace") and has_invariant]
    return [
        *columns,
        *(f"{name}@embedded" for name in columns),
        *(f"{name}@embedded_invariant" for name in traces),
    ]


def _seed(point: Point) -> str:
    """Return the seed as the analysis names it: with the other seeds and the language, if swept."""
    swept = [str(point.overrides[key]) for key in SEEDS[1:] if key in point.overrides]
    language = f"{OF_LANGUAGE}{point.overrides[LANGUAGE]}" if LANGUAGE in point.overrides else ""
    return "/".join([str(point.config.seed), *swept]) + language


def _text(value: Any) -> str:
    """Return an override as results.csv has it."""
    return str(list(value) if isinstance(value, tuple) else value)


def _print_claims(claims: Sequence[ClaimPower], console: Console) -> None:
    table = Table("claim", Column("power", justify="right"), box=box.SIMPLE_HEAD)
    for claim in claims:
        if claim.is_identified:
            table.add_row(escape(claim.claim), _percent(claim))
    if table.row_count:
        console.print(table)
    for claim in claims:
        if not claim.is_identified:
            text = f"No verdict on '{claim.claim}': {claim.reason}"
            console.print(text, highlight=False, markup=False)


def _percent(claim: ClaimPower) -> str:
    return f"{claim.power:.0%}" if claim.kind in PLANTED else "not predicted"
