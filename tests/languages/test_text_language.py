"""From the user's texts to a report: a teacher, its language, and labels given by people."""

import csv
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat import main
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.page.overview import overview
from jaxflat.config import loading, param
from jaxflat.config.validation import InputError
from jaxflat.datasets.reader import open_dataset
from jaxflat.datasets.text import Examples
from jaxflat.languages.generated import text_language
from jaxflat.languages.sentences import Sentences
from jaxflat.runs import corpus, languages, probe_sets
from jaxflat.sweeps import points, sweep
from tests.support.reports import report_of, table_of
from tests.support.sweeps import tiny_config
from tests.sweeps.test_sweep import contents, modified

pytestmark = pytest.mark.slow

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[2]
WORDS = "abcdef"  # one-letter words, for a tokenizer of the bytes and these
POINTS = param("phase_order", [("pretrain",), ()])
TRAINED = {
    **{"vocabulary": 256 + len(WORDS), "width": 16, "num_layers": 1, "head_size": 8},
    **{"length": 8, "steps": 20, "batch_size": 16, "warmup_steps": 2},
}


def write_texts(folder: Path) -> None:
    """Write 200 sentences of 3 to 8 words, and as many labelled ones: 1 with an "f"."""
    rng = np.random.default_rng(0)
    shares = np.array([6, 5, 4, 3, 2, 4]) / 24
    draws = [rng.choice(list(WORDS), rng.integers(3, 9), p=shares) for _ in range(400)]
    sentences = [" ".join(words) for words in draws]
    rows = [f"{sentence}\t{int('f' in sentence)}" for sentence in sentences[200:]]
    (folder / "texts.txt").write_text("\n".join(sentences[:200]) + "\n")
    (folder / "has_f.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")


def text_config(folder: Path) -> ConfigDict:
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    config.language.update({"name": "generated", "data_dir": str(folder), "stored_sentences": 64})
    config.language.generated.text = f"{folder}/texts.txt"
    config.language.generated.tasks = (f"{folder}/has_f.tsv",)
    config.language.generated.update({"num_words": len(WORDS), "length": 6, "min_length": 3})
    config.language.generated.trained.update(TRAINED)
    config.phases.pretrain.targets = "sampled"
    config.evaluation.num_positions, config.probes.pooling = 2, "mean"
    config.flatness.measures = ("fisher_trace",)  # compiles faster than the others
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """Return (the sweep's folder, the folder of its texts, teacher and sentences)."""
    workdir, folder = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("texts")
    write_texts(folder)
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
    # A few steps are enough to learn the frequencies of the words.
    assert float(trained[-1]["excess_loss"]) < float(control["excess_loss"])
    assert float(trained[-1]["fisher_trace"]) > 0
    assert control["fisher_trace"] == ""
    # The best accuracy on labels given by people is unknown.
    assert not [name for name in control if name.startswith("bayes")]
    assert {name for name in control if name.startswith("linear_probe") and "sem" not in name} == {
        "linear_probe/has_f.given/8",
        "linear_probe/has_f.given/16",
    }


def test_the_untrained_control_stands_beside_the_trained_model_with_its_accuracy(finished):
    table = overview(read_comparison(finished[0]))
    assert table
    *_, control = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert control["Arm"] == "untrained"
    assert control["Accuracy (%)"][0].isdigit()


def test_the_report_names_the_untrained_control(finished):
    workdir, _ = finished
    header, *rows = table_of(workdir)
    assert "Accuracy,\ngiven (%)" in header
    assert "Accuracy,\nmap (%)" not in header
    assert [row[0] for row in rows].count("untrained") == 1
    page = report_of(workdir).read_text()
    assert "untrained" in page
    assert "has f, given, 16 shots" in page


def test_texts_without_labels_have_no_probes(finished, tmp_path):
    config = text_config(Path(shutil.copytree(finished[1], tmp_path / "texts")))
    config.language.generated.tasks = ()
    config.claims.primary = "flatness"
    assert sweep.run(config, POINTS, tmp_path) == {}
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [row["step"] for row in rows_of(finished[0])]
    assert not [name for name in rows[0] if "probe/" in name]
    assert "Excess loss" in report_of(tmp_path).read_text()


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
    # Words are numbered by their frequency in the teacher's texts.
    counts = {word: (folder / "texts.txt").read_text().count(word) for word in WORDS}
    order = sorted(WORDS, key=lambda word: -counts[word])
    words = [[order.index(word) for word in text.split()[:6]] for text in texts]
    padded = [row + [len(WORDS)] * (6 - len(row)) for row in words]
    np.testing.assert_array_equal(found[name].sentences.tokens_BxT, padded)


def test_given_labels_are_split_into_parts_without_a_sentence_in_common(finished, monkeypatch):
    section = FrozenConfigDict(text_config(finished[1])).language
    settings = FrozenConfigDict(text_config(finished[1])).probes
    ids_N = np.arange(200, dtype=np.int32)
    sentences = Sentences(jnp.asarray(ids_N)[:, None], jnp.ones(200, np.int32), None)
    found = {"ids": text_language.LabelledSentences(sentences, ids_N % 3, 3)}
    kind = languages.GENERATED._replace(labelled_sentences=lambda section: found)
    monkeypatch.setattr(probe_sets, "language_kind", lambda section: kind)

    def parts(seed: int) -> list[np.ndarray]:
        (sets,) = probe_sets.probe_sets(section, settings, seed)
        assert (sets.names, sets.num_classes, sets.bayes) == (["ids.given"], 3, {})
        ids = []
        for part, labels, valid in (sets.train, sets.validation, sets.test):
            rows = np.asarray(part.tokens_BxT)[..., 0]
            np.testing.assert_array_equal(np.asarray(labels).reshape(rows.shape), rows % 3)
            assert np.asarray(valid).all()
            ids.append(rows)
        return ids

    train_DxN, validation_N, test_N = parts(seed=1001)
    assert train_DxN.shape == (2, 16)
    assert (len(validation_N), len(test_N)) == (16, 32)
    for draw_N in train_DxN:
        assert len({*draw_N, *validation_N, *test_N}) == 16 + 16 + 32
    assert set(train_DxN[0]) != set(train_DxN[1])
    other_train_DxN, other_validation_N, other_test_N = parts(seed=1002)
    assert set(other_test_N) != set(test_N)
    assert set(other_validation_N) != set(validation_N)
    assert set(other_train_DxN[0]) != set(train_DxN[0])


def test_running_again_does_nothing(finished, monkeypatch):
    workdir, folder = finished
    monkeypatch.setattr(text_language, "train_teacher", None)
    monkeypatch.setattr(corpus, "build_dataset", None)

    def known():
        found = modified(folder, "**/*") | modified(workdir, "*/**/*")
        return {path: when for path, when in found.items() if "locks" not in path.parts}

    before = known()
    assert sweep.run(text_config(folder), POINTS, workdir) == {}
    assert known() == before


def test_another_sweep_reads_the_same_teacher_and_sentences(finished, tmp_path, monkeypatch):
    workdir, folder = finished
    monkeypatch.setattr(text_language, "train_teacher", None)
    monkeypatch.setattr(corpus, "columns_of", None)
    assert sweep.run(text_config(folder), POINTS, tmp_path) == {}
    assert contents(tmp_path) == contents(workdir)


CONFIG_FILE = """
from pathlib import Path
from tests.languages.test_text_language import text_config

def get_config(scale):
    return text_config(Path(__file__).parent)
"""


@pytest.fixture
def command(tmp_path, capsys):
    """Return run(arguments), which returns the command's one line about bad input."""
    write_texts(tmp_path)
    (tmp_path / "text.py").write_text(CONFIG_FILE)
    (tmp_path / "few.txt").write_text("a b c\n" * 19)
    (tmp_path / "unlabelled.tsv").write_text("sentence\tscore\na b\t1\n")
    (tmp_path / "labelled_a.tsv").write_text("sentence\tlabel\na b\ta\n")
    (tmp_path / "bad.grammar").write_text("S A 1.0\nA a 0.5\nA b 0.4\n")
    (tmp_path / "no_teacher").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "has_f.tsv").write_text((tmp_path / "has_f.tsv").read_text())

    def run(*arguments: str) -> str:
        arguments = [argument.format(folder=tmp_path) for argument in arguments]
        workdir = tmp_path / "work"
        code = main.main([f"--config={tmp_path}/text.py", f"--workdir={workdir}", *arguments])
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.count("\n") == 1, error
        assert not list(tmp_path.glob("jaxflat/*-*"))  # no teacher, no sentences
        assert not list(workdir.glob("*/status.json"))  # no point
        return error

    return run


def test_dry_run_lists_the_points_before_there_is_a_teacher(tmp_path, capsys):
    write_texts(tmp_path)
    (tmp_path / "text.py").write_text(CONFIG_FILE)
    workdir = tmp_path / "work"
    assert main.main([f"--config={tmp_path}/text.py", f"--workdir={workdir}", "--dry_run"]) == 0
    assert "0 run" in capsys.readouterr().out
    assert not workdir.exists()
    assert not (tmp_path / "jaxflat").exists()


TEXT = "--config.language.generated"
REFUSED = {
    (f"{TEXT}.text={{folder}}/none.txt",): r"none\.txt: no such file",
    (
        f"{TEXT}.text=rviews",
    ): "'rviews' is no source of labelled text: give reviews, sst2, qnli, or a",
    (f"{TEXT}.tasks=('{{folder}}/unlabelled.tsv',)",): (
        r"unlabelled\.tsv: line 1: there is no column 'label'"
    ),
    (f"{TEXT}.tasks=('{{folder}}/labelled_a.tsv',)",): r"labelled_a\.tsv: line 2, column 'label'",
    (f"{TEXT}.tasks=('{{folder}}/texts.txt',)",): r"texts\.txt' is no source",
    (f"{TEXT}.tasks=('{{folder}}/has_f.tsv','{{folder}}/other/has_f.tsv')",): "has_f",
    (f"{TEXT}.tasks=('imdb',)",): "'imdb' is no source of labelled text",
    (f"{TEXT}.text=reviews",): "pip download --no-deps.*vaderSentiment==3.3.2 -d ",
    (f"{TEXT}.tasks=('reviews',)",): (
        r"tasks=\('reviews',\) are labels of other texts than .*texts\.txt; .* \(\) for no probes"
    ),
    (f"{TEXT}.num_words=263",): "num_words=263 exceeds the teacher's .*vocabulary=262",
    (f"{TEXT}.length=9",): r"length=9 exceeds the teacher's .*trained\.length=8",
    (f"{TEXT}.min_length=7",): "min_length.*7",
    (f"{TEXT}.teacher={{folder}}/none",): "generated.teacher=.*/none: no such folder",
    (f"{TEXT}.trained.head_size=6",): "head_size=6",
    ("--config.language.masking=share",): (
        "language.masking='share' with language.name='generated'"
    ),
    ("--config.probes.num_test=200",): (
        r"num_test \+ num_validation \+ num_draws \* most shots = \d+; .*has_f\.tsv has 200"
    ),
    ("--config.language.name=hmm", "--config.probes.labelings=('official',)"): (
        "probes.labelings: 'official' is not a labeling of task state_2 of language.name='hmm'; "
    ),
    (
        "--config.language.name=grammar_file",
        "--config.language.grammar_file.path={folder}/bad.grammar",
    ): r"bad\.grammar.*sum",
    ("--config.language.name=grammar_file",): "path",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=lambda a: " ".join(a).replace("{folder}/", ""))
def test_bad_input_is_one_line_and_exit_code_2_before_anything_is_written(
    command, arguments, tmp_path
):
    assert re.search(REFUSED[arguments], command(*arguments))
    assert not (tmp_path / "work").exists()


REFUSED_BY_THE_TEACHER = {
    f"{TEXT}.teacher={{folder}}/no_teacher": r"no_teacher/config\.json: No such file",
    f"{TEXT}.text={{folder}}/few.txt": "19.* 20",
    f"{TEXT}.trained.vocabulary=255": "255.* 256",
    f"{TEXT}.trained.vocabulary=300": "300.* 262",
}


@pytest.mark.parametrize("argument", REFUSED_BY_THE_TEACHER)
def test_what_no_teacher_can_be_made_of_is_one_line_and_exit_code_2(command, argument):
    assert re.search(REFUSED_BY_THE_TEACHER[argument], command(argument))


@pytest.mark.parametrize("scale", ["smoke", "laptop", "full", "paper"])
def test_the_config_of_generated_text_expands_at_every_scale(scale, tmp_path, monkeypatch):
    asked = []

    def read(name: str, folder: str) -> Examples:
        asked.append(name)
        return Examples(name, ("a b",) * 20_000, np.arange(20_000, dtype=np.int32) % 2, ("0", "1"))

    monkeypatch.setattr(text_language, "read_texts", lambda *args: read(*args).texts)
    monkeypatch.setattr(text_language, "read_labelled", read)
    config, listed = loading.load(f"{ROOT}/configs/generated_text.py:{scale}")
    if scale == "paper":  # its teacher is a folder of the user
        with pytest.raises(InputError, match="or give a larger teacher"):
            points.expand(config, listed, tmp_path)
        config.language.generated.teacher = str(tmp_path)
    expanded = points.expand(config, listed, tmp_path)
    assert len({point.name for point in expanded}) == len(listed)
    untrained = [point for point in expanded if not point.config.phase_order]
    assert 2 * len(untrained) == len(expanded)
    assert {point.config.model.width for point in untrained} == {
        point.config.model.width for point in expanded
    }
    tasks = {"sst2", "qnli"} if scale == "paper" else {"reviews"}
    assert set(asked) == {"reviews"} | tasks
    assert {point.config.language.name for point in expanded} == {"generated"}
    assert not list(tmp_path.iterdir())


def test_the_config_of_generated_text_says_how_to_get_the_reviews(tmp_path):
    config, listed = loading.load(f"{ROOT}/configs/generated_text.py:smoke")
    config.language.data_dir = str(tmp_path)
    with pytest.raises(InputError, match=r"pip download .*vaderSentiment"):
        points.expand(config, listed, tmp_path / "work")


def test_other_texts_are_another_teacher(tmp_path):
    write_texts(tmp_path)
    section = FrozenConfigDict(text_config(tmp_path)).language
    before = text_language.teacher_folder(section)
    assert text_language.teacher_folder(section) == before
    text = tmp_path / "texts.txt"
    text.write_text(text.read_text().translate(str.maketrans("af", "fa")))
    assert text_language.teacher_folder(section) != before
