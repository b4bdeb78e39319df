"""Make the language `text` from its config: the user's text in words, and labelled sentences."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.datasets import tokenizer as tokenizers
from jaxflat.datasets.documents import FEWEST, PackedText, pack_parts, read_documents, text_files
from jaxflat.datasets.sources import file_digest
from jaxflat.distributed.leases import acquire_lease
from jaxflat.languages.generated.text_language import (
    LabelledSentences,
    check_labelled,
    product_folder,
    read_labelled_words,
)
from jaxflat.languages.windows import TextWindows
from jaxflat.storage.files import Check, replacing, write_whole

TOKENS = "tokens.npz"  # written last


@functools.cache
def check_text(section: Config, num_labelled: int = 0) -> None:
    """Raise ValueError of one line if the language cannot be made, as far as that is known.

    A text that has not been tokenized yet may still be too small; `prepare_text` says so.
    num_labelled: the smallest number of labelled sentences of each task.
    """
    text = section.text
    if not text.path:
        raise ValueError("language.text.path='' must be a text file or a folder of .txt files")
    if section.stored_sentences:
        raise ValueError(
            f"language.stored_sentences={section.stored_sentences} must be 0 for language.name="
            "'text', whose windows are stored already"
        )
    try:
        text_files(text.path)
    except ValueError as error:
        raise ValueError(f"language.text.path: {error}") from error
    if text.tokenizer:
        tokenizers.tokenizer_file(Path(text.tokenizer))
    check_labelled("language.text.tasks", text.tasks, section.data_dir, num_labelled)
    if is_tokenized(section):
        _packed(section)


def file_digests(section: Config) -> list[str]:
    """Return digests of the user's own files that the language is made from."""
    folder, files = section.text.tokenizer, text_files(section.text.path)
    if folder:  # its other files, such as a model's weights, do not decide the tokens
        files += tokenizers.tokenizer_files(Path(folder))
    return [file_digest(str(file)) for file in files]


def text_sizes(section: Config) -> tuple[int, int]:
    """Return (V, T): V counts the tokens and, as the last word, the end of a document."""
    text = section.text
    return _num_tokens(text.tokenizer) + 1 if text.tokenizer else text.vocabulary, text.length


def is_tokenized(section: Config) -> bool:
    """Say whether the text's tokens are on disk, so that the language can be made now."""
    return (_token_folder(section) / TOKENS).exists()


def prepare_text(section: Config, display: Display) -> None:
    """Tokenize the text, unless its tokens exist; raise ValueError if they are too few."""
    folder = _token_folder(section)
    if not is_tokenized(section):
        with acquire_lease(folder, display.print_wait) as lease:
            if not is_tokenized(section):  # otherwise another worker wrote them meanwhile
                _tokenize(section, folder, lease.assert_owned)
                display.print_line(f"tokens: {folder}")
    _packed(section)


def describe_text(section: Config) -> str:
    """Return what a text holds, in one line; before it is tokenized, its documents and size."""
    if not is_tokenized(section):
        documents = read_documents(section.text.path)
        num_characters = sum(map(len, documents))
        return (
            f"{len(documents):,} documents of {num_characters:,} characters in all, which the run "
            "divides into tokens"
        )
    packed, length = _packed(section), section.text.length
    training, held_out = packed.training_NxT.size, packed.held_out_HxT.size
    return (
        f"{training:,} tokens to train on, and {held_out:,} tokens of "
        f"{packed.documents_HxT.max() + 1:,} held-out documents, in windows of {length}"
    )


def make_text(section: Config) -> TextWindows:
    """Return the language; its text must have been tokenized."""
    num_words, _ = text_sizes(section)
    return TextWindows(*map(jnp.asarray, _packed(section)), num_words=num_words)


@functools.cache
def labelled_sentences(section: Config) -> dict[str, LabelledSentences]:
    """Return the tasks with given labels: real sentences, cut to the length of a window."""
    text, (num_words, length) = section.text, text_sizes(section)
    if not text.tasks:
        return {}
    tokenizer = tokenizers.load_tokenizer(text.tokenizer or _token_folder(section))
    kept_V = np.arange(num_words - 1)
    return read_labelled_words(text.tasks, section.data_dir, tokenizer, kept_V, length)


def _token_folder(section: Config) -> Path:
    """Return the folder of the text's tokens; another text or tokenizer has another folder."""
    text = section.text
    vocabulary = 0 if text.tokenizer else text.vocabulary
    settings = {"content": file_digests(section), "vocabulary": vocabulary}
    settings |= {"files_are_documents": Path(text.path).is_dir()}
    return product_folder(section, "text", settings)


def _tokenize(section: Config, folder: Path, assert_owned: Check) -> None:
    """Write the tokens of all documents and their lengths, after the tokenizer if it is trained."""
    text, documents = section.text, read_documents(section.text.path)
    if len(documents) < 2 * FEWEST:
        raise ValueError(
            f"{text.path}: {len(documents)} documents; {2 * FEWEST} are needed. Blank lines "
            "separate the documents of a file, and each file of a folder is one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if text.tokenizer:
        tokenizer = tokenizers.load_tokenizer(text.tokenizer)
    else:
        try:
            tokenizer = tokenizers.train_tokenizer(documents, text.vocabulary - 1)
        except ValueError as error:
            raise ValueError(
                f"{text.path}: too short for language.text.vocabulary={text.vocabulary}, of which "
                f"one word ends documents: {error}"
            ) from error
        write_whole(folder / tokenizers.WHOLE, tokenizer.to_str(), assert_owned)
    encoded = [np.asarray(ids, np.int32) for ids in tokenizers.encode(tokenizer, documents)]
    lengths_D = np.array([len(ids) for ids in encoded], np.int64)
    with replacing(folder / TOKENS, assert_owned) as path, path.open("wb") as file:
        np.savez(file, tokens=np.concatenate(encoded), lengths_D=lengths_D)


@functools.cache
def _packed(section: Config) -> PackedText:
    text, (num_words, length) = section.text, text_sizes(section)
    with np.load(_token_folder(section) / TOKENS) as stored:
        documents = np.split(stored["tokens"], np.cumsum(stored["lengths_D"])[:-1])
    try:
        return pack_parts(
            documents,
            separator=num_words - 1,
            length=length,
            held_out_share=text.held_out_share,
            seed=section.seed,
        )
    except ValueError as error:
        raise ValueError(f"{text.path}: {error}") from error


@functools.cache
def _num_tokens(folder: str) -> int:
    return max(tokenizers.load_tokenizer(folder).get_vocab().values()) + 1
