"""A text file or folder as documents; their split into two parts, and each part as windows."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxflat.datasets.order import example_ids
from jaxflat.datasets.text import numbered_lines, read_bytes

FEWEST = 8  # documents, and windows, of each part: errors are over held-out documents


class PackedText(NamedTuple):
    """The training windows, and the held-out windows with the document of each token, from 0."""

    training_NxT: np.ndarray
    held_out_HxT: np.ndarray
    documents_HxT: np.ndarray


def text_files(path: str | Path) -> list[Path]:
    """Return the file, or the .txt files of a folder by name; ValueError if there is none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path.absolute()}: no such file or folder")
    if not (files := sorted(path.glob("*.txt"))):
        raise ValueError(f"{path}: the folder has no .txt file")
    return files


def read_documents(path: str | Path) -> list[str]:
    """Return the documents of a UTF-8 file, or of the .txt files of a folder.

    Each file of a folder is a document. Blank lines separate the documents of a single file; if it
    has none, each line is a document. Raises ValueError of one line with the file and the line.
    """
    by_file = [
        [line for _, line in numbered_lines(read_bytes(file), file)] for file in text_files(path)
    ]
    if Path(path).is_dir():
        blocks = ["\n".join(lines) for lines in by_file]
    else:
        (lines,) = by_file
        groups = groupby(lines, lambda line: bool(line.strip()))
        blocks = ["\n".join(block) for has_words, block in groups if has_words]
        blocks = lines if len(blocks) == 1 else blocks
    return [block for block in blocks if block.strip()]


def split_documents(
    lengths_D: np.ndarray, held_out_share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (training ids ascending, held-out ids in random order); the seed decides them.

    Whole documents are held out until they have the share of the tokens, and at least FEWEST.
    lengths_D: tokens of each document.
    """
    order_D = example_ids(seed, 0, len(lengths_D), len(lengths_D))
    before_D = np.cumsum(lengths_D[order_D]) - lengths_D[order_D]
    enough_D = (before_D >= held_out_share * lengths_D.sum()) & (np.arange(len(order_D)) >= FEWEST)
    number = int(enough_D.argmax()) if enough_D.any() else len(order_D)
    return np.sort(order_D[number:]), order_D[:number]


def pack(
    documents: Sequence[np.ndarray], separator: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (windows_NxT, owners_NxT), int32: the documents end to end, cut every T = length.

    A separator follows each document and belongs to it. Tokens that fill no window are left out.
    owners_NxT: the place in `documents` of each token's document.
    """
    lengths_D = [len(document) + 1 for document in documents]
    tokens = np.concatenate([part for one in documents for part in (one, [separator])])
    owners = np.repeat(np.arange(len(documents)), lengths_D)
    num_used = len(tokens) // length * length
    windows_NxT, owners_NxT = (
        x[:num_used].reshape(-1, length).astype(np.int32) for x in (tokens, owners)
    )
    return windows_NxT, owners_NxT


def pack_parts(
    documents: Sequence[np.ndarray],
    separator: int,
    *,
    length: int,
    held_out_share: float,
    seed: int,
) -> PackedText:
    """Split documents of tokens, and pack each part into windows of `length` tokens.

    Raises ValueError of one line if a part has fewer than FEWEST documents or windows.
    """
    lengths_D = np.array([len(document) + 1 for document in documents], np.int64)
    parts = split_documents(lengths_D, held_out_share, seed)
    for name, part in zip(("training", "held-out"), parts, strict=True):
        if len(part) < FEWEST or lengths_D[part].sum() < FEWEST * length:
            raise ValueError(
                f"{lengths_D.sum():,} tokens in {len(lengths_D):,} documents, of which the {name} "
                f"part has {lengths_D[part].sum():,} in {len(part):,}; it needs at least "
                f"{FEWEST * length:,} ({FEWEST} windows of {length}) in {FEWEST}"
            )
    (training_NxT, _), held_out = (
        pack([documents[d] for d in part], separator, length) for part in parts
    )
    return PackedText(training_NxT, *held_out)
