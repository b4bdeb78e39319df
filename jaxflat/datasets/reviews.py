"""10,605 sentences of film reviews with sentiment ratings, for machines without a network.

Hutto and Gilbert collected the ratings for VADER (ICWSM 2014). The source archive of the package
vaderSentiment 3.3.2 has them. Pang and Lee took the sentences from rottentomatoes.com.
"""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np

from jaxflat.datasets.text import (
    Examples,
    manual_folder,
    numbered_lines,
    read_bytes,
    require_text,
    split_fields,
)

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
NUM_REVIEWS = 10_605
PIP_COMMAND = "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2"


def read_reviews(data_dir: str | Path | None = None) -> Examples:
    """Return all 10,605 sentences, without labels; arguments as in `read_review_sentiments`."""
    texts, _ = _texts_and_ratings(data_dir)
    return Examples("reviews", texts)


def read_review_sentiments(data_dir: str | Path | None = None) -> Examples:
    """Return the 10,568 sentences whose mean rating is negative (5,326) or positive (5,242).

    Each mean is over about 20 ratings from -4 to 4. The 37 sentences with mean 0 are excluded.
    data_dir: TFDS's directory; the archive belongs in its downloads/manual.
    Raises ValueError of one line if the archive is missing or damaged, with the command to fetch
    it.
    """
    texts, ratings_N = _texts_and_ratings(data_dir)
    rated_N = ratings_N != 0
    return Examples(
        name="reviews",
        texts=tuple(text for text, rated in zip(texts, rated_N, strict=True) if rated),
        labels_N=(ratings_N[rated_N] > 0).astype(np.int32),
        label_names=("negative", "positive"),
    )


def _texts_and_ratings(data_dir: str | Path | None) -> tuple[tuple[str, ...], np.ndarray]:
    folder = manual_folder(data_dir)
    path = folder / ARCHIVE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; fetch it with: {PIP_COMMAND} -d '{folder}'")
    raw = _nested_file(read_bytes(path), path)
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise ValueError(f"{path}: {FILE} in it is damaged or another version; {_again(folder)}")
    texts, ratings = [], []
    for number, line in numbered_lines(raw, f"{path}: {FILE}"):
        where = f"{path}: {FILE}: line {number}"
        _, rating, text = split_fields(line, 3, where)
        texts.append(require_text(text, where))
        try:
            ratings.append(float(rating))
        except ValueError:
            raise ValueError(f"{where}: {rating[:40]!r} is not a rating") from None
    if len(texts) != NUM_REVIEWS:
        raise ValueError(f"{path}: {FILE} has {len(texts)} reviews, not {NUM_REVIEWS}")
    return tuple(texts), np.array(ratings)


def _nested_file(archive: bytes, path: Path) -> bytes:
    """Return the reviews' file from the inner archive, all in memory."""
    raw = archive
    for member in (INNER_ARCHIVE, FILE):
        try:
            with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as files:
                file = files.extractfile(member)
                if file is None:
                    raise tarfile.TarError("not a file")
                raw = file.read()
        except Exception as error:  # tarfile, gzip and zlib raise many classes on damage.
            raise ValueError(
                f"{path}: cannot read {member} in it ({type(error).__name__}); "
                f"{_again(path.parent)}"
            ) from error
    return raw


def _again(folder: Path) -> str:
    return f"delete it and fetch it again with: {PIP_COMMAND} -d '{folder}'"
