"""The config keys of the languages that models are trained on."""

from typing import Any

from jaxflat.config.ranges import Bounded


def language() -> dict[str, Any]:
    """Return the keys of the language that models are trained on, with their bounds."""
    return {
        "name": "hmm",  # the section that applies
        "seed": Bounded(0, least=0),  # decides the language and its evaluation set
        # What is hidden from a prediction: "one" word of a sentence; a "share", 15% of its words, 1
        # to 5; "causal": the next word or the sentence's end, and all that follows.
        "masking": Bounded("one", choices=("one", "share", "causal")),
        # Training sentences. 0 samples new ones at every step; otherwise this many are written to
        # disk once, and read in a new order in each epoch.
        "stored_sentences": Bounded(0, least=0),
        # The folder of stored sentences, trained teachers and downloaded texts. "": the folder of
        # TensorFlow Datasets, $TFDS_DATA_DIR or ~/tensorflow_datasets.
        "data_dir": "",
        "hmm": {
            "num_states": 10,
            "num_words": 24,
            "length": 8,
            "min_length": 8,  # lengths are uniform from here to `length`
            "transition_concentration": 0.7,  # Dirichlet, per entry; small is peaked
            "emission_concentration": 0.05,
            "tasks": Bounded((3, 6), least=0),  # name the hidden state at these positions, from 1
        },
        **grammars(),
        "dyck": {  # as many words 0 as words 1, in any order
            "length": 8,
            "min_length": 8,  # both even
            "tasks": Bounded((4,), least=0),  # name the sum of this many first words
        },
        "balanced_tree": {
            "depth": 3,  # sentences have 2^depth words
            "num_states": 4,
            "num_words": 16,
            "rule_concentration": 0.07,
            "emission_concentration": 0.1,
            "tasks": Bounded(((0, 8), (0, 4), (4, 8)), least=0),
        },
        "generated": generated(),
        "text": text(),
    }


def grammars() -> dict[str, Any]:
    """Return the sections of the three kinds of grammars, with their bounds."""
    return {
        "pcfg": {
            # Symbols per level. Level 0 holds the roots. Both children of a symbol are in the next
            # level, and the last level emits words only: L levels make sentences of 2 to 2^(L - 1)
            # words.
            "level_sizes": (3, 4, 4, 4),
            "num_words": 24,
            "length": 8,  # sentences are sampled on the condition that they
            "min_length": 4,  # have min_length to length words
            # The probability that a symbol of an inner level becomes a word.
            "emission_probability": Bounded(0.2, least=0),
            "rule_concentration": 0.03,
            "emission_concentration": 0.05,
            # Name the symbol over words [start, end); (): over the whole sentence.
            "tasks": Bounded(((0, 4), ()), least=0),
        },
        "recursive_pcfg": {  # any symbol may have any two children
            "num_nonterminals": 10,
            "num_words": 24,
            "length": 8,
            "min_length": 4,
            # The probability that a non-terminal becomes a word.
            "emission_probability": Bounded(0.5, least=0),
            "rule_concentration": 0.03,
            "emission_concentration": 0.05,
            "tasks": Bounded(((0, 2), (0, 4)), least=0),
        },
        "grammar_file": {
            "path": "",  # each line is a rule: LHS RHS prob, or LHS RHS1 RHS2 prob
            "length": 16,
            "min_length": 1,
            "tasks": Bounded(((0, 4), (0, 2), ()), least=0),
        },
    }


def generated() -> dict[str, Any]:
    """Return the section of text from a causal model, restricted to its frequent tokens."""
    return {
        "teacher": "",  # folder of an OPT or GPT-2 checkpoint; "": train one on `text`
        "text": "reviews",  # or sst2, qnli, or a file: .txt, or .tsv with a sentence column
        "num_words": 256,
        "length": 16,
        "min_length": 4,
        # Labelled: also sst2, qnli, a .tsv with a label column. (): no probes.
        "tasks": Bounded(("reviews",), may_be_empty=True),
        "trained": {  # the teacher that is trained
            "vocabulary": 512,
            "width": 96,
            "num_layers": 2,
            "head_size": 32,
            "length": 32,
            "steps": 2800,
            "batch_size": 32,
            "learning_rate": 5e-3,
            "warmup_steps": Bounded(100, least=0),
            "weight_decay": Bounded(0.4, least=0),
        },
    }


def text() -> dict[str, Any]:
    """Return the section of the user's own text, whose optimum is not known."""
    return {
        # A file, whose documents are separated by blank lines (without any, each line is one); or a
        # folder of .txt files, each a document.
        "path": "",
        # A folder with tokenizer.json, or with vocab.json and merges.txt. "": train byte pairs on
        # the text.
        "tokenizer": "",
        "vocabulary": Bounded(512, least=257),  # words, if the tokenizer is trained
        "length": Bounded(32, least=2),  # words of a window
        # The share of the words to hold out, in whole documents that language.seed chooses.
        "held_out_share": Bounded(0.1, below=1),
        # Labelled: .tsv files with the columns sentence and label. (): no probes.
        "tasks": Bounded((), may_be_empty=True),
    }
