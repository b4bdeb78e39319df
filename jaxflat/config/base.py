"""Every config key with its default; languages, optimizers and flatness have their own files."""

from collections.abc import Iterable
from typing import Any

from ml_collections.config_dict import placeholder

from jaxflat.config.flatness import flatness
from jaxflat.config.languages import language
from jaxflat.config.optimizers import optimizer
from jaxflat.config.ranges import Bounded, Config, defaults

MODELS = ("transformer", "lstm", "causal", "lookup_table")
LABELINGS = ("map", "latent", "official")
FLATNESS_PENALTIES = (
    *("gauss_newton_trace", "hessian_trace"),
    *("hessian_max_eigenvalue", "parameter_norm", "feature_rank"),
)


def base() -> Config:
    """Return the base configuration."""
    return defaults(every_key())


def phase() -> Config:
    """Return the keys of one phase of training."""
    return defaults(phase_keys())


def every_key(phases: Iterable[str] = ("pretrain",)) -> dict[str, Any]:
    """Return every key with its default and bounds, for phases of these names."""
    return {
        # The default of the three seeds below. `language.seed` is separate.
        "seed": Bounded(0, least=0),
        "data_seed": Bounded(placeholder(int), least=0),  # decides the training sentences
        "init_seed": Bounded(placeholder(int), least=0),  # decides the initial parameters
        # Decides the random vectors and sentences of flatness, and the sentences on which linear
        # probes and fine-tuning are fitted and tested. So all arms of a seed share test sentences.
        "probe_seed": Bounded(placeholder(int), least=0),
        "language": language(),
        "model": model(),
        # The names of the phases in the order they run (a ConfigDict has no order).
        "phase_order": Bounded(("pretrain",), may_be_empty=True),
        "phases": {name: phase_keys() for name in phases},
        "training": {
            # Optimizer steps per compiled call, at most. The curve has a line for each call, so
            # calls are shorter where a phase would have fewer than 50 of them.
            "steps_per_call": 250,
            "save_every": 4,  # a recovery checkpoint every save_every * steps_per_call steps
            "keep": 2,  # recovery checkpoints kept; a run resumes from the newest complete one
            # Train up to this many points in one program, if they differ only in seeds, schedules
            # and strengths other than 0 of flatness penalties. Unused slots still cost time.
            "together": 1,
            # Store only the input of each block for the backward pass, and recompute the rest: less
            # memory, one more forward pass.
            "remat": False,
            # Of matrix products in training. All else is float32, and so is every measurement.
            "compute_dtype": Bounded("float32", choices=("float32", "bfloat16")),
        },
        "evaluation": {
            # Sentences of the language's evaluation set. With masking "one" every position is
            # masked in turn; with "causal" all next words are predicted.
            "num_sentences": Bounded(4096, least=2),
            # With masking "one": masked positions per sentence; 0 masks all of them.
            "num_positions": Bounded(0, least=0),
            "batch_size": 512,  # sentences per compiled slice
        },
        "flatness": flatness(),
        "probes": probes(),
        "claims": claims(),
        # data * model devices share each batch; data=-1 uses as many as divide the batches evenly.
        # Parameters and optimizer state are split into `model` parts, one part per device.
        "mesh": {"data": -1, "model": 1},
    }


def model() -> dict[str, Any]:
    """Return the keys of the model."""
    return {
        # causal: a transformer that predicts each word from the words before it.
        # lookup_table: the exact conditionals, without training.
        "name": Bounded("transformer", choices=MODELS),
        "width": 32,
        "num_layers": 2,
        # Transformers have width / head_size heads. A fixed size lets small models embed in large.
        "head_size": 8,
        "tied_decoder": True,  # the decoder is the transposed token embedding
        # Causal models. gpt: layer norms, learned positions, GELU, biases (as GPT-2). modern: RMS
        # norms, rotary positions, SwiGLU, no biases (as Llama).
        "block": Bounded("gpt", choices=("gpt", "modern")),
        "cls": False,  # transformers: a CLS token before the words, which fine-tuning can pool
        # What probes see of a lookup table.
        "features": Bounded("p", choices=("p", "log_p")),
    }


def phase_keys() -> dict[str, Any]:
    """Return the keys of one phase of training, with their bounds."""
    return {
        # Start with a random rescaling of the parameters, which changes no output (see
        # models/rescaling.py). Logarithms of its scales, and of the singular values of heads'
        # matrices, are uniform within +-log(rescaling). 0: none. With steps=0 it is a control.
        "rescaling": Bounded(0.0, least=0, below=1000),
        # exact: the language's conditionals; sampled: the masked word.
        "targets": Bounded("exact", choices=("exact", "sampled")),
        "objective": Bounded("masked_lm", choices=("masked_lm",)),  # cross-entropy of hidden words
        "steps": Bounded(2000, least=0),  # 0 in a later phase: branches of its start are measured
        "batch_size": 128,  # sentences of an optimizer step
        # Sentences that a step computes at once; it sums the gradients of its microbatches. Fewer
        # need less memory. 0: the whole batch; on CPUs about 512 words for each device. An
        # adversary's sentences are not divided.
        "microbatch_size": Bounded(0, least=0),
        "optimizer": optimizer(),
        "schedule": {
            "learning_rate": 3e-3,
            "warmup_steps": Bounded(100, least=0),
            # The last steps of the phase, during which the learning rate decays linearly to 0.
            "decay_steps": Bounded(0, least=0),
        },
        # Subtract `strength` times the share of the labels' variance that a ridge regression on
        # the representations leaves unexplained, on separate sentences. So representations learn
        # to predict words and to hide labels.
        "adversary": {
            "strength": Bounded(0.0, least=0),  # 0: no adversary
            "labeling": Bounded("map", choices=LABELINGS),  # as under `probes`
            # Sentences that fit the regression in each step; as many others evaluate it.
            "num_sentences": Bounded(512, least=2),
            "l2": 1e-3,  # penalty of the ridge regression, relative to the features' scale
        },
        # Minimise the loss plus `strength` times a measure of flatness, both of the step's batch.
        # Positive strengths flatten, negative ones sharpen.
        "flatness_penalty": {
            # Traces: along random signs. The eigenvalue: along a vector that takes one power step
            # per training step. Controls: parameter_norm, the squared norm of all parameters;
            # feature_rank, the effective rank of the representations that probes see.
            "measure": Bounded("gauss_newton_trace", choices=FLATNESS_PENALTIES),
            "strength": Bounded(0.0, least=None),  # 0: no penalty; anneals keep the phase's
            "num_probes": 1,  # random vectors of a trace in each step
            # Nats: a negative strength acts only in steps in which the excess loss of the batch is
            # at most this much. Needs targets="exact". 0: no limit.
            "max_excess": Bounded(0.0, least=0),
        },
        # At these steps of the phase a copy of the model branches off to be measured. It is
        # annealed: trained for anneal_steps more, while the learning rate decays linearly to 0.
        "checkpoint_steps": Bounded((2000,), least=0, may_be_empty=True),
        "anneal_steps": Bounded(500, least=0),
        # Projections: copies of these checkpoints are trained `steps` more by AdamW on exact
        # targets, while the learning rate decays linearly to 0, and are measured too.
        "projection": {
            "checkpoint_steps": Bounded((), least=0, may_be_empty=True),
            "steps": 500,
            "batch_size": 128,
            "learning_rate": 1e-3,
        },
    }


def probes() -> dict[str, Any]:
    """Return the keys of downstream measurements."""
    return {
        # map: the most probable hidden symbol given the words; latent: the true one; official
        # (grammars): the labels of the paper's code. The tasks of the language `generated` have
        # given labels instead.
        "labelings": Bounded(("map", "latent"), choices=LABELINGS),
        "shots": (200, 4000),  # training sentences with a label; so are those below
        # How the representations of a sentence's tokens become one vector.
        "pooling": Bounded("concatenate", choices=("concatenate", "mean", "last")),
        "num_draws": 2,  # independent draws of the training sentences
        "num_validation": Bounded(2048, least=2),  # sentences that choose the L2 penalty
        "num_test": Bounded(4096, least=2),  # test sentences
        "l2": (1e-6, 1e-5, 1e-4, 1e-3),  # penalties, relative to the features' scale
        "iterations": 150,  # of the convex solver
        # Also probe features that are projected at random to this dimension, the same for models
        # of every width; 0: do not.
        "projected_dimension": Bounded(0, least=0),
        "belief_state": True,  # R^2 of the exact posterior, linear in the representations
        "finetune": finetune(),
    }


def claims() -> dict[str, Any]:
    """Return what the report's verdicts are declared to rest on, before the sweep runs.

    sweep.json records these keys, and a sweep that has begun cannot change them.
    """
    return {
        # The kind of the primary claim. Claims of this kind are corrected for their own number, all
        # others together for theirs. accuracy, flatness: of sizes or arms; effect: of flatness on
        # accuracy; label noise: on flatness.
        "primary": Bounded("accuracy", choices=("accuracy", "flatness", "effect", "label noise")),
        # This probe measures accuracy, fitted to this many labelled sentences; 0: the most of
        # probes.shots. linear_probe_projected needs probes.projected_dimension.
        "probe": Bounded("linear_probe", choices=("linear_probe", "linear_probe_projected")),
        "shots": Bounded(0, least=0),
        # Two excess losses are equal if their ratio is shown to lie between 1 / (1 + loss_margin)
        # and 1 + loss_margin. The report also shows half and twice this margin.
        "loss_margin": 0.1,
        # On a text, whose optimum is not known: two held-out losses are equal if their difference
        # is shown to lie within this many nats.
        "loss_margin_nats": 0.01,
        # An effect of flatness within this many points of accuracy per halving of the trace is
        # negligible.
        "negligible_slope": 0.5,
    }


def finetune() -> dict[str, Any]:
    """Return the keys of fine-tuning a whole model and a new head on each task and labeling."""
    return {
        "shots": Bounded(0, least=0),  # training sentences; 0: no fine-tuning
        "num_draws": 2,  # draws of the training sentences, each with its own head and order
        # As in `probes`; "cls": the representation of the CLS token.
        "pooling": Bounded("mean", choices=("concatenate", "mean", "last", "cls")),
        "epochs": 10,
        "batch_size": 32,
        "learning_rates": (3e-4, 3e-3),  # the validation sentences choose
        "warmup_steps": Bounded(20, least=0),
        "adamw": {
            "b1": Bounded(0.9, least=0, below=1),
            "b2": Bounded(0.999, below=1),
            "eps": 1e-8,
            "weight_decay": Bounded(0.01, least=0),
        },
    }
