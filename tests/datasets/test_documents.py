"""Documents of a text: how files are cut, split into two parts, and packed into windows."""

import numpy as np
import pytest

from jaxflat.datasets.documents import (
    FEWEST,
    pack,
    pack_parts,
    read_documents,
    split_documents,
)

SEPARATOR = 99


def random_documents(number: int = 40, most: int = 30) -> list[np.ndarray]:
    """Documents of 1 to `most` tokens 0..89."""
    random = np.random.default_rng(0)
    return [random.integers(0, 90, random.integers(1, most + 1)) for _ in range(number)]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("a\nb\n\n \nc\n", ["a\nb", "c"]),  # blank lines separate
        ("a\nb\nc\n", ["a", "b", "c"]),  # no blank line: each line
        ("\n\na b\r\n", ["a b"]),
    ],
)
def test_blank_lines_or_else_lines_separate_the_documents_of_a_file(tmp_path, content, documents):
    file = tmp_path / "my.txt"
    file.write_text(content)
    assert [one.strip() for one in read_documents(file)] == documents


def test_each_text_file_of_a_folder_is_a_document_in_the_order_of_names(tmp_path):
    for name, content in (("b.txt", "x\n\ny\n"), ("a.txt", "z"), ("c.md", "no"), ("d.txt", " \n")):
        (tmp_path / name).write_text(content)
    assert read_documents(tmp_path) == ["z", "x\n\ny"]


def test_parts_have_every_document_once_and_the_share_of_the_tokens():
    lengths_D = np.random.default_rng(1).integers(1, 500, 300)
    training, held_out = split_documents(lengths_D, 0.2, seed=3)
    assert sorted([*training, *held_out]) == list(range(300))
    assert lengths_D[held_out].sum() >= 0.2 * lengths_D.sum() > lengths_D[held_out[:-1]].sum()
    again, other = (split_documents(lengths_D, 0.2, seed=seed)[1] for seed in (3, 4))
    np.testing.assert_array_equal(held_out, again)
    assert set(other) != set(held_out)
    assert len(split_documents(np.array([10**6, *[1] * 99]), 0.001, seed=0)[1]) >= FEWEST


def test_windows_are_the_documents_end_to_end_with_their_owners():
    documents = random_documents()
    windows_NxT, owners_NxT = pack(documents, SEPARATOR, 7)
    stream = [token for one in documents for token in (*one, SEPARATOR)]
    owners = [place for place, one in enumerate(documents) for _ in range(len(one) + 1)]
    assert 0 <= len(stream) - windows_NxT.size < 7  # only an incomplete window is left out
    assert windows_NxT.ravel().tolist() == stream[: windows_NxT.size]
    assert owners_NxT.ravel().tolist() == owners[: windows_NxT.size]


def test_no_document_is_both_held_out_and_trained_on():
    documents = [np.full(5 + i % 4, i) for i in range(60)]  # tokens name their document
    packed = pack_parts(documents, SEPARATOR, length=6, held_out_share=0.3, seed=0)
    trained, held_out = (set(x.ravel()) - {SEPARATOR} for x in packed[:2])
    assert not trained & held_out
    assert len(trained | held_out) >= 58  # the last document of a part may be cut off
    # Each held-out word has the place of its document: in the order of the split, from 0.
    order = split_documents(np.array([len(one) + 1 for one in documents]), 0.3, 0)[1]
    words = packed.held_out_HxT != SEPARATOR
    np.testing.assert_array_equal(order[packed.documents_HxT[words]], packed.held_out_HxT[words])


@pytest.mark.parametrize(
    ("number", "length", "share", "message"),
    [
        (15, 4, 0.1, r"tokens in 15 documents, of which the training part has .* in 7;"),
        (
            40,
            50,
            0.1,
            r"tokens in 40 documents.* held-out part has .* 400 \(8 windows of 50\) in 8",
        ),
        (17, 4, 0.9, r"tokens in 17 documents, of which the training part has .* in [1-7];"),
    ],
)
def test_too_small_a_text_says_what_it_has_and_what_is_needed(number, length, share, message):
    with pytest.raises(ValueError, match=message):
        pack_parts(random_documents(number), SEPARATOR, length=length, held_out_share=share, seed=0)


def test_the_smallest_text_is_enough():
    documents = [np.array([i]) for i in range(2 * FEWEST)]
    packed = pack_parts(documents, SEPARATOR, length=2, held_out_share=0.1, seed=0)
    assert len(packed.training_NxT) == len(packed.held_out_HxT) == FEWEST
