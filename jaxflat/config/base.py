"""The base configuration: all keys except language, optimizer and flatness keys."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxflat.config.flatness import flatness
from jaxflat.config.languages import Config, language
from jaxflat.config.optimizers import optimizer


def base() -> Config:
    """Return the base configuration."""
    return ConfigDict(
        {
            # Seeds everything random except the language. Each of the next three seeds equals
            # it unless set.
            "seed": 0,
            "data_seed": placeholder(int),  # training sentences
            "init_seed": placeholder(int),  # initial parameters
            "probe_seed": placeholder(int),  # probes of flatness, training sentences of the probes
            "language": language(),
            "model": model(),
            # The names of the phases in the order they run (a ConfigDict forgets order).
            "phase_order": ("pretrain",),
            "phases": {"pretrain": phase()},
            "training": {
                "steps_per_call": 250,  # optimizer steps in one compiled call; one curve point
                "save_every": 4,  # compiled calls between recovery checkpoints
                "keep": 2,  # recovery checkpoints retained; the newest intact one is resumed
                # Train this many points in one program, if they differ only in seeds and schedules.
                # Empty slots cost as much time: they compute copies.
                "together": 1,
            },
            "evaluation": {
                "num_sentences": 4096,  # sentences of the language's evaluation set
                "num_positions": 0,  # masked positions per sentence; 0: every position in turn
                "batch_size": 512,  # sentences evaluated together
            },
            "flatness": flatness(),
            "probes": probes(),
            # Each batch is shared by data * model devices. data=-1: as many devices as divide the
            # batches evenly. Parameters and optimizer state are split into `model` shards,
            # one per device.
            "mesh": {"data": -1, "model": 1},
        }
    )


def model() -> Config:
    """Return the keys of the model."""
    return ConfigDict(
        {
            # transformer, lstm, or lookup_table (the exact conditionals; nothing is trained).
            "name": "transformer",
            "width": 32,
            "num_layers": 2,
            # Transformers have width / head_size heads. With a fixed head size, a small model
            # embeds exactly in a larger one.
            "head_size": 8,
            "tied_decoder": True,  # the decoder is the transposed token embedding
            "cls": False,  # transformer: prepend a CLS token, which fine-tuning can pool
            "features": "p",  # lookup_table: the features for its probe, p or log_p
        }
    )


def phase() -> Config:
    """Return the keys of one phase of training."""
    return ConfigDict(
        {
            "targets": "exact",  # exact: the language's conditionals; sampled: the masked word
            "steps": 2000,
            "batch_size": 128,
            "optimizer": optimizer(),
            "schedule": {
                "learning_rate": 3e-3,
                "warmup_steps": 100,
                "decay_steps": 0,  # linear decay to 0 over the phase's last steps
            },
            # Subtract from the loss `strength` times the label variance that a ridge head cannot
            # explain, over the language's tasks. So representations predict words and hide
            # labels. The head is fitted and evaluated on separate sentences.
            "adversary": {
                "strength": 0.0,  # 0: no adversary
                "labeling": "map",  # as in `probes.labelings`
                "num_sentences": 512,  # per step, to fit the head; as many more evaluate it
                "l2": 1e-3,  # penalty of the ridge head, relative to the features' scale
            },
            # Measured checkpoints branch off the phase at these steps. Each branch is annealed: the
            # same training for anneal_steps more, the learning rate decaying linearly to 0.
            "checkpoint_steps": (2000,),
            "anneal_steps": 500,
            # Exact anneals of these checkpoints, measured too: `steps` more by AdamW on exact
            # targets, the learning rate decaying linearly to 0.
            "projection": {
                "checkpoint_steps": (),
                "steps": 500,
                "batch_size": 128,
                "learning_rate": 1e-3,
            },
        }
    )


def probes() -> Config:
    """Return the keys of the downstream measurements: probes and fine-tuning."""
    return ConfigDict(
        {
            # map: argmax of the posterior; latent: the true hidden variable; official (grammars):
            # the labels of the paper's code. Tasks with given labels use only those.
            "labelings": ("map", "latent"),
            "shots": (200, 4000),  # training sentences
            "pooling": "concatenate",  # of the representations of a sentence's tokens; or "mean"
            "num_draws": 2,  # independent draws of the training sentences
            "num_validation": 2048,  # sentences for choosing the L2 penalty
            "num_test": 4096,  # test sentences of the language, the same for every model
            "l2": (1e-6, 1e-5, 1e-4, 1e-3),  # candidate penalties, relative to the features' scale
            "iterations": 150,  # iterations of the convex solver
            # Repeat the linear probe on features projected at random to this dimension, the same
            # for every width; 0: skip.
            "projected_dimension": 0,
            "belief_state": True,  # R^2 of a linear fit from representations to the exact posterior
            "finetune": finetune(),
        }
    )


def finetune() -> Config:
    """Return the keys of fine-tuning: each task and labeling trains the model and a new head."""
    return ConfigDict(
        {
            "shots": 0,  # training sentences; 0: no fine-tuning
            "num_draws": 2,  # draws of these sentences, each with its own head and order
            "pooling": "mean",  # input of the head: as in `probes`, or "cls"
            "epochs": 10,
            "batch_size": 32,
            "learning_rates": (3e-4, 3e-3),  # chosen on the validation sentences
            "warmup_steps": 20,
            "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
        }
    )
