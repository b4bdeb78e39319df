"""The keys of the languages that models are trained on."""

from typing import Any

from ml_collections import ConfigDict

Config = Any
"""A ConfigDict, or a frozen one. Its keys are attributes, which no type checker can know."""


def language() -> Config:
    """Return the keys of the language that models are trained on."""
    return ConfigDict(
        {
            "name": "hmm",  # which of the sections below applies
            "seed": 0,  # fixes the language and its evaluation set
            # What is hidden: "one" word of a sentence, or a "share": 15% of it, 1 to 5 words.
            "masking": "one",
            # Training sentences: 0 samples new ones at every step; else so many are written to
            # disk once, and read in a new order in each epoch.
            "stored_sentences": 0,
            # Where stored sentences, trained teachers and fetched texts are; "" is the folder of
            # TensorFlow Datasets: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
            "data_dir": "",
            "hmm": {
                "num_states": 10,
                "num_words": 24,
                "length": 8,
                "min_length": 8,  # lengths are uniform from here to `length`
                "transition_concentration": 0.7,  # Dirichlet, per entry; small is peaked
                "emission_concentration": 0.05,
                "tasks": (3, 6),  # name the hidden state at these positions, from 1
            },
            **grammars(),
            "dyck": {  # as many words 0 as words 1, in any order
                "length": 8,
                "min_length": 8,  # both even
                "tasks": (4,),  # name the sum of the first words
            },
            "balanced_tree": {
                "depth": 3,  # sentences have 2^depth words
                "num_states": 4,
                "num_words": 16,
                "rule_concentration": 0.07,
                "emission_concentration": 0.1,
                "tasks": ((0, 8), (0, 4), (4, 8)),
            },
            "generated": generated(),
        }
    )


def grammars() -> dict[str, Any]:
    """Return the sections of the three kinds of grammars."""
    return {
        "pcfg": {
            # Level 0 are the roots; a symbol's children are both of the next level, the last
            # level is words only: L levels make sentences of 2 to 2^(L - 1) words.
            "level_sizes": (3, 4, 4, 4),
            "num_words": 24,
            "length": 8,  # sentences are sampled conditional on
            "min_length": 4,  # having min_length to length words
            "emission_probability": 0.2,  # that a symbol between is a word
            "rule_concentration": 0.03,
            "emission_concentration": 0.05,
            # Name the symbol over words [start, end), or, (), over the whole sentence.
            "tasks": ((0, 4), ()),
        },
        "recursive_pcfg": {  # any symbol may have any two children
            "num_nonterminals": 10,
            "num_words": 24,
            "length": 8,
            "min_length": 4,
            "emission_probability": 0.5,  # that a non-terminal becomes a word
            "rule_concentration": 0.03,
            "emission_concentration": 0.05,
            "tasks": ((0, 2), (0, 4)),
        },
        "grammar_file": {
            "path": "",  # a rule a line: LHS RHS prob, or LHS RHS1 RHS2 prob
            "length": 16,
            "min_length": 1,
            "tasks": ((0, 4), (0, 2), ()),
        },
    }


def generated() -> dict[str, Any]:
    """Return the section of what a causal model of text writes, cut to its frequent tokens."""
    return {
        "teacher": "",  # folder of an OPT or GPT-2 checkpoint; "": one is trained on `text`
        "text": "reviews",  # or sst2, qnli, or a file: .txt, or .tsv with a sentence column
        "num_words": 256,
        "length": 16,
        "min_length": 4,
        "tasks": ("reviews",),  # labelled: also sst2, qnli, a .tsv with a label column
        "trained": {  # the teacher
            "vocabulary": 512,
            "width": 96,
            "num_layers": 2,
            "head_size": 32,
            "length": 32,
            "steps": 2800,
            "batch_size": 32,
            "learning_rate": 5e-3,
            "warmup_steps": 100,
            "weight_decay": 0.4,
        },
    }
