"""From texts of the user's own to a report: a teacher, its language, and labels given by people."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from sweeps import tiny_config
from test_sweep import contents, modified

from jaxflat import corpus, loading, main, points, sweep, text_language
from jaxflat.analysis.findings import summary_sentences
from jaxflat.analysis.report import write_report
from jaxflat.analysis.tables import summary_table
from jaxflat.config import param
from jaxflat.data.reader import open_dataset
from jaxflat.data.text import Examples
from jaxflat.validation import InputError

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[1]
WORDS = "abcdef"  # one letter each: a tokenizer of the bytes and these
POINTS = param("phase_order", [("pretrain",), ()])
TRAINED = {
    **{"vocabulary": 256 + len(WORDS), "width": 16, "num_layers": 1, "head_size": 8},
    **{"length": 8, "steps": 20, "batch_size": 16, "warmup_steps": 2},
}


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Write 200 sentences of 3 to 8 words, and as many labelled ones: 1 where an "f" is."""
    rng = np.random.default_rng(0)
    shares = np.array([6, 5, 4, 3, 2, 4]) / 24
    draws = [rng.choice(list(WORDS), rng.integers(3, 9), p=shares) for _ in range(400)]
    sentences = [" ".join(words) for words in draws]
    rows = [f"{sentence}\t{int('f' in sentence)}" for sentence in sentences[200:]]
    text, tasks = folder / "texts.txt", folder / "has_f.tsv"
    text.write_text("\n".join(sentences[:200]) + "\n")
    tasks.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return text, tasks


def text_config(folder: Path) -> ConfigDict:
    text, tasks = write_texts(folder)
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    config.language.update({"name": "generated", "data_dir": str(folder), "stored_sentences": 64})
    config.language.generated.update({"text": str(text), "tasks": (str(tasks),)})
    config.language.generated.update({"num_words": len(WORDS), "length": 6, "min_length": 3})
    config.language.generated.trained.update(TRAINED)
    config.phases.pretrain.targets = "sampled"
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """(the sweep's folder, the folder of its texts and of what was made of them)."""
    workdir, folder = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("texts")
    assert sweep.run(text_config(folder), POINTS, workdir) == {}
    return workdir, folder


def rows_of(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_results_have_the_excess_loss_and_the_given_labels(finished):
    workdir, _ = finished
    *trained, control = rows_of(workdir)
    assert [int(row["step"]) for row in trained] == [3 + 4, 10 + 4]
    assert int(control["step"]) == 0
    assert int(control["sentences_seen"]) == 0
    for row in (*trained, control):
        assert float(row["excess_loss"]) >= 0
        assert float(row["optimal_loss"]) > 0
        for shots in (8, 16):
            assert 0 < float(row[f"linear_probe/has_f.given/{shots}"]) <= 1
    # A few steps tell the frequencies of the words at least.
    assert float(trained[-1]["excess_loss"]) < float(control["excess_loss"])
    assert float(trained[-1]["hessian_trace"]) != 0
    assert control["hessian_trace"] == ""
    # Nobody knows the best accuracy on labels that people gave.
    assert not [name for name in control if name.startswith("bayes")]
    assert {name for name in control if name.startswith("linear_probe") and "sem" not in name} == {
        "linear_probe/has_f.given/8",
        "linear_probe/has_f.given/16",
    }


def test_the_report_names_the_untrained_control(finished):
    workdir, _ = finished
    header, *rows = summary_table(workdir)
    assert "Accuracy,\ngiven (%)" in header
    assert "Accuracy,\nmap (%)" not in header
    assert [row[0] for row in rows].count("untrained") == 1
    assert "as it is initialised" in " ".join(summary_sentences(workdir))
    page = write_report(workdir).read_text()
    assert "untrained" in page
    assert "has f, given, 16 shots" in page


def test_the_teacher_and_its_sentences_are_what_the_config_says(finished):
    _, folder = finished
    (teacher,) = folder.glob("jaxflat/teacher-*")
    assert json.loads((teacher / "teacher.json").read_text())["settings"]["steps"] == 20
    (stored,) = folder.glob("jaxflat/generated-*")
    columns = open_dataset(stored).read(np.arange(64))
    assert set(columns["length"].tolist()) <= set(range(3, 7))
    assert columns["tokens"].max() == len(WORDS)  # pad


def test_labelled_sentences_are_the_texts_in_the_languages_words(finished):
    _, folder = finished
    section = FrozenConfigDict(text_config(folder)).language
    (name,) = found = text_language.labelled_sentences(section)
    assert name == "has_f"
    lines = (folder / "has_f.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    np.testing.assert_array_equal(found[name].labels_N, [int(label) for label in labels])
    lengths = [min(len(text.split()), 6) for text in texts]
    np.testing.assert_array_equal(found[name].sentences.lengths_B, lengths)
    # The words are numbered by how often the teacher's texts have them.
    counts = {word: (folder / "texts.txt").read_text().count(word) for word in WORDS}
    order = sorted(WORDS, key=lambda word: -counts[word])
    words = [[order.index(word) for word in text.split()[:6]] for text in texts]
    padded = [row + [len(WORDS)] * (6 - len(row)) for row in words]
    np.testing.assert_array_equal(found[name].sentences.tokens_BxT, padded)


def test_running_again_does_nothing(finished, monkeypatch):
    workdir, folder = finished
    monkeypatch.setattr(text_language, "train_teacher", None)
    monkeypatch.setattr(corpus, "build_dataset", None)
    before = modified(folder, "**/*") | modified(workdir, "*/**/*")
    assert sweep.run(text_config_again(folder), POINTS, workdir) == {}
    assert modified(folder, "**/*") | modified(workdir, "*/**/*") == before


def text_config_again(folder: Path) -> ConfigDict:
    """The same config; the texts are left as they are."""
    texts = {path: path.stat() for path in folder.glob("*.t*")}
    config = text_config(folder)
    for path, stat in texts.items():
        os_utime(path, stat)
    return config


def test_another_sweep_reads_the_same_teacher_and_sentences(finished, tmp_path, monkeypatch):
    workdir, folder = finished
    monkeypatch.setattr(text_language, "train_teacher", None)
    monkeypatch.setattr(corpus, "columns_of", None)
    assert sweep.run(text_config(folder), POINTS, tmp_path) == {}
    assert contents(tmp_path) == contents(finished[0])


CONFIG_FILE = """
from sweeps import tiny_config

get_config = lambda scale: tiny_config()
"""
