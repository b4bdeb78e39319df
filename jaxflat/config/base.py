"""The base configuration: every key but for those of languages, optimizers and curvature."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxflat.config.flatness import flatness
from jaxflat.config.languages import Config, language
from jaxflat.config.optimizers import optimizer


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
                "keep": 2,  # recovery checkpoints kept: the newest that is whole is resumed from
                # As many points are trained by one program, where they differ in seeds and
                # schedules alone. Fewer take as long: their lanes are filled with copies.
                "together": 1,
            },
            "evaluation": {
                "num_sentences": 4096,  # the language's evaluation set, every position masked
                "num_positions": 0,  # words of a sentence that are asked for; 0: each in turn
                "batch_size": 512,  # sentences per compiled slice
            },
            "flatness": flatness(),
            "probes": probes(),
            # Devices share each batch, data * model of them; -1: as many as can evenly. Parameters
            # and the optimizer's state are cut into `model` parts, each on a device of its own.
            "mesh": {"data": -1, "model": 1},
        }
    )


def model() -> Config:
    """Return the keys of the model."""
    return ConfigDict(
        {
            # Or lstm; or lookup_table: the exact conditionals, nothing trained.
            "name": "transformer",
            "width": 32,
            "num_layers": 2,
            # Of transformers: width / head_size heads; fixed, so that small embeds in large.
            "head_size": 8,
            "tied_decoder": True,  # the decoder is the transposed token embedding
            "cls": False,  # of transformers: CLS before the words, which fine-tuning can pool
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
            "optimizer": optimizer(),
            "schedule": {
                "learning_rate": 3e-3,
                "warmup_steps": 100,
                "decay_steps": 0,  # linear decay to 0 over the phase's last steps
            },
            # Less `strength` times what a head leaves unexplained of the language's tasks, on
            # sentences of its own: representations that predict words and hide labels.
            "adversary": {
                "strength": 0.0,  # 0: no adversary
                "labeling": "map",  # as under `probes`
                "num_sentences": 512,  # to fit the head, in each step, and as many to judge it
                "l2": 1e-3,  # of the head, a ridge regression; relative to the features' scale
            },
            # Measured checkpoints branch off the phase at these of its steps, and each is
            # annealed: the same training for anneal_steps more, decaying linearly to 0.
            "checkpoint_steps": (2000,),
            "anneal_steps": 500,
            # Twins of these of the checkpoints, measured as well: each trained `steps` more by
            # AdamW on exact targets, the learning rate decaying linearly to 0.
            "projection": {
                "checkpoint_steps": (),
                "steps": 500,
                "batch_size": 128,
                "learning_rate": 1e-3,
            },
        }
    )


def probes() -> Config:
    """Return the keys of what is measured downstream."""
    return ConfigDict(
        {
            # map: argmax of the posterior; latent: the true hidden variable; official (grammars):
            # as the paper's code labels. Tasks whose labels are given have these alone.
            "labelings": ("map", "latent"),
            "shots": (200, 4000),  # training sentences
            "pooling": "concatenate",  # the representations of a sentence's tokens, or their "mean"
            "num_draws": 2,  # independent draws of these sentences
            "num_validation": 2048,  # sentences that choose the L2 penalty
            "num_test": 4096,  # the language's test sentences, the same for every model
            "l2": (1e-6, 1e-5, 1e-4, 1e-3),  # penalties, relative to the features' scale
            "iterations": 150,  # of the convex solver
            # The linear probe once more on features projected at random to as many dimensions for
            # models of every width; 0: not done.
            "projected_dimension": 0,
            "belief_state": True,  # R^2 of the exact posterior, linear in representations
            "finetune": finetune(),
        }
    )


def finetune() -> Config:
    """Return the keys of fine-tuning: the whole model and a new head, by tasks and labelings."""
    return ConfigDict(
        {
            "shots": 0,  # training sentences; 0: no fine-tuning
            "num_draws": 2,  # of these sentences, each with its own head and order
            "pooling": "mean",  # what the head sees of a sentence: as in `probes`, or "cls"
            "epochs": 10,
            "batch_size": 32,
            "learning_rates": (3e-4, 3e-3),  # the validation sentences choose
            "warmup_steps": 20,
            "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
        }
    )
