"""The build command: the same bytes after any interruption; bad input is one line."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import FrozenConfigDict

from jaxflat import build
from jaxflat import config as base_config
from jaxflat.datasets.order import example_ids
from jaxflat.datasets.reader import open_dataset
from jaxflat.datasets.shards import DatasetError
from jaxflat.distributed import preemption
from jaxflat.runs import builders, corpus
from jaxflat.runs.corpus import build_dataset, columns_of
from jaxflat.runs.languages import make_language

SIZES = {"num_sentences": 70, "shard_size": 16, "seed": 5}
SETTINGS = {**SIZES, "labelings": ("map", "latent"), "conditionals": True}
CONFIG = """
from jaxflat import config as base_config

def get_config(scale=None):
    config = base_config.base()
    config.language.hmm.update({"num_states": 3, "num_words": 6, "length": 4, "min_length": 2})
    config.language.hmm.tasks = (1, 4)
    return config
"""


@pytest.fixture(scope="module")
def section():
    config = base_config.base()
    config.language.hmm.update({"num_states": 3, "num_words": 6, "length": 4, "min_length": 2})
    config.language.hmm.tasks = (1, 4)
    return FrozenConfigDict(config).language


@pytest.fixture(scope="module")
def undisturbed(section, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "set"
    build_dataset(section, directory, **SETTINGS)
    return directory


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.mark.slow
def test_tfds_and_open_dataset_read_the_languages_sentences(section, undisturbed):
    language = make_language(section)
    key = jax.random.fold_in(builders.purpose_key(5, "corpus"), 4)
    (expected,) = columns_of(language, key, 16, ("map", "latent"), True, num_sentences=16)
    sentences = language.sample(key, 16)
    np.testing.assert_array_equal(expected["tokens"], sentences.tokens_BxT)
    np.testing.assert_array_equal(expected["length"], sentences.lengths_B)
    for name, task in language.tasks.items():
        for labeling in ("latent", "map"):
            labels_B, valid_B = task.labels(sentences, labeling)
            column = expected[f"{name}.{labeling}"]
            assert column.dtype == np.int16
            np.testing.assert_array_equal(column, np.where(valid_B, labels_B, -1))
    assert (expected["state_4.map"] == -1).any()
    log_probs = language.conditional_log_probs(sentences.tokens_BxT, sentences.lengths_B)
    np.testing.assert_allclose(expected["conditionals"], log_probs, rtol=1e-6)

    dataset = open_dataset(undisturbed)
    assert len(dataset) == 70
    last = dataset.read(np.arange(64, 70))
    source = tfds.builder_from_directory(undisturbed).as_data_source(split="train")
    assert len(source) == 70
    for name, column in expected.items():
        np.testing.assert_array_equal(last[name], column[:6])
        np.testing.assert_array_equal([source[i][name] for i in range(64, 70)], column[:6])


@pytest.mark.slow
def test_an_epoch_from_disk_reads_each_sentence_once(undisturbed):
    dataset = open_dataset(undisturbed)
    batches = [dataset.read(example_ids(0, step, 10, len(dataset))) for step in range(7)]
    tokens_NxT = np.concatenate([batch["tokens"] for batch in batches])
    stored_NxT = dataset.read(np.arange(70))["tokens"]
    assert sorted(map(tuple, tokens_NxT)) == sorted(map(tuple, stored_NxT))
    assert (tokens_NxT != stored_NxT).any()


def test_sentences_do_not_depend_on_their_number(section, undisturbed, tmp_path):
    fewer = build_dataset(section, tmp_path / "set", **{**SETTINGS, "num_sentences": 9})
    expected = open_dataset(undisturbed).read(np.arange(9))
    for name, column in fewer.read(np.arange(9)).items():
        if column.dtype.kind != "f":
            np.testing.assert_array_equal(column, expected[name])
            continue
        # Another number of sentences compiles another program, which on some CPUs adds in another
        # order. Its conditionals are equal up to float32 rounding.
        np.testing.assert_allclose(column, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_shards", [0, 2, 5])
def test_a_failed_build_resumes_to_the_same_bytes(
    section, undisturbed, tmp_path, monkeypatch, num_shards
):
    written, write_shard, lock = [], corpus.write_shard, threading.Lock()

    def failing(path, *arguments):
        with lock:
            if len(written) >= num_shards:
                path.with_name(f".{path.name}").write_bytes(b"torn")
                raise KeyboardInterrupt
            write_shard(path, *arguments)
            written.append(path)

    monkeypatch.setattr(corpus, "write_shard", failing)
    if num_shards < 5:
        with pytest.raises(KeyboardInterrupt):
            build_dataset(section, tmp_path / "set", **SETTINGS)
        with pytest.raises(DatasetError, match="SHA256SUMS is missing"):
            open_dataset(tmp_path / "set")
    monkeypatch.undo()
    made = []
    build_dataset(section, tmp_path / "set", **SETTINGS, on_shard=lambda _, new: made.append(new))
    assert sum(made) == 5 - len(written)
    assert digests(tmp_path / "set") == digests(undisturbed)


def test_a_damaged_shard_of_a_finished_data_set_is_reported(section, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "set")
    before = digests(tmp_path / "set")
    shard = next((tmp_path / "set").glob("*00001-of*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{shard} is not what SHA256SUMS says"):
        build_dataset(section, tmp_path / "set", **SETTINGS)
    shard.unlink()
    build_dataset(section, tmp_path / "set", **SETTINGS)
    assert digests(tmp_path / "set") == before


def test_only_lost_shards_of_a_finished_data_set_are_rebuilt(section, undisturbed, tmp_path):
    made = []
    build_dataset(section, undisturbed, **SETTINGS, on_shard=lambda _, new: made.append(new))
    assert not any(made)
    before = digests(undisturbed)
    next(undisturbed.glob("*00001-of*")).unlink()
    build_dataset(section, undisturbed, **SETTINGS, on_shard=lambda _, new: made.append(new))
    assert sum(made) == 1
    assert digests(undisturbed) == before


@pytest.fixture
def command(tmp_path):
    (tmp_path / "user.py").write_text(CONFIG)
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    return [
        *(f"--config={tmp_path / 'user.py'}", f"--output={tmp_path / 'set'}"),
        *(*sizes, "--labels", "--conditionals"),
    ]


def test_the_command_builds_the_same_bytes_and_prints_their_size(
    command, undisturbed, tmp_path, capsys
):
    assert build.main(command) == 0
    output = capsys.readouterr().out
    num_bytes = sum(p.stat().st_size for p in undisturbed.iterdir())
    assert re.search(rf"70 sentences \(70 new, [\d,]+/s\) in 5 shards, {num_bytes:,} bytes", output)
    assert str(tmp_path / "set") in output
    assert digests(tmp_path / "set") == digests(undisturbed)
    assert build.main([*command, "--seed=6"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"error: {tmp_path / 'set' / 'jaxflat.json'} is of a data set with seed=5, not seed=6; "
        "choose another directory\n"
    )
    assert digests(tmp_path / "set") == digests(undisturbed)


BAD_ARGUMENTS = {
    "--num_sentences=0": "--num_sentences=0 must be at least 1 and below 2^32",
    "--num_sentences=many": "invalid int value: 'many'",
    "--shard_size=0": "--shard_size=0 must be at least 1",
    "--seed=-1": "--seed=-1 must be at least 0",
    "--seed=99999999999999999999999": "must be at least 0 and below 2^32",
    "--config.seed=99999999999999999999999": "seed=99999999999999999999999 must be below 2^32",
    "--config=none.py": "none.py: no such config file",
    "--wordkir=x": "--wordkir=x: not an argument",
    "--config.language.name=latin": "language.name",
    "--config.language.hmm.tasks=(9,)": "tasks must be positions in 1..length=4; got 9",
    "--config.language.name=generated": "--labels: sentences of language.name='generated' have",
    "--config.language.hmm.lenght=9": "nearest: language.hmm.length",
    f"--output={__file__}": "cannot be used: ",
    f"--output={Path(__file__).parent}": "is in the way",
}


@pytest.mark.parametrize("argument", BAD_ARGUMENTS)
def test_bad_input_is_one_line_and_exit_code_2(command, argument, tmp_path, capsys):
    assert build.main([*command, argument]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert BAD_ARGUMENTS[argument] in captured.err
    assert not (tmp_path / "set").exists()


def test_missing_flags_are_named(capsys):
    assert build.main([]) == 2
    assert "--config, --output, --num_sentences" in capsys.readouterr().err


def test_a_signal_interrupts_it_and_the_same_command_resumes(
    command, undisturbed, tmp_path, capsys
):
    monkeypatch = pytest.MonkeyPatch()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    write_shard = corpus.write_shard

    def interrupted(*arguments):
        write_shard(*arguments)
        if not preemption.stop_requested():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_shard", interrupted)
        patch.setattr(corpus.jax, "local_devices", lambda: jax.devices()[:1])
        assert build.main(command) == 75
    preemption._received.clear()
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert (
        "Interrupted by SIGTERM; state saved. Run the same command to resume."
        in capsys.readouterr().err
    )
    assert not (tmp_path / "set" / "SHA256SUMS").exists()
    assert build.main(command) == 0
    assert digests(tmp_path / "set") == digests(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_resumes_to_the_same_bytes(command, tmp_path, monkeypatch, number):
    arguments = [sys.executable, "-m", "jaxflat.build", *command, "--shard_size=2000"]
    arguments.append("--num_sentences=31000")
    disturbed, undisturbed = tmp_path / "set", tmp_path / "other"
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    subprocess.run([*arguments, f"--output={undisturbed}"], check=True, capture_output=True)
    for num_shards in (1, 8):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(disturbed.glob("hmm-*"))) < num_shards:
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate()[1].decode()
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 75, error
            assert "Run the same command to resume." in error
            assert "Traceback" not in error
    assert not (disturbed / "SHA256SUMS").exists()
    subprocess.run(arguments, check=True, capture_output=True)
    assert digests(disturbed) == digests(undisturbed)
