"""The base configuration: every key once, with its default and its meaning. No default elsewhere.

A config file's `get_config(scale)` starts from `base()`; its optional `get_sweep(scale)` lists the
points of a sweep; command-line overrides (`--config.model.width=32`) win over both.
"""

import itertools
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

Config = Any
"""A ConfigDict, or a frozen one. Its keys are attributes, which no type checker can know."""


def base() -> Config:
    """Return the base configuration."""
    return ConfigDict(
        {
            # One number for everything random but the language; each of the next three
            # follows it unless set.
            "seed": 0,
            "data_seed": placeholder(int),  # which sentences are trained on
            "init_seed": placeholder(int),  # initial parameters
            "probe_seed": placeholder(int),  # flatness probes, probes' training sentences
            "language": language(),
            "model": model(),
            # The names of the phases in the order they run (a ConfigDict forgets order).
            "phase_order": ("pretrain",),
            "phases": {"pretrain": phase()},
            "training": {
                "steps_per_call": 250,  # optimizer steps in one compiled call; a curve point each
                "save_every": 4,  # compiled calls between recovery checkpoints
            },
            "evaluation": {
                "num_sentences": 4096,  # the language's evaluation set, every position masked
                "batch_size": 512,  # sentences per compiled slice
            },
            "flatness": flatness(),
            "probes": probes(),
            "mesh": {"data": -1},  # devices that share each batch; -1: as many as can evenly
        }
    )


def language() -> Config:
    """Return the keys of the language that models are trained on."""
    return ConfigDict(
        {
            "name": "hmm",  # which of the sections below applies
            "seed": 0,  # fixes the language and its evaluation set
            "hmm": {
                "num_states": 10,
                "num_words": 24,
                "length": 8,
                "min_length": 8,  # lengths are uniform from here to `length`
                "transition_concentration": 0.7,  # Dirichlet, per entry; small is peaked
                "emission_concentration": 0.05,
                "tasks": (3, 6),  # name the hidden state at these positions, from 1
            },
            "pcfg": {
                "num_nonterminals": 10,
                "num_words": 24,
                "length": 8,  # sentences are sampled conditional on
                "min_length": 4,  # having min_length to length words
                "emission_probability": 0.5,  # that a non-terminal becomes a word
                "rule_concentration": 0.03,
                "emission_concentration": 0.05,
                "tasks": ((0, 2), (0, 4)),  # name the non-terminal over words [start, end)
            },
            "balanced_tree": {
                "depth": 3,  # sentences have 2^depth words
                "num_states": 4,
                "num_words": 16,
                "rule_concentration": 0.07,
                "emission_concentration": 0.1,
                "tasks": ((0, 8), (0, 4), (4, 8)),
            },
        }
    )


def model() -> Config:
    """Return the keys of the model."""
    return ConfigDict(
        {
            "name": "transformer",  # or lookup_table: the exact conditionals, nothing trained
            "width": 32,
            "num_layers": 2,
            "head_size": 8,  # width / head_size heads; fixed, so that small embeds in large
            "tied_decoder": True,  # the decoder is the transposed token embedding
            "features": "p",  # lookup_table: what its probe sees, p or log_p
        }
    )


def phase() -> Config:
    """Return the keys of one phase of training."""
    return ConfigDict(
        {
            "targets": "exact",  # exact: the language's conditionals; sampled: the masked word
            "steps": 2000,
            "batch_size": 128,
            "optimizer": {
                "name": "adamw",  # which of the sections below applies
                "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
                "sgd": {"momentum": 0.0},
            },
            "schedule": {
                "learning_rate": 3e-3,
                "warmup_steps": 100,
                "decay_steps": 0,  # linear decay to 0 over the phase's last steps
            },
            # Measured checkpoints branch off the phase at these of its steps, and each is
            # annealed: the same training for anneal_steps more, decaying linearly to 0.
            "checkpoint_steps": (2000,),
            "anneal_steps": 500,
        }
    )


def flatness() -> Config:
    """Return the keys of the curvature measurements."""
    return ConfigDict(
        {
            "measures": ("hessian_trace", "fisher_trace"),
            # Whose labels the Hessian's loss has: exact conditionals, the model's own
            # distribution, or sampled words (data).
            "labels": "exact",
            "num_microbatches": 32,  # independent; each draws its own probes
            "microbatch_size": 128,  # sentences
            "num_probes": 4,  # Rademacher vectors (Hessian) or label draws (Fisher) each
            "probes_per_pass": 4,  # of these at once; costs memory
            # The common width that @embedded values refer to. A sweep sets the largest of its
            # models here; 0: none.
            "embedded_width": 0,
        }
    )


def probes() -> Config:
    """Return the keys of the linear probes."""
    return ConfigDict(
        {
            "labelings": ("map", "latent"),  # argmax of the posterior; the true hidden variable
            "shots": (200, 4000),  # training sentences
            "num_draws": 2,  # independent draws of these sentences
            "num_validation": 2048,  # sentences that choose the L2 penalty
            "num_test": 4096,  # the language's test sentences, the same for every model
            "l2": (1e-6, 1e-5, 1e-4, 1e-3),  # penalties, relative to the features' scale
            "iterations": 150,  # of the convex solver
        }
    )


SCALES = ("smoke", "laptop", "paper")
"""Under a minute on two cores, minutes on two cores, and the paper's sizes for accelerators."""

Sweep = list[dict[str, Any]]
"""Points of a sweep, each a mapping from dotted keys to values."""


def named_scale(scale: str | None) -> str:
    """Return the scale asked for, by default "laptop"; ValueError on an unknown one."""
    if scale is not None and scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    return scale or "laptop"


def param(key: str, values: Iterable[Any]) -> Sweep:
    """Return one point for each value of one dotted key."""
    return [{key: value} for value in values]


def product(*sweeps: Sweep) -> Sweep:
    """Return every combination of one point from each sweep; the last one varies fastest."""
    return [_merge(points) for points in itertools.product(*sweeps)]


def zipped(*sweeps: Sweep) -> Sweep:
    """Return the first points merged, the second points merged, ...; all of one length."""
    return [_merge(points) for points in zip(*sweeps, strict=True)]


def chain(*sweeps: Sweep) -> Sweep:
    """Return the points of all sweeps, one sweep after the other."""
    return list(itertools.chain(*sweeps))


def _merge(points: Iterable[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for point in points:
        if repeated := merged.keys() & point.keys():
            raise ValueError(f"a sweep sets {sorted(repeated)} twice in one point")
        merged |= point
    return merged
