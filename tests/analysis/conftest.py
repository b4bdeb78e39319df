"""A simulated sweep on disk, with the effects that a test requests."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

SHOTS = (200, 4000)
TASKS = ("state_3", "state_6")
WIDTHS = (16, 32, 64)
STEPS = (1000, 2000, 4000)


def write_sweep(workdir: Path, seeds=5, widths=WIDTHS, steps=STEPS, lookup_tables=True, **effects):
    """Write a sweep; effects per size: `accuracy` in points, `log_trace`, `excess` in nats.

    The invariant trace is written if `log_invariant`, its effect per size, is given.
    """
    random = np.random.default_rng(0)
    rows, points = [], []
    for size, width in enumerate(widths):
        for seed in range(seeds):
            name = f"model.width={width},seed={seed}"
            overrides = {"model.width": width, "model.name": "transformer", "seed": seed}
            points.append({"name": name, "overrides": overrides})
            rows += [_trained(random, name, width, size, seed, step, **effects) for step in steps]
    for features in ("p", "log_p") if lookup_tables else ():
        for seed in range(seeds):
            rows.append(_lookup_table(random, features, seed))
    write_rows(workdir / "results.csv", rows)
    (workdir / "sweep.json").write_text(json.dumps({"points": points}))
    for point in points:
        _write_point(workdir / point["name"])
    return workdir


def write_rows(path: Path, rows: list[dict]):
    header = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _trained(
    random,
    name,
    width,
    size,
    seed,
    step,
    accuracy=0.0,
    log_trace=0.0,
    log_invariant=None,
    excess=0.0,
):
    # Loss depends only on the step, so cells at equal steps match, unless `excess` separates them.
    loss = 0.036 * (step / 1000) ** -0.7 + excess * size + random.normal(0, 4e-4)
    trace = 4000 * loss * np.exp(log_trace * size) * np.exp(random.normal(0, 0.04))
    row = {
        **{"point": name, "model.width": width, "model.name": "transformer", "model.features": ""},
        **{"seed": seed, "step": step, "projected": 1, "num_params": 60 * width**2},
        **{"sentences_seen": step * 128, "loss": 2.5 + loss, "loss_sem": 0.01},
        **{"optimal_loss": 2.5, "optimal_loss_sem": 0.01},
        **{"excess_loss": loss, "excess_loss_sem": 2e-4},
        **{"hessian_trace": trace * 1.3 ** (size - 1), "hessian_trace_sem": 1.0},
        **{"hessian_trace@embedded": trace, "hessian_trace@embedded_sem": 1.0},
        **{"fisher_trace": trace * 1.25 ** (size - 1), "fisher_trace@embedded": trace * 1.02},
        **{"hessian_trace/attention": trace / 3, "hessian_trace/mlp": trace / 2},
    }
    if log_invariant is not None:
        row["hessian_trace@embedded_invariant"] = trace * np.exp((log_invariant - log_trace) * size)
    return row | _accuracies(random, 0.91 - 1.2 * loss + accuracy * size / 100)


def _lookup_table(random, features, seed):
    return {
        **{"point": f"lookup_table,features={features},seed={seed}"},
        **{"model.name": "lookup_table", "model.features": features, "seed": seed, "step": 0},
        **{"projected": 0, "excess_loss": 0.0, "excess_loss_sem": 0.0},
    } | _accuracies(random, {"p": 0.88, "log_p": 0.905}[features])


def _accuracies(random, level):
    row = {}
    for task in TASKS:
        for labeling, below in (("map", 0.0), ("latent", 0.17)):
            for shots in SHOTS:
                lost = below + 0.08 * (shots == SHOTS[0])
                name = f"linear_probe/{task}.{labeling}/{shots}"
                row |= {name: level - lost + random.normal(0, 0.004), f"{name}_sem": 0.003}
            row[f"bayes/{task}.{labeling}"] = {"map": 1.0, "latent": 0.82}[labeling]
    return row


def _write_point(folder: Path):
    folder.mkdir(exist_ok=True)
    config = {"model": {"width": 16}, "phase_order": ["pretrain"]}
    about = {"versions": {"jax": "0.10.2"}, "git_commit": "abc1234", "device": "cpu"}
    (folder / "config.json").write_text(json.dumps({"config": config, **about}))
    lines = [{"stage": "train", "seconds": 20.0}, {"stage": "flatness", "seconds": 4.5}]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"state": "done"}))


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """Return sweep(accuracy=..., log_trace=..., excess=...) -> the folder of a simulated sweep."""
    return lambda **effects: write_sweep(tmp_path_factory.mktemp("sweep"), **effects)
