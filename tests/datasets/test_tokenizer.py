"""Tokenizers: every text has tokens, the same ones in every process; and the kept words."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxflat.datasets.tokenizer import (
    encode,
    load_tokenizer,
    most_frequent,
    read_token_texts,
    to_words,
    train_tokenizer,
)

pytest.importorskip("tokenizers")

TEXTS = ["The cat sat on the mat.", "A dog ran; the cat ran.", "the the the", "Café or not?"] * 3
NUM_WORDS = 280


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, NUM_WORDS)


def one_line(error) -> str:
    assert type(error.value) is ValueError
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_every_text_comes_back(tokenizer, text):
    (ids,) = encode(tokenizer, [text])
    assert all(0 <= token < NUM_WORDS for token in ids)
    assert tokenizer.decode(ids).strip() == tokenizer.normalizer.normalize_str(text).strip()
    assert bool(ids) or not text.strip()


def test_case_and_ends_do_not_matter(tokenizer):
    assert encode(tokenizer, ["The CAT "]) == encode(tokenizer, ["the cat"])
    the, cat = (tokenizer.token_to_id(f"Ġ{word}") for word in ("the", "cat"))
    assert encode(tokenizer, ["the cat the"]) == [[the, cat, the]]
    assert tokenizer.get_vocab_size() == NUM_WORDS


def test_pairs_are_encoded_each_half_alone(tokenizer):
    pairs = [("the cat", "a dog"), ("ran", "the mat")]
    flat = encode(tokenizer, ["the cat", "a dog", "ran", "the mat"])
    assert encode(tokenizer, pairs) == [(flat[0], flat[1]), (flat[2], flat[3])]
    assert (
        train_tokenizer(pairs * 9, 257).to_str()
        == train_tokenizer([text for pair in pairs * 9 for text in pair], 257).to_str()
    )
    assert encode(tokenizer, []) == []


SCRIPT = """
import hashlib
import random
from jaxflat.datasets.tokenizer import encode, train_tokenizer
draw = random.Random(0)
words = ["".join(draw.choices("abcdefgh é", k=draw.randint(1, 9))) for _ in range(500)]
texts = [" ".join(draw.choices(words, k=12)) for _ in range(3000)]
tokenizer = train_tokenizer(texts, 1000)
print(hashlib.sha256((tokenizer.to_str() + str(encode(tokenizer, texts))).encode()).hexdigest())
"""


def test_processes_and_threads_do_not_matter():
    """Many merges tie here, and each process has another hash seed."""
    settings = [
        {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "1"},
        {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "2"},
        {"RAYON_NUM_THREADS": "7", "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "3"},
    ]
    digests = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | setting,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for setting in settings
    }
    assert len(digests) == 1


def test_vocabularies_that_cannot_be():
    with pytest.raises(ValueError, match=r"num_words=255 must be at least 256: the bytes"):
        train_tokenizer(TEXTS, 255)
    with pytest.raises(
        ValueError, match=r"num_words=9999 exceeds the \d+ tokens in these texts"
    ) as e:
        train_tokenizer(TEXTS, 9999)
    one_line(e)


def test_a_saved_tokenizer_is_loaded_without_its_padding_and_cutting(tokenizer, tmp_path):
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.enable_padding(length=50)
    copy.enable_truncation(2)
    copy.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), TEXTS) == encode(tokenizer, TEXTS)


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff", b"[1", b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer(tmp_path, raw):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="no such file") as error:
        load_tokenizer(tmp_path)
    assert one_line(error).startswith(f"{path}: ")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="not a tokenizer") as error:
        load_tokenizer(tmp_path)
    assert one_line(error).startswith(f"{path}: ")


OPT = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_prefix_space": False,
    "add_bos_token": True,
    "bos_token": {"content": "</s>", "lstrip": False},
    "eos_token": {"content": "</s>", "lstrip": False},
    "pad_token": "<pad>",
}


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    """A tokenizer as OPT's is published, in vocab.json and merges.txt; and as tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    whole.train_from_iterator(TEXTS, trainer)
    whole.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 2)]
    )
    parts_folder, whole_folder = (tmp_path_factory.mktemp(name) for name in ("parts", "whole"))
    whole.save(str(whole_folder / "tokenizer.json"))
    whole.model.save(str(parts_folder))
    (parts_folder / "tokenizer_config.json").write_text(json.dumps(OPT))
    return parts_folder, whole_folder


STRANGE = [" the cat", "the cat", "Café  \t or 猫?", "a</s>b", "don't I'll 2026"]


def test_vocab_and_merges_make_the_tokens_of_the_same_tokenizer_json(two_folders):
    parts, whole = map(load_tokenizer, two_folders)
    texts = [*TEXTS, *STRANGE]
    assert encode(parts, texts) == encode(whole, texts)
    assert parts.decode_batch(encode(parts, STRANGE[:3])) == STRANGE[:3]
    (spaced, bare) = encode(parts, STRANGE[:2])
    assert spaced != bare  # no space is added before a text
    assert parts.encode("the cat").ids[0] == 2


def test_a_file_of_texts_is_read_alike_from_either_folder(two_folders, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    parts, whole = (read_token_texts(file, folder, 330, 6) for folder in two_folders)
    for found, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (parts.tokens_NxT[:, 0] == 2).all()
    assert not parts.ordinary_NxT[:, 0].any()


def test_without_settings_nothing_is_added(two_folders, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(two_folders[0] / name, tmp_path)
    parts, whole = load_tokenizer(tmp_path), load_tokenizer(two_folders[1])
    assert [parts.encode(text).ids for text in TEXTS] == encode(whole, TEXTS)


MODEL = "vocab.json and merges.txt: not a tokenizer ("
SETTINGS = "tokenizer_config.json: not the settings of a tokenizer"
NEEDS = f"{SETTINGS} (add_bos_token needs bos_token, a token of vocab.json)"


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("vocab.json", b"{", MODEL),
        ("vocab.json", b'["a"]', MODEL),
        ("merges.txt", b"one two three\n", MODEL),
        ("tokenizer_config.json", b"[]", f"{SETTINGS} ("),
        ("tokenizer_config.json", b'{"add_bos_token": true}', NEEDS),
        ("tokenizer_config.json", b'{"add_bos_token": true, "bos_token": "<no>"}', NEEDS),
    ],
)
def test_parts_that_are_no_tokenizer(two_folders, tmp_path, name, raw, message):
    for file in two_folders[0].iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{message}")) as error:
        load_tokenizer(tmp_path)
    one_line(error)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxflat\[huggingface\]'") as error:
        train_tokenizer(TEXTS, NUM_WORDS)
    one_line(error)


def test_most_frequent_breaks_ties_by_id():
    encoded = [[3, 3, 1], ([5, 5], [1]), [2]]
    assert most_frequent(encoded, 7, 4).tolist() == [1, 3, 5, 2]
    assert most_frequent(encoded, 7, 7).tolist() == [1, 3, 5, 2, 0, 4, 6]
    assert most_frequent([], 3, 2).tolist() == [0, 1]
    assert most_frequent(encoded, 7, 4).dtype == np.int32
    with pytest.raises(ValueError, match=r"^token ids are 1\.\.5; a vocabulary of 5 ends at 4$"):
        most_frequent(encoded, 5, 2)
    for num_words in (0, 8):
        with pytest.raises(ValueError, match=rf"^num_words={num_words} must be in 1\.\.7$"):
            most_frequent(encoded, 7, num_words)


def test_words_pads_and_hidden_tokens():
    tokens_NxT, lengths_N = to_words([[9, 4, 7], [4], [9, 9, 9, 9, 9]], np.array([4, 9]), 4)
    assert tokens_NxT.dtype == lengths_N.dtype == np.int32
    np.testing.assert_array_equal(tokens_NxT, [[1, 0, 3, 2], [0, 2, 2, 2], [1, 1, 1, 1]])
    np.testing.assert_array_equal(lengths_N, [3, 1, 4])


def longest_first(first, second, max_length):
    """Cut one token at a time off the longer half, or off the second if they are equal."""
    first, second = list(first), list(second)
    while len(first) + len(second) > max_length:
        (first if len(first) > len(second) else second).pop()
    return first + second


@settings(max_examples=200, deadline=None)
@given(first=st.integers(1, 12), second=st.integers(1, 12), max_length=st.integers(2, 20))
def test_both_halves_of_a_pair_survive(first, second, max_length):
    pair = ([0] * first, [1] * second)
    tokens_1xT, lengths_1 = to_words([pair], np.array([0, 1]), max_length)
    words = tokens_1xT[0, : lengths_1[0]].tolist()
    assert words == longest_first(*pair, max_length)
    assert set(words) == {0, 1}
    assert (tokens_1xT[0, lengths_1[0] :] == 2).all()


def test_sentences_that_cannot_be_words():
    kept_ids_V = np.array([0, 1])
    for encoded, max_length, message in (
        ([[0], []], 4, r"sentence 1 \(from 0\) has no tokens"),
        ([([0], [])], 4, r"sentence 0 \(from 0\) has no tokens"),
        ([[0]], 0, "max_length=0 must be at least 1"),
        ([([0], [1])], 1, "max_length=1 must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            to_words(encoded, kept_ids_V, max_length)
        one_line(error)
    with pytest.raises(ValueError, match="names a token twice"):
        to_words([[0]], np.array([1, 1]), 3)
