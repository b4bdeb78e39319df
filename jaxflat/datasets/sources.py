"""Sources of text by name: film reviews, GLUE, or the user's own file."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxflat.datasets.glue import load_glue
from jaxflat.datasets.reviews import read_review_sentiments, read_reviews
from jaxflat.datasets.text import Examples, read_sentences, read_table
from jaxflat.storage.files import sha256

GLUE = ("sst2", "qnli")
NAMED = ("reviews", *GLUE)
"""The sources that are no files of the user."""

Texts = Sequence[str] | Sequence[tuple[str, str]]


def read_texts(name: str, folder: str) -> Texts:
    """Return the sentences of a source: reviews, sst2, qnli, or a path to a .txt or .tsv file."""
    if name == "reviews":
        return read_reviews(folder or None).texts
    if name.endswith(".txt"):
        return read_sentences(Path(name)).texts
    if name.endswith(".tsv"):
        return read_table(Path(name), ("sentence",)).texts
    return read_labelled(name, folder).texts


def read_labelled(name: str, folder: str) -> Examples:
    """Return labelled sentences: reviews, sst2, qnli, or a .tsv file with sentence and label."""
    if name == "reviews":
        return read_review_sentiments(folder or None)
    if name in GLUE:
        return load_glue(name, "train", folder or None)
    if name.endswith(".tsv"):
        return read_table(Path(name), ("sentence",), "label", ("0", "1"), ("0", "1"))
    raise ValueError(
        f"{name!r} is no source of labelled text: give reviews, {', '.join(GLUE)}, or a .tsv file "
        "(unlabelled text may be a .txt file)"
    )


def split_pairs(texts: Iterable[str | tuple[str, str]]) -> list[str]:
    """Return the sentences as one list, in which each pair becomes two sentences."""
    return [part for text in texts for part in ((text,) if isinstance(text, str) else text)]


def file_digest(path: str) -> str:
    """Return a hash of the content of the user's file, or "" if `path` is no file."""
    if not path or not Path(path).is_file():
        return ""
    found = Path(path).stat()
    return _digest(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(256)
def _digest(path: str, changed: int, size: int) -> str:
    return sha256(Path(path))
