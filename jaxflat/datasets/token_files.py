"""Texts as token ids, for models whose tokens are their own: .txt by a tokenizer, or .jsonl."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxflat.datasets.text import numbered_lines, read_bytes, read_sentences
from jaxflat.datasets.tokenizer import load_tokenizer


class TokenTexts(NamedTuple):
    """N texts of up to T tokens, int32, 0 beyond lengths_N; bool ordinary_NxT: no special token."""

    tokens_NxT: np.ndarray
    lengths_N: np.ndarray
    ordinary_NxT: np.ndarray


def read_token_texts(
    path: Path, tokenizer_folder: Path, num_tokens: int, max_length: int
) -> TokenTexts:
    """Return the texts of a file, each cut to max_length tokens.

    A .jsonl file has a list of token ids on each line, all of them ordinary; any other is UTF-8
    with a text on each line, for the tokenizer.json of a folder, which also adds special tokens
    and keeps them when it cuts.
    Raises ValueError of one line that names the file, and the line where there is one.
    """
    if path.suffix == ".jsonl":
        texts = _token_lists(path, num_tokens)
        ordinary = [[True] * len(text) for text in texts]
    else:
        sentences = list(read_sentences(path).texts)
        tokenizer = load_tokenizer(tokenizer_folder)
        num_special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if num_special >= max_length:
            raise ValueError(
                f"{tokenizer_folder / 'tokenizer.json'}: adds {num_special} special tokens to a "
                f"text of at most {max_length}"
            )
        tokenizer.enable_truncation(max_length)
        encodings = tokenizer.encode_batch(sentences)
        texts = [encoding.ids for encoding in encodings]
        ordinary = [[not special for special in e.special_tokens_mask] for e in encodings]
        largest = max((max(text, default=0) for text in texts), default=0)
        if largest >= num_tokens:
            raise ValueError(
                f"{tokenizer_folder / 'tokenizer.json'}: makes token {largest}; the model has "
                f"0..{num_tokens - 1}"
            )
    for number, kept in enumerate(ordinary, start=1):
        if not any(kept[:max_length]):
            raise ValueError(f"{path}: text {number} has no tokens but special ones")
    lengths = [min(len(text), max_length) for text in texts]
    tokens_NxT = np.zeros((len(texts), max(lengths)), np.int32)
    ordinary_NxT = np.zeros(tokens_NxT.shape, bool)
    for i, length in enumerate(lengths):
        tokens_NxT[i, :length] = texts[i][:length]
        ordinary_NxT[i, :length] = ordinary[i][:length]
    return TokenTexts(tokens_NxT, np.asarray(lengths, np.int32), ordinary_NxT)


def _token_lists(path: Path, num_tokens: int) -> list[list[int]]:
    texts = []
    for number, line in numbered_lines(read_bytes(path), path):
        try:
            text = json.loads(line)
        except (ValueError, RecursionError):
            text = None
        right = isinstance(text, list) and all(type(t) is int and 0 <= t < num_tokens for t in text)
        if not (right and text):
            wanted = f"a list of token ids in 0..{num_tokens - 1}, such as [5, 17, 3]"
            raise ValueError(f"{path}: line {number} must be {wanted}")
        texts.append(text)
    return texts
