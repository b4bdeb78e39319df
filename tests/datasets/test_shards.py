"""Data sets on disk: reading by TensorFlow Datasets, and errors after damage."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxflat.datasets import shards
from jaxflat.datasets.reader import open_dataset
from jaxflat.datasets.record_bytes import features_of, layout_of
from jaxflat.storage.files import sha256

TYPES = {
    "tokens": np.dtype((np.int16, (5,))),
    "length": np.dtype(np.int32),
    "state_2.map": np.dtype(np.int16),
    "conditionals": np.dtype((np.float32, (5, 3))),
}
SETTINGS = {"language": {"name": "hmm", "seed": 0}, "seed": 4}
LENGTHS = (40, 40, 13)


def random_columns(num_records: int, types=TYPES, seed: int = 0):
    """Return columns of random bits, with NaN among them."""
    rng = np.random.default_rng(seed)
    return {
        name: np.frombuffer(rng.bytes(num_records * kind.itemsize), kind.base).reshape(
            num_records, *kind.shape
        )
        for name, kind in types.items()
    }


def write_dataset(directory: Path, columns, lengths=LENGTHS, types=TYPES) -> None:
    with shards.claim(directory, SETTINGS):
        layout, start, digests = layout_of(types), 0, []
        for shard, length in enumerate(lengths):
            path = shards.shard_path(directory, "hmm", shard, len(lengths))
            rows = slice(start, start + length)
            shards.write_shard(path, layout, [{name: c[rows] for name, c in columns.items()}])
            digests.append(sha256(path))
            start += length
        shards.finish(directory, "hmm", types, lengths, digests)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert found[name].shape == expected[name].shape
        assert found[name].tobytes() == expected[name].tobytes(), name


@pytest.fixture(scope="module")
def columns():
    return random_columns(sum(LENGTHS))


@pytest.fixture(scope="module")
def dataset_directory(tmp_path_factory, columns):
    directory = tmp_path_factory.mktemp("data") / "set"
    write_dataset(directory, columns)
    return directory


KINDS = st.tuples(
    st.sampled_from([np.int16, np.int32, np.float32]), st.lists(st.integers(1, 70), max_size=2)
)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,9}(\.[a-z]{1,5})?", fullmatch=True), KINDS), st.data()
)
@pytest.mark.slow
def test_records_are_what_tfds_serialises_and_decodes(kinds, data):
    types = {name: np.dtype((kind, tuple(shape))) for name, (kind, shape) in kinds.items()}
    types["length"] = np.dtype(np.int32)
    columns = random_columns(3, types, data.draw(st.integers(0, 99)))
    layout, features = layout_of(types), features_of(types)
    records = layout.encode(columns)
    assert_same(layout.decode(records), columns)
    for place, record in enumerate(records):
        row = {name: column[place] for name, column in columns.items()}
        decoded = {k: np.asarray(v) for k, v in features.deserialize_example_np(record).items()}
        assert_same(decoded, row)
        # TensorFlow Datasets' serialiser does not fix the order of columns.
        theirs = features.serialize_example(row)
        assert sorted(theirs) == sorted(record)


def test_columns_that_do_not_fit_are_refused(columns):
    layout = layout_of(TYPES)
    for wrong, message in (
        ({"length": columns["length"]}, "columns are"),
        (columns | {"tokens": columns["tokens"][:, :4]}, "column tokens has shape"),
        (columns | {"length": columns["length"].astype(np.int64)}, "column length is int64"),
        (columns | {"length": columns["length"][1:]}, "column length has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            layout.encode(wrong)
    with pytest.raises(ValueError, match="other columns"):
        layout_of(TYPES).decode([bytes(len(layout.template))])
    with pytest.raises(ValueError, match="another length"):
        layout.decode([layout.template[:-1]])


def test_tfds_reads_what_was_written(dataset_directory, columns, caplog):
    with caplog.at_level(logging.WARNING):
        source = tfds.builder_from_directory(dataset_directory).as_data_source(split="train")
        assert len(source) == sum(LENGTHS)
        for place in (0, 39, 40, 92):
            found = {name: np.asarray(value) for name, value in source[place].items()}
            assert_same(found, {name: column[place] for name, column in columns.items()})
    assert not caplog.records
    assert (dataset_directory / "hmm-train.array_record-00002-of-00003").exists()


@given(st.lists(st.integers(0, sum(LENGTHS) - 1), min_size=1, max_size=200))
@settings(deadline=None)
def test_read_gives_records_by_number(dataset_directory, columns, ids):
    dataset = open_dataset(dataset_directory)
    assert len(dataset) == sum(LENGTHS)
    assert dataset.settings == SETTINGS
    assert dataset.types == TYPES
    assert_same(dataset.read(np.array(ids)), {name: c[ids] for name, c in columns.items()})


@pytest.mark.parametrize("ids", [[93], [-1], [], [[1]], [0.5]])
def test_ids_out_of_range_are_refused(dataset_directory, ids):
    with pytest.raises(ValueError, match="ids must be"):
        open_dataset(dataset_directory).read(np.array(ids))


def test_sums_are_those_of_all_files(dataset_directory):
    lines = (dataset_directory / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {p.name: p for p in dataset_directory.iterdir() if p.name != "SHA256SUMS"}
    assert sums == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()}


def test_a_directory_of_something_else_is_refused(dataset_directory, tmp_path):
    other = SETTINGS | {"language": {"name": "hmm", "seed": 1}}
    message = r"jaxflat.json is of a data set with language.seed=0, not language.seed=1"
    with pytest.raises(ValueError, match=message), shards.claim(dataset_directory, other):
        pass
    fewer = {"language": SETTINGS["language"]}
    with pytest.raises(ValueError, match="seed=4, not seed=nothing"):
        shards.claim(dataset_directory, fewer).__enter__()
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis.tex is in the way"):
        shards.claim(tmp_path, SETTINGS).__enter__()
    with pytest.raises(ValueError, match="cannot be used"):
        shards.claim(tmp_path / "thesis.tex", SETTINGS).__enter__()
    with (
        shards.claim(dataset_directory, SETTINGS),
        pytest.raises(ValueError, match="another process is building this data set"),
        shards.claim(dataset_directory, SETTINGS),
    ):
        pass


def garbled(content: bytes, how: str, place: float, bit: int) -> bytes | None:
    """Return content with a flipped bit, cut off, blanked, emptied or doubled; None deletes it."""
    at = min(int(place * len(content)), len(content) - 1)
    match how:
        case "flipped":
            return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        case "cut":
            return content[:at]
        case "blanked":
            return content[:at] + bytes(len(content[at : at + 500])) + content[at + 500 :]
        case "doubled":
            return content * 2
    return b"" if how == "emptied" else None


FILES = ("jaxflat.json", "features.json", "dataset_info.json", "SHA256SUMS")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, len(FILES) + len(LENGTHS) - 1),
    st.sampled_from(["flipped", "flipped", "cut", "blanked", "emptied", "doubled", "deleted"]),
    st.floats(0, 1),
    st.integers(0, 7),
)
def test_damage_is_one_line_or_nothing(dataset_directory, columns, file, how, place, bit):
    files = [dataset_directory / name for name in FILES]
    files += sorted(dataset_directory.glob("*.array_record*"))
    content = files[file].read_bytes()
    if file >= len(FILES) and place < 0.9:
        place *= 0.11  # where the records are: the rest of a small shard is padding
    damaged = garbled(content, how, place, bit)
    found, message = None, ""
    try:
        files[file].unlink()
        if damaged is not None:
            files[file].write_bytes(damaged)
        found = open_dataset(dataset_directory).read(np.arange(sum(LENGTHS)))
    except shards.DatasetError as error:
        message = str(error)
    finally:
        files[file].write_bytes(content)
    if found is not None:
        assert_same(found, columns)
    else:
        assert "\n" not in message
        assert files[file].name in message or files[file].name == "SHA256SUMS"
        assert str(dataset_directory) in message


def test_metadata_that_fits_its_sums_but_not_the_shards(dataset_directory, columns, tmp_path):
    def changed(file: str, old: str, new: str) -> Path:
        directory = tmp_path / file
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(dataset_directory, directory)
        text = (directory / file).read_text()
        assert old in text
        (directory / file).write_text(text.replace(old, new))
        sums = (directory / "SHA256SUMS").read_text()
        fresh = sha256(directory / file)
        (directory / "SHA256SUMS").write_text(sums.replace(sha256(dataset_directory / file), fresh))
        return directory

    directory = changed("dataset_info.json", '"13"', '"14"')
    with pytest.raises(ValueError, match=r"00002-of-00003 has 13 whole records; it must have 14"):
        open_dataset(directory)
    directory = changed("features.json", '"int32"', '"int16"')
    with pytest.raises(ValueError, match=r"00000-of-00003: a record has another length"):
        open_dataset(directory).read(np.arange(3))
    directory = changed("features.json", '"bytes"', '"none"')
    with pytest.raises(ValueError, match=r"unusable metadata: the columns are not"):
        open_dataset(directory)
    directory = changed("dataset_info.json", "{", "[")
    with pytest.raises(ValueError, match=r"unusable metadata"):
        open_dataset(directory)


def test_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="none: no such directory"):
        open_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match="SHA256SUMS is missing: no finished data set"):
        open_dataset(tmp_path)
    (tmp_path / "SHA256SUMS").mkdir()
    with pytest.raises(ValueError, match="SHA256SUMS"):
        open_dataset(tmp_path)


def test_metadata_names_no_place_or_time(dataset_directory):
    info = json.loads((dataset_directory / "dataset_info.json").read_text())
    assert info["splits"][0]["shardLengths"] == ["40", "40", "13"]
    assert str(dataset_directory.parent) not in json.dumps(info)
