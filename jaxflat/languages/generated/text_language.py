"""Make the language `generated` from its config: teacher, words, and real labelled sentences."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.datasets import tokenizer as tokenizers
from jaxflat.datasets.sources import NAMED, file_digest, read_labelled, read_texts, split_pairs
from jaxflat.datasets.text import manual_folder
from jaxflat.distributed.leases import acquire_lease
from jaxflat.languages.generated.language import Generated
from jaxflat.languages.generated.teacher import MIN_TEXTS, train_teacher
from jaxflat.languages.sentences import Sentences
from jaxflat.models.causal import empty_cache
from jaxflat.models.huggingface import load_causal

MAX_CANDIDATES = 65_536  # most completions of one sentence that the oracle enumerates


class LabelledSentences(NamedTuple):
    """Real sentences in the words of a language, with labels given by people."""

    sentences: Sentences
    labels_N: np.ndarray
    num_classes: int


@functools.cache
def check_language(section: Config, num_labelled: int = 0) -> None:
    """Raise ValueError if the language cannot be made; this reads files and trains nothing.

    num_labelled: the smallest number of labelled sentences of each task.
    """
    generated = section.generated
    if section.masking == "share":
        raise ValueError(
            f"language.masking={section.masking!r} with language.name='generated': its exact "
            "conditionals are known for 'one' masked word, or 'causal'"
        )
    trained = generated.trained
    if trained.width % trained.head_size:
        raise ValueError(
            f"language.generated.trained: width={trained.width} is not divisible by "
            f"head_size={trained.head_size}"
        )
    if generated.min_length > generated.length:
        raise ValueError(
            f"language.generated.min_length={generated.min_length} must be in "
            f"1..length={generated.length}"
        )
    if Path(generated.text).suffix and any(name in NAMED for name in generated.tasks):
        raise ValueError(
            f"language.generated.tasks={generated.tasks} are labels of other texts than "
            f"language.generated.text={generated.text}; set it to .tsv files with your labels, or "
            "to () for no probes"
        )
    if generated.teacher and not Path(generated.teacher).is_dir():
        raise ValueError(f"language.generated.teacher={generated.teacher}: no such folder")
    if not generated.teacher and generated.num_words > trained.vocabulary:
        raise ValueError(
            f"language.generated.num_words={generated.num_words} exceeds the teacher's "
            f"language.generated.trained.vocabulary={trained.vocabulary}; or give a larger "
            "teacher, language.generated.teacher=FOLDER"
        )
    if not generated.teacher and generated.length > trained.length:
        raise ValueError(
            f"language.generated.length={generated.length} exceeds the teacher's "
            f"language.generated.trained.length={trained.length}"
        )
    num_texts = len(split_pairs(read_texts(generated.text, section.data_dir)))
    if not generated.teacher and num_texts < MIN_TEXTS:
        raise ValueError(f"{generated.text}: {num_texts} sentences; a teacher needs {MIN_TEXTS}")
    check_labelled("language.generated.tasks", generated.tasks, section.data_dir, num_labelled)


def check_labelled(key: str, names: Sequence[str], data_dir: str, num_labelled: int) -> None:
    """Raise ValueError if the sources of labelled sentences, the value of a key, cannot be probed.

    num_labelled: the smallest number of labelled sentences of each task.
    """
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        raise ValueError(f"{key}={names}: two have the same name")
    for name in names:
        labels_N = read_labelled(name, data_dir).labels_N
        if labels_N is not None and np.ptp(labels_N) == 0:
            raise ValueError(f"{name}: all labels are {labels_N[0]}; a probe needs two classes")
        if labels_N is not None and len(labels_N) < num_labelled:
            raise ValueError(
                f"probes: num_test + num_validation + num_draws * most shots = {num_labelled}; "
                f"{name} has {len(labels_N)} labelled sentences"
            )


def data_dir(section: Config) -> Path:
    """Return the folder of trained teachers and stored sentences."""
    return manual_folder(section.data_dir or None).parents[1] / "jaxflat"


def product_folder(section: Config, kind: str, settings: dict[str, Any]) -> Path:
    """Return the folder of a product of these settings; other settings have another folder."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return data_dir(section) / f"{kind}-{digest[:12]}"


def file_digests(section: Config) -> list[str]:
    """Return digests of the user's own files that the language is made from."""
    folder = section.generated.teacher
    files = sorted(Path(folder).glob("*.*")) if folder else []
    return [file_digest(section.generated.text), *(file_digest(str(file)) for file in files)]


def teacher_folder(section: Config) -> Path:
    """Return the folder of the teacher, which may not exist yet."""
    generated = section.generated
    if generated.teacher:
        return Path(generated.teacher)
    trained = {"text": generated.text, "seed": section.seed, **generated.trained.to_dict()}
    trained["content"] = file_digest(generated.text)
    return product_folder(section, "teacher", trained)


def has_teacher(section: Config) -> bool:
    """Say whether the teacher exists, so that the language can be made now."""
    return teacher_folder(section).exists()


def prepare_teacher(section: Config, display: Display) -> None:
    """Train the teacher of a language, unless it exists."""
    folder = teacher_folder(section)
    if folder.exists():
        return
    with acquire_lease(folder, display.print_wait):
        if folder.exists():  # another worker trained it meanwhile
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        texts = split_pairs(read_texts(section.generated.text, section.data_dir))
        train_teacher(folder, texts, section.generated.trained, section.seed, display)
        display.print_line(f"teacher: {folder}")


def make_generated(section: Config) -> Generated:
    """Return the language; raises ValueError of one line if the teacher does not fit."""
    generated = section.generated
    loaded, kept_V = _teacher(section)
    marks = {"bos_token_id": loaded.bos_token, "eos_token_id": loaded.eos_token}
    for name, mark in marks.items():
        if mark is None:
            raise ValueError(f"{teacher_folder(section)}/config.json: {name} is missing")
    if generated.length > loaded.model.max_length:
        raise ValueError(
            f"language.generated.length={generated.length} exceeds the {loaded.model.max_length} "
            f"positions of the teacher in {teacher_folder(section)}"
        )
    return Generated(
        params=loaded.params,
        kept_V=jnp.asarray(kept_V),
        tasks={},
        model=loaded.model,
        empty_cache=empty_cache,
        first_token=loaded.bos_token,
        stop_token=loaded.eos_token,
        min_length=generated.min_length,
        max_length=generated.length,
        max_candidates=MAX_CANDIDATES,
    )


@functools.cache
def labelled_sentences(section: Config) -> dict[str, LabelledSentences]:
    """Return the tasks with given labels: real sentences, cut to the language's length."""
    tokenizer = tokenizers.load_tokenizer(teacher_folder(section))
    _, kept_V = _teacher(section)
    generated = section.generated
    return read_labelled_words(
        generated.tasks, section.data_dir, tokenizer, kept_V, generated.length
    )


def read_labelled_words(
    names: Sequence[str], data_dir: str, tokenizer: Any, kept_V: np.ndarray, length: int
) -> dict[str, LabelledSentences]:
    """Return the sentences of labelled sources by task, in words: word v is the token kept_V[v].

    Sentences are cut to `length` words. A token that is no word is hidden, as by a mask.
    """
    found = {}
    for name in names:
        examples = read_labelled(name, data_dir)
        encoded = tokenizers.encode(tokenizer, examples.texts)
        words = tokenizers.to_words(encoded, kept_V, length)
        sentences = Sentences(*(jnp.asarray(x) for x in words), latents=None)
        labels_N = np.asarray(examples.labels_N, np.int32)
        found[Path(name).stem] = LabelledSentences(sentences, labels_N, len(examples.label_names))
    return found


@functools.cache
def _teacher(section: Config) -> tuple[Any, np.ndarray]:
    """Return the loaded teacher and the ids of the words: its most frequent tokens in the text."""
    folder = teacher_folder(section)
    loaded, tokenizer = load_causal(folder), tokenizers.load_tokenizer(folder)
    texts = read_texts(section.generated.text, section.data_dir)
    encoded = tokenizers.encode(tokenizer, texts)
    num_words, num_tokens = section.generated.num_words, loaded.model.num_tokens
    marks = {loaded.bos_token, loaded.eos_token}
    ids = tokenizers.most_frequent(encoded, num_tokens, min(num_words + len(marks), num_tokens))
    kept_V = np.array([token for token in ids if token not in marks][:num_words], np.int32)
    if len(kept_V) < num_words:
        raise ValueError(
            f"language.generated.num_words={num_words} exceeds the teacher's {len(kept_V)} tokens"
        )
    return loaded, kept_V
