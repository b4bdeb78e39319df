"""Token ids of texts, from a file or by a tokenizer, and one line about bad input."""

import json

import numpy as np
import pytest

from jaxflat.datasets.tokenizer import read_token_texts
from tests.support.tiny_checkpoints import CLS, SEP, write_tokenizer


def test_lists_of_tokens_are_read_as_they_are_and_cut(tmp_path):
    texts = [[5, 0, 7], [1], [2, 2, 2, 2, 6]]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    read = read_token_texts(path, tmp_path / "no folder", num_tokens=8, max_length=4)
    np.testing.assert_array_equal(read.lengths_N, [3, 1, 4])
    np.testing.assert_array_equal(read.tokens_NxT, [[5, 0, 7, 0], [1, 0, 0, 0], [2, 2, 2, 2]])
    real_NxT = np.arange(4)[None] < np.array([[3], [1], [4]])
    np.testing.assert_array_equal(read.ordinary_NxT, real_NxT)
    assert read.tokens_NxT.dtype == read.lengths_N.dtype == np.int32


def test_texts_are_tokens_between_marks_that_a_cut_leaves_in_place(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("the cat sat\r\ncat\n[MASK] on the cat sat on the cat\n")
    read = read_token_texts(path, write_tokenizer(tmp_path), num_tokens=8, max_length=5)
    np.testing.assert_array_equal(read.lengths_N, [5, 3, 5])
    expected = [[CLS, 4, 5, 6, SEP], [CLS, 5, SEP, 0, 0], [CLS, 3, 7, 4, SEP]]
    np.testing.assert_array_equal(read.tokens_NxT, expected)
    ordinary_NxT = [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0]]
    np.testing.assert_array_equal(read.ordinary_NxT, np.array(ordinary_NxT, bool))


def refusal(path, folder, num_tokens=8, max_length=5):
    with pytest.raises(ValueError, match=r".") as caught:
        read_token_texts(path, folder, num_tokens, max_length)
    (line,) = str(caught.value).splitlines()
    return line


WANTED = "line 2 must be a list of token ids in 0..7, such as [5, 17, 3]"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]\n[1, 8]\n", WANTED),
        (b"[1]\n[1, -1]\n", WANTED),
        (b"[1]\n[1\n", WANTED),
        (b"[1]\n[]\n", WANTED),
        (b"[1]\n\n", WANTED),
        (b"[1]\n[1.0]\n", WANTED),
        (b"[1]\n[true]\n", WANTED),
        (b'[1]\n{"tokens": [1]}\n', WANTED),
        (b"[1]\n" + 100_000 * b"[", WANTED),
        (b"[1]\n\xff\n", "line 2 is not UTF-8"),
        (b"", "the file is empty"),
    ],
)
def test_a_damaged_list_is_one_line_that_names_the_line(tmp_path, content, said):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    assert refusal(path, tmp_path).startswith(f"{path}: {said}")


def test_what_a_tokenizer_cannot_do_is_one_line(tmp_path):
    path = tmp_path / "texts.txt"
    assert refusal(path, tmp_path) == f"{path}: no such file"
    path.write_text("the cat\n~ ~\n")
    file = tmp_path / "tokenizer.json"
    assert refusal(path, tmp_path).startswith(f"{file}: no such file")
    write_tokenizer(tmp_path)
    assert refusal(path, tmp_path) == f"{path}: text 2 has only special tokens"
    assert refusal(path, tmp_path, max_length=2) == (
        f"{file}: adds 2 special tokens, but a text has at most 2"
    )
    path.write_text("the cat\n")
    assert refusal(path, tmp_path, num_tokens=5) == (f"{file}: makes token 5; the model has 0..4")
    assert refusal(tmp_path, tmp_path) == f"{tmp_path}: Is a directory"
