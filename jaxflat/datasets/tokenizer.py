"""Texts as token ids: tokenizers, files of token ids, and the kept tokens as a language's words."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxflat.datasets.text import numbered_lines, read_bytes, read_sentences

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Token ids of a sentence, or of each half of a pair.
TokenIds = list[int] | tuple[list[int], list[int]]
NUM_BYTES = 256
WHOLE = "tokenizer.json"
PARTS = VOCABULARY, MERGES, SETTINGS = "vocab.json", "merges.txt", "tokenizer_config.json"


class TokenTexts(NamedTuple):
    """N texts of up to T tokens, int32, 0 beyond lengths_N; ordinary_NxT: no special token."""

    tokens_NxT: np.ndarray
    lengths_N: np.ndarray
    ordinary_NxT: np.ndarray


def train_tokenizer(texts: Iterable[str | tuple[str, str]], num_words: int) -> Tokenizer:
    """Return a byte-pair tokenizer with `num_words` tokens, the same one for the same texts.

    Texts are lower-cased, because a small vocabulary has no room for two spellings of a word, and
    stripped. The first 256 tokens are the single bytes, so every text has tokens and there is no
    "unknown". A token that starts a word includes the space before it. No special tokens.
    Raises ValueError if num_words is below 256 or above the number of tokens in the texts.
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
        raise ValueError(f"num_words={num_words} exceeds the {found} tokens in these texts")
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder, without padding or cutting.

    It is in tokenizer.json. If there is none, it is the byte-pair tokenizer of GPT-2 and OPT, whose
    tokens are in vocab.json and merges.txt. Raises ValueError of one line if the files are missing
    or are no tokenizer.
    """
    path, tokenizers = tokenizer_file(Path(folder)), _tokenizers()
    if path.name == WHOLE:
        with _named_in_errors(f"{path}: not a tokenizer"):
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    else:
        merges, settings = path.with_name(MERGES), path.with_name(SETTINGS)
        with _named_in_errors(f"{path} and {merges.name}: not a tokenizer"):
            tokenizer = tokenizers.Tokenizer(
                tokenizers.models.BPE.from_file(str(path), str(merges))
            )
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        with _named_in_errors(f"{settings}: not the settings of a tokenizer"):
            _set_up(tokenizer, settings)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer.json of a folder or, if there is none, the vocab.json.

    Raises ValueError of one line if the folder has no tokenizer.
    """
    if (whole := folder / WHOLE).is_file():
        return whole
    vocabulary, merges = folder / VOCABULARY, folder / MERGES
    if vocabulary.is_file() and merges.is_file():
        return vocabulary
    raise ValueError(
        f"{whole}: no such file; it must be a folder with a tokenizer.json, or with a vocab.json "
        "and a merges.txt"
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that `load_tokenizer` reads; the settings may be missing.

    Raises ValueError of one line if the folder has no tokenizer.
    """
    names = (WHOLE,) if tokenizer_file(folder).name == WHOLE else PARTS
    return [folder / name for name in names]


def _set_up(tokenizer: Tokenizer, path: Path) -> None:
    """Apply a tokenizer_config.json: special tokens, and what precedes a text; OPT has </s>.

    Raises ValueError if the token that precedes a text is not known.
    """
    tokenizers = _tokenizers()
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=settings.get("add_prefix_space", False)
    )
    special: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if token := settings.get(key):
            special[key] = token["content"] if isinstance(token, dict) else token
    known = [token for token in special.values() if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(known)
    if settings.get("add_bos_token", False):
        first = special.get("bos_token")
        if first not in known:
            raise ValueError("add_bos_token needs bos_token, a token of vocab.json")
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A",
            special_tokens=[(first, tokenizer.token_to_id(first))],
        )


@contextmanager
def _named_in_errors(fault: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # The library raises the class Exception.
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{fault} ({cause})") from error


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
    """Return ids_V of the V = num_words most frequent tokens, the most frequent first.

    Equally frequent tokens are in the order of their ids. A loaded tokenizer's "unknown" token
    counts like any other.
    Raises ValueError if num_words or a token id is outside the vocabulary.
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

    Pads are V. A token that is not kept becomes V+1, the mask, so the sentence keeps its length and
    the model sees a hidden word there. Sentences are cut at their end. A pair is the first
    sentence, then the second, without a separator. If a pair is too long, the longer sentence is
    cut until both are equally long; then both are cut.
    Raises ValueError with the number of a sentence that has no tokens.
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


def read_token_texts(
    path: Path, tokenizer_folder: Path, num_tokens: int, max_length: int
) -> TokenTexts:
    """Return the texts of a file, each cut to max_length tokens.

    A .jsonl file has a list of token ids on each line, all of them ordinary. Any other file is
    UTF-8 with a text on each line. The folder's tokenizer encodes it, adds special tokens, and
    keeps them when it cuts a text.
    Raises ValueError of one line with the file, and the line if the error is in one.
    """
    if path.suffix == ".jsonl":
        texts = _token_lists(path, num_tokens)
        ordinary = [[True] * len(text) for text in texts]
    else:
        sentences = list(read_sentences(path).texts)
        tokenizer, file = load_tokenizer(tokenizer_folder), tokenizer_file(tokenizer_folder)
        num_special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if num_special >= max_length:
            raise ValueError(
                f"{file}: adds {num_special} special tokens, but a text has at most {max_length}"
            )
        tokenizer.enable_truncation(max_length)
        encodings = tokenizer.encode_batch(sentences)
        texts = [encoding.ids for encoding in encodings]
        ordinary = [[not special for special in e.special_tokens_mask] for e in encodings]
        largest = max((max(text, default=0) for text in texts), default=0)
        if largest >= num_tokens:
            raise ValueError(f"{file}: makes token {largest}; the model has 0..{num_tokens - 1}")
    for number, kept in enumerate(ordinary, start=1):
        if not any(kept[:max_length]):
            raise ValueError(f"{path}: text {number} has only special tokens")
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
