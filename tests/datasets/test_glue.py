"""GLUE from its own files, and through TFDS if the machine has it prepared."""

import importlib.util
import sys
import time
import types

import pytest

from jaxflat.datasets import glue
from jaxflat.datasets.glue import load_glue, read_glue

SST2 = 'sentence\tlabel\nhide new secretions \t0\nthat "loves it \t1\ncafé \t1\n'
QNLI = (
    "index\tquestion\tsentence\tlabel\n"
    '0\tWho "won?\tHe did.\tentailment\n'
    "1\tWhen?\tIn May.\tnot_entailment\n"
)
TEST = {
    "SST-2": "index\tsentence\n0\tuneasy\n",
    "QNLI": "index\tquestion\tsentence\n0\tWho?\tHim.\n",
}


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "glue"
    for name, text in (("SST-2", SST2), ("QNLI", QNLI)):
        (folder / name).mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / name / f"{split}.tsv").write_text(text, encoding="utf-8")
        (folder / name / "test.tsv").write_text(TEST[name], encoding="utf-8")
    return folder


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def one_line(error) -> str:
    assert type(error.value) is ValueError
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def check_sst2(examples, split):
    assert examples.name == f"sst2/{split}"
    assert examples.texts == ("hide new secretions ", 'that "loves it ', "café ")
    assert examples.labels_N.tolist() == [0, 1, 1]
    assert examples.label_names == ("negative", "positive")


def check_qnli(examples, split):
    assert examples.name == f"qnli/{split}"
    assert examples.texts == (('Who "won?', "He did."), ("When?", "In May."))
    assert examples.labels_N.tolist() == [0, 1]
    assert examples.label_names == ("entailment", "not_entailment")


@pytest.mark.parametrize("split", ["train", "dev"])
def test_the_files_of_glue(files, split):
    check_sst2(read_glue(files, "sst2", split), split)
    check_qnli(read_glue(files, "qnli", split), split)


def test_defects_of_the_files(files, tmp_path):
    path = files / "SST-2" / "train.tsv"
    path.write_text(SST2.replace("\t0", "\t2"), encoding="utf-8")
    with pytest.raises(ValueError, match="line 2, column 'label': '2' is not one") as error:
        read_glue(files, "sst2", "train")
    assert one_line(error).startswith(f"{path}: ")
    with pytest.raises(ValueError, match="no such file"):
        read_glue(tmp_path, "qnli", "dev")
    with pytest.raises(ValueError, match=r"^task='cola' is not one of sst2, qnli$"):
        read_glue(files, "cola", "dev")
    with pytest.raises(ValueError, match=r"^split='test' is not one of train, dev$"):
        load_glue("sst2", "test", files)


def test_files_in_the_manual_folder_come_first(files, tmp_path, monkeypatch):
    manual = tmp_path / "downloads" / "manual"
    manual.parent.mkdir()
    files.rename(manual)
    check_sst2(load_glue("sst2", "train", tmp_path), "train")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    check_qnli(load_glue("qnli", "dev"), "dev")


def test_without_a_network_it_says_at_once_what_to_do(tmp_path, no_network):
    start = time.monotonic()
    with pytest.raises(ValueError, match="glue/qnli through TFDS: ") as error:
        load_glue("qnli", "train", tmp_path)
    assert time.monotonic() - start < 60
    folder = tmp_path / "downloads" / "manual" / "QNLI"
    assert one_line(error).endswith(f"put GLUE's train.tsv and dev.tsv into {folder}")


def test_without_tfds_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="; pip install tensorflow_datasets; else") as error:
        load_glue("sst2", "train", tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": b" ", "label": 1, "idx": 0}, "example 0, 'sentence': the text is empty"),
        (
            {"sentence": b"a", "label": -1, "idx": 0},
            "the split is empty or has unlabelled examples",
        ),
        ({"sentence": b"\xff", "label": 1, "idx": 0}, "codec can't decode"),
        ({"label": 1, "idx": 0}, "'sentence'"),
        (None, "the split is empty or has unlabelled examples"),
        (RuntimeError("first line\nsecond line"), "through TFDS: first line;"),
        (AssertionError(), "through TFDS: AssertionError;"),
    ],
)
def test_whatever_tfds_does_is_one_line(tmp_path, monkeypatch, row, message):
    def as_data_source(split):
        assert split == "validation"
        if isinstance(row, Exception):
            raise row
        return [] if row is None else [row]

    builder = types.SimpleNamespace(data_path=tmp_path, as_data_source=as_data_source)
    tfds = types.SimpleNamespace(builder=lambda *_, **__: builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.text.glue", tfds)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.text", tfds)
    with pytest.raises(ValueError, match=message) as error:
        load_glue("sst2", "dev", tmp_path)
    one_line(error)


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


@pytest.mark.skipif(
    not installed("tensorflow_datasets", "array_record", "importlib_resources"),
    reason="TFDS prepares data with array_record and importlib_resources",
)
@pytest.mark.parametrize(
    ("task", "check"), [("sst2", check_sst2), ("qnli", check_qnli)], ids=["sst2", "qnli"]
)
def test_tfds_gives_what_the_files_give(files, tmp_path, monkeypatch, no_network, task, check):
    import tensorflow_datasets as tfds

    with monkeypatch.context() as patched:
        patched.setattr(glue, "_check_reachable", lambda url: None)
        patched.setattr(
            tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(files)
        )
        check(load_glue(task, "train", tmp_path / "tfds"), "train")
    check(load_glue(task, "dev", tmp_path / "tfds"), "dev")  # Prepared: needs no network.
