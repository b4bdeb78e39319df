"""From texts to the words of a language: tokens of a tokenizer, the most frequent of them kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Token ids of a sentence, or of each half of a pair.
TokenIds = list[int] | tuple[list[int], list[int]]
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str | tuple[str, str]], num_words: int) -> Tokenizer:
    """Return a byte-pair tokenizer with `num_words` tokens, the same one for the same texts.

    Texts are lower-cased (small vocabularies have no room for two spellings of a word) and their
    ends stripped. Pieces start from single bytes, so that every text has tokens and there is no
    "unknown"; a token that starts a word carries the space before it. No special tokens.
    Raises ValueError where num_words is below 256, the bytes, or above what the texts have.
    """
    tokenizers = _tokenizers()
    if num_words < NUM_BYTES:
        raise ValueError(f"num_words={num_words} must be at least {NUM_BYTES}: the bytes")
    normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_words,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_flat(texts), trainer)
    if (found := tokenizer.get_vocab_size()) != num_words:
        raise ValueError(f"num_words={num_words} is more than the {found} these texts have")
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the Hugging Face tokenizer of <folder>/tokenizer.json, without padding or cutting.

    Raises ValueError of one line where the file is missing or is no tokenizer.
    """
    tokenizers = _tokenizers()
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it must be a folder with a tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # The library raises Exception itself.
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a tokenizer ({cause})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: Sequence[str] | Sequence[tuple[str, str]]
) -> list[list[int]] | list[tuple[list[int], list[int]]]:
    """Return token ids of each sentence, or (first, second) of each pair; no special tokens."""
    encodings = tokenizer.encode_batch(list(_flat(texts)), add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    if texts and isinstance(texts[0], tuple):
        return list(zip(ids[::2], ids[1::2], strict=True))
    return ids


def most_frequent(
    encoded: Iterable[TokenIds], num_tokens_in_vocabulary: int, num_words: int
) -> np.ndarray:
    """Return ids_V: the V = num_words tokens that occur most, the most frequent first.

    Ties go to the smaller id; tokens that never occur come last. An "unknown" token of a loaded
    tokenizer counts like any other.
    Raises ValueError where num_words or a token id is outside the vocabulary.
    """
    if not 0 < num_words <= num_tokens_in_vocabulary:
        raise ValueError(f"num_words={num_words} must be in 1..{num_tokens_in_vocabulary}")
    halves = [ids for item in encoded for ids in _halves(item)]
    token_ids = np.fromiter(itertools.chain.from_iterable(halves), np.int64)
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < num_tokens_in_vocabulary:
        raise ValueError(
            f"token ids are {token_ids.min()}..{token_ids.max()}; a vocabulary of "
            f"{num_tokens_in_vocabulary} ends at {num_tokens_in_vocabulary - 1}"
        )
    counts = np.bincount(token_ids, minlength=num_tokens_in_vocabulary)
    return np.argsort(-counts, kind="stable")[:num_words].astype(np.int32)


def to_words(
    encoded: Sequence[TokenIds], kept_ids_V: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens_NxT, lengths_N), int32, with T = max_length: token kept_ids_V[v] is word v.

    Pads are V. A token that is not kept becomes V+1, the mask: the sentence keeps its length and
    the model sees that a word is there but not which. Sentences are cut at their end. A pair is
    the first sentence, then the second, nothing between; when too long the longer one is cut, and
    once they are equally long both are.
    Raises ValueError naming the sentence where one has no tokens.
    """
    kept_ids_V = np.asarray(kept_ids_V)
    V = len(kept_ids_V)
    if len(set(kept_ids_V.tolist())) < V:
        raise ValueError("kept_ids_V names a token twice")
    word_of = {int(token): word for word, token in enumerate(kept_ids_V)}
    tokens_NxT = np.full((len(encoded), max_length), V, np.int32)
    lengths_N = np.zeros(len(encoded), np.int32)
    for place, item in enumerate(encoded):
        halves = _halves(item)
        if not all(halves):
            raise ValueError(f"sentence {place} (from 0) has no tokens")
        if max_length < len(halves):
            raise ValueError(f"max_length={max_length} must be at least {len(halves)}")
        words = [word_of.get(token, V + 1) for token in _cut(halves, max_length)]
        tokens_NxT[place, : len(words)] = words
        lengths_N[place] = len(words)
    return tokens_NxT, lengths_N


def _cut(halves: Sequence[list[int]], max_length: int) -> list[int]:
    if len(halves) == 1:
        return halves[0][:max_length]
    first, second = halves
    num_second = min(len(second), max(max_length // 2, max_length - len(first)))
    return first[: max_length - num_second] + second[:num_second]


def _halves(item: TokenIds) -> Sequence[list[int]]:
    return item if isinstance(item, tuple) else (item,)


def _flat(texts: Iterable[str | tuple[str, str]]) -> Iterable[str]:
    for text in texts:
        yield from text if isinstance(text, tuple) else (text,)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "the package tokenizers is missing: pip install 'jaxflat[huggingface]'"
        ) from None
    return tokenizers
