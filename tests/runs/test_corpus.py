"""Stored sentences: their order, and runs that train on them with several words masked."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat.console import Display
from jaxflat.datasets.order import example_ids
from jaxflat.datasets.reader import open_dataset
from jaxflat.languages.batches import Source, source_batch
from jaxflat.runs import builders, corpus
from jaxflat.runs.languages import make_language
from jaxflat.sweeps import sweep
from tests.support.counts import FULL
from tests.support.sweeps import tiny_config
from tests.sweeps.test_sweep import contents, modified, saved_arrays

pytestmark = pytest.mark.slow

NUM_STORED, BATCH_SIZE = 64, 8
POINTS = [{}]


def stored_config() -> ConfigDict:
    """Every epoch has eight steps, the run sixteen and an anneal; two words are masked."""
    config = tiny_config()
    config.language.update({"stored_sentences": NUM_STORED, "masking": "share"})
    config.language.hmm.update({"length": 12, "min_length": 10})
    config.flatness.measures = ("hessian_trace",)
    return config


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    config = stored_config()
    config.language.data_dir = str(tmp_path_factory.mktemp("data"))
    section = FrozenConfigDict(config).language
    with Display(1) as display:
        corpus.prepare_language(section, display)
    return section


def rows_of(sentences) -> list[tuple[int, ...]]:
    """Return the words and the length of each sentence, in order."""
    tokens_NxT = np.asarray(sentences.tokens_BxT).reshape(-1, sentences.tokens_BxT.shape[-1])
    lengths_N = np.asarray(sentences.lengths_B).reshape(-1, 1)
    return list(map(tuple, np.concatenate([tokens_NxT, lengths_N], axis=1).tolist()))


def stored_rows(section, seed: int, step: int, num_steps: int) -> list[tuple[int, ...]]:
    return rows_of(corpus.stored_sentences(section, seed, step, num_steps, BATCH_SIZE))


def folders(section) -> list[Path]:
    return sorted(Path(section.data_dir).glob("jaxflat/*-*"))


@pytest.fixture(scope="module")
def all_rows(section) -> list[tuple[int, ...]]:
    (folder,) = folders(section)
    columns = open_dataset(folder).read(np.arange(NUM_STORED))
    both = np.concatenate([columns["tokens"], columns["length"][:, None]], axis=1)
    return list(map(tuple, both.tolist()))


def test_every_epoch_visits_every_stored_sentence_once_in_an_order_of_its_own(section, all_rows):
    steps = NUM_STORED // BATCH_SIZE
    epochs = [stored_rows(section, 3, epoch * steps, steps) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(all_rows)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stored_rows(section, 4, 0, steps) != epochs[0]


def test_a_steps_batch_is_a_function_of_the_seed_and_the_step(section, all_rows):
    together = stored_rows(section, 5, 2, 9)
    apart = [row for step in range(2, 11) for row in stored_rows(section, 5, step, 1)]
    assert together == apart
    assert together[:24] == stored_rows(section, 5, 2, 3)
    ids_B = example_ids(5, 10, BATCH_SIZE, NUM_STORED)
    assert together[-BATCH_SIZE:] == [all_rows[i] for i in ids_B]


@pytest.mark.parametrize(("masking", "number"), [("one", 1), ("share", 2)])
def test_batches_are_masked_stored_sentences(section, masking, number):
    language = make_language(section)
    stored = corpus.stored_sentences(section, 0, 4, 3, BATCH_SIZE)
    assert stored.tokens_BxT.dtype == stored.lengths_B.dtype == np.int32
    source, key = Source(language, stored), jax.random.key(0)
    for index in range(3):
        batch = source_batch(source, key, np.int32(index), BATCH_SIZE, "sampled", masking)
        hidden_BxT = np.asarray(batch.inputs_BxT) == language.num_words + 1
        expected_BxT = np.where(hidden_BxT, language.num_words + 1, stored.tokens_BxT[index])
        np.testing.assert_array_equal(batch.inputs_BxT, expected_BxT)
        np.testing.assert_array_equal(hidden_BxT.sum(axis=1), number)
        np.testing.assert_array_equal(batch.lengths_B, stored.lengths_B[index])


def test_stored_sentences_are_new_samples_of_the_language(section, all_rows):
    evaluated = make_language(section).sample(
        builders.purpose_key(section.seed, "evaluation"), NUM_STORED
    )
    assert all_rows != rows_of(evaluated)
    language, lengths = section.hmm, {row[-1] for row in all_rows}
    assert lengths == set(range(language.min_length, language.length + 1))
    for *words, length in all_rows:
        assert all(0 <= word < language.num_words for word in words[:length])
        assert words[length:] == [language.num_words] * (language.length - length)


@pytest.mark.parametrize(
    ("key", "value"), [("hmm.num_states", 4), ("seed", 1), ("stored_sentences", 72)]
)
def test_another_language_has_another_folder(section, all_rows, key, value):
    def prepared(changes: dict[str, Any]) -> list[Path]:
        config = ConfigDict(section.to_dict())
        config.update_from_flattened_dict(changes)
        with Display(1) as display:
            corpus.prepare_language(FrozenConfigDict(config), display)
        return folders(section)

    before = folders(section)
    shards = modified(Path(section.data_dir), "jaxflat/*/*array_record*")
    # Masking and the settings of other languages do not change the stored sentences.
    assert prepared({"masking": "one", "dyck.length": 6}) == before
    after = prepared({key: value})
    assert len(after) == len(before) + 1
    assert set(before) < set(after)
    assert {path.name.partition("-")[0] for path in after} == {"hmm"}
    now = modified(Path(section.data_dir), "jaxflat/*/*array_record*")
    assert {path: now[path] for path in shards} == shards


def test_another_grammar_in_the_same_file_has_another_folder(tmp_path):
    config, path = tiny_config(), tmp_path / "grammar.txt"
    config.language.update({"name": "grammar_file", "stored_sentences": 64})
    config.language.data_dir = str(tmp_path)
    config.language.grammar_file.update({"path": str(path), "length": 2, "tasks": ((),)})
    section = FrozenConfigDict(config).language
    for count, p in ((1, 0.9), (2, 0.1)):
        path.write_text(f"S A A 0.5\nS a 0.5\nA a {p}\nA b {1 - p}\n")
        with Display(1) as display:
            corpus.prepare_language(section, display)
        assert len(folders(section)) == count


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on stored sentences: (its work directory, TensorFlow Datasets' folder)."""
    workdir, data = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(data))
        assert sweep.run(stored_config(), POINTS, workdir) == {}
    return workdir, data


def assert_same(workdir: Path, other: Path) -> None:
    assert contents(workdir) == contents(other)
    arrays, others = saved_arrays(workdir), saved_arrays(other)
    assert arrays.keys() == others.keys()
    assert len(arrays) == 3 + 1 + 1  # checkpoints, a projection, the last training state
    jax.tree.map(np.testing.assert_array_equal, arrays, others)


def test_from_stored_sentences_with_two_words_masked_to_results(finished, monkeypatch):
    workdir, data = finished
    (folder,) = data.glob("jaxflat/hmm-*")
    assert len(open_dataset(folder)) == NUM_STORED
    with (workdir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 + 1  # a projection
    for row in rows:
        assert float(row["excess_loss"]) > 0
        assert float(row["hessian_trace"]) != 0
        assert 0 < float(row["linear_probe/state_2.map/16"]) <= 1
        assert row["optimal_loss"] == rows[0]["optimal_loss"]
        # The loss is the optimum plus the excess, up to the noise of the sampled words.
        parts = float(row["optimal_loss"]) + float(row["excess_loss"])
        assert abs(float(row["loss"]) - parts) < 5 * float(row["loss_sem"])
    monkeypatch.setenv("TFDS_DATA_DIR", str(data))
    before = modified(data, "**/*") | modified(workdir, "**/*.jsonl")
    assert sweep.run(stored_config(), POINTS, workdir) == {}
    assert modified(data, "**/*") | modified(workdir, "**/*.jsonl") == before


def test_a_second_run_reads_what_the_first_one_stored(finished, tmp_path, monkeypatch):
    workdir, data = finished
    monkeypatch.setenv("TFDS_DATA_DIR", str(data))
    before = modified(data, "**/*array_record*")
    assert len(before) == 16
    monkeypatch.setattr(corpus, "columns_of", None)
    assert sweep.run(stored_config(), POINTS, tmp_path) == {}
    assert modified(data, "**/*array_record*") == before
    assert_same(tmp_path, workdir)


def test_interrupted_while_storing_and_training_ends_bitwise_the_same(
    finished, tmp_path, monkeypatch
):
    """Deaths without clean-up, as by kill -9: once in every stage, and at random moments."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    moments, deaths = random.Random(1), []
    advance = Display.advance_stage

    class Killed(BaseException):
        pass

    def advance_or_die(self, completed, note):
        advance(self, completed, note)
        stage = note.split()[0]
        # Several threads make shards, so the test must not depend on their order.
        if stage not in deaths or moments.random() < 0.15:
            deaths.append(stage)
            raise Killed

    monkeypatch.setattr(Display, "advance_stage", advance_or_die)
    while True:
        try:
            sweep.run(stored_config(), POINTS, tmp_path / "work")
        except Killed:
            continue
        break
    assert {"store", "train"} <= set(deaths)
    assert_same(tmp_path / "work", finished[0])
    built, again = (
        {path.name: path.read_bytes() for path in data.glob("jaxflat/*/*array_record*")}
        for data in (finished[1], tmp_path / "data")
    )
    assert built == again


@pytest.mark.skipif(not FULL, reason="a forward pass of 12 layers for each of 48,000 words")
def test_a_teacher_like_opt_125m_writes_sentences_in_bounded_memory(tmp_path):
    """The caches of 2,000 sentences take 3.3 GiB together; without slices the peak is 4.7 GiB."""
    command = [sys.executable, "-m", "tests.support.opt_corpus", "12", "2000", str(tmp_path)]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(made.stdout)["gibibytes"] < 3
    assert ArrayRecordReader(str(tmp_path / "shard.array_record")).num_records() == 2000
