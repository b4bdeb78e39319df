"""The film reviews, from an imitation of their archive, and from the archive if present."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxflat.datasets import reviews
from jaxflat.datasets.reviews import read_review_sentiments, read_reviews
from jaxflat.datasets.text import manual_folder

LINES = (
    "1\t2.26666666667\tA ''splash'' even greater.",
    "2\t-0.6\tEffective but too tepid biopic",
    "3\t0.0\tIt is a film.",
    "4\t3.5\tFiancé, I’ve seen\x85 it.",
)
REAL = manual_folder() / reviews.ARCHIVE


def tar(name: str, raw: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.size = kind, len(raw)
        archive.addfile(member, io.BytesIO(raw))
    return buffer.getvalue()


def nested(raw: bytes) -> bytes:
    return tar(reviews.INNER_ARCHIVE, tar(reviews.FILE, raw))


def imitation(lines=LINES) -> bytes:
    return "\r\n".join(lines).encode()


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Write an archive where the reader looks for it; by default the reader expects LINES."""
    folder = manual_folder(tmp_path)
    folder.mkdir(parents=True)

    def write(archive: bytes, expected: bytes | None = None):
        digest = hashlib.sha256(imitation() if expected is None else expected).hexdigest()
        monkeypatch.setattr(reviews, "SHA256", digest)
        monkeypatch.setattr(reviews, "NUM_REVIEWS", len(LINES))
        (folder / reviews.ARCHIVE).write_bytes(archive)
        return tmp_path

    return write


def one_line(error) -> str:
    assert type(error.value) is ValueError
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_sentiments_leave_out_the_neutral_ones(put):
    data_dir = put(nested(imitation()))
    assert len(read_reviews(data_dir).texts) == 4
    assert read_reviews(data_dir).labels_N is None
    examples = read_review_sentiments(data_dir)
    assert examples.texts == (
        "A ''splash'' even greater.",
        "Effective but too tepid biopic",
        "Fiancé, I’ve seen\x85 it.",
    )
    assert examples.labels_N is not None
    assert examples.labels_N.dtype == np.int32
    assert examples.labels_N.tolist() == [1, 0, 1]
    assert examples.label_names == ("negative", "positive")


def test_the_environment_says_where(put, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(put(nested(imitation()))))
    assert len(read_reviews().texts) == 4


def test_absent_it_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="no such file") as error:
        read_reviews(tmp_path)
    assert one_line(error).endswith(f"{reviews.PIP_COMMAND} -d '{manual_folder(tmp_path)}'")


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", r"cannot read vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014"),
        (b"not an archive", r"cannot read vaderSentiment-3.3.2/additional"),
        (nested(imitation())[:200], r"cannot read"),
        (tar("other", b""), r"cannot read vaderSentiment.* \(KeyError\)"),
        (tar(reviews.INNER_ARCHIVE, b"", tarfile.DIRTYPE), r"cannot read .* \(TarError\)"),
        (tar(reviews.INNER_ARCHIVE, b"x"), r"cannot read hutto.* \(ReadError\)"),
        (tar(reviews.INNER_ARCHIVE, tar("x", b"x")), r"cannot read hutto.* \(KeyError\)"),
        (nested(imitation(LINES[1:])), "is damaged or another version"),
        (nested(b""), "is damaged or another version"),
    ],
    ids=lambda value: "archive" if isinstance(value, bytes) else value,  # gzip has the time
)
def test_another_archive_is_refused(put, archive, message):
    with pytest.raises(ValueError, match=message) as error:
        read_reviews(put(archive))
    assert f"{reviews.ARCHIVE}: " in one_line(error)
    assert "delete it and fetch it again with: pip download" in one_line(error)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES[1:], r"has 3 reviews, not 4"),
        ((*LINES[:1], "2\t-0.6", *LINES[2:]), r"line 2: the number of fields is 2, not 3"),
        ((*LINES[:3], "4\tgood\ta"), r"line 4: 'good' is not a rating"),
        ((*LINES[:3], "4\t1.0\t "), r"line 4: the text is empty"),
    ],
)
def test_a_file_of_another_form_is_refused(put, lines, message):
    raw = imitation(lines)
    with pytest.raises(ValueError, match=message) as error:
        read_reviews(put(nested(raw), expected=raw))
    one_line(error)


ARCHIVE = nested(imitation())


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(ARCHIVE) - 1), st.integers(0, 9), st.binary(max_size=9)),
        min_size=1,
        max_size=3,
    )
)
def test_damaged_archives_are_refused_or_read_right(put, edits):
    raw = ARCHIVE
    for start, length, piece in edits:
        raw = raw[:start] + piece + raw[start + length :]
    data_dir = put(raw)
    try:
        texts, refusal = read_reviews(data_dir).texts, None
    except ValueError as error:
        texts, refusal = None, error
    if refusal is None:
        assert texts == tuple(line.split("\t")[2] for line in LINES)
    else:
        assert type(refusal) is ValueError
        assert len(str(refusal).splitlines()) == 1
        assert f"{reviews.ARCHIVE}: " in str(refusal)


@pytest.mark.skipif(
    not REAL.is_file(),
    reason=f"{REAL} is missing: {reviews.PIP_COMMAND} -d '{REAL.parent}'",
)
def test_the_archive_itself():
    everything = read_reviews()
    assert len(everything.texts) == 10_605
    assert everything.texts[2] == "Effective but too tepid biopic"
    examples = read_review_sentiments()
    assert examples.labels_N is not None
    np.testing.assert_array_equal(np.bincount(examples.labels_N), [5_326, 5_242])
    assert examples.labels_N[everything.texts.index("Effective but too tepid biopic")] == 0
    lengths = np.array([len(text.split()) for text in everything.texts])
    assert (lengths.min(), np.median(lengths), lengths.max()) == (1, 18, 51)
