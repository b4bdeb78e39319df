"""From a user's text file to a report; and one clear line for each text or key that cannot be."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat import main
from jaxflat.config import param
from jaxflat.console import Display
from jaxflat.datasets.documents import read_documents
from jaxflat.datasets.tokenizer import load_tokenizer
from jaxflat.runs import real_text
from jaxflat.runs.languages import TEXT, make_language
from jaxflat.sweeps import sweep
from tests.support.counts import in_full
from tests.support.reports import report_of, table_of
from tests.support.sweeps import tiny_config

pytest.importorskip("tokenizers")

VOCABULARY, LENGTH = 300, 6


def write_text(folder: Path, number: int = 60) -> Path:
    """Write paragraphs of sentences, and labelled sentences: 1 with the word "cold"."""
    random = np.random.default_rng(0)
    words = ["the river", "a cold wind", "rises", "falls", "at night", "Slowly", "again;", "cold"]

    def sentence() -> str:
        return " ".join(random.choice(words, random.integers(3, 8)))

    blocks = ["\n".join(sentence() for _ in range(random.integers(1, 5))) for _ in range(number)]
    (folder / "my.txt").write_text("\n\n".join(blocks) + "\n")
    lines = [sentence() for _ in range(200)]
    rows = [f"{line}\t{int('cold' in line)}" for line in lines]
    (folder / "has_cold.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder / "my.txt"


def text_config(folder: Path) -> ConfigDict:
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    config.language.update({"name": "text", "data_dir": str(folder)})
    config.language.text.update({"path": f"{folder}/my.txt", "vocabulary": VOCABULARY})
    config.language.text.length = LENGTH
    config.language.text.tasks = (f"{folder}/has_cold.tsv",)
    config.phases.pretrain.targets = "sampled"
    config.flatness.update({"labels": "data", "measures": ("fisher_trace",)})
    config.probes.pooling = "mean"
    return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> ConfigDict:
    """The `language` section of a text that has been tokenized."""
    folder = tmp_path_factory.mktemp("texts")
    write_text(folder)
    section = FrozenConfigDict(text_config(folder)).language
    with Display(1) as display:
        TEXT.prepare(section, display)
    return section


def test_the_windows_hold_the_documents_of_the_file(prepared):
    text = make_language(prepared)
    assert (text.num_words, text.max_length) == TEXT.sizes(prepared) == (VOCABULARY, LENGTH)
    (folder,) = Path(prepared.data_dir).glob("jaxflat/text-*")
    tokenizer, end = load_tokenizer(folder), VOCABULARY - 1
    documents = [" ".join(one.lower().split()) for one in read_documents(prepared.text.path)]

    def texts(windows: np.ndarray) -> list[str]:
        parts = np.split(windows.ravel(), np.flatnonzero(windows.ravel() == end) + 1)[:-1]
        return [" ".join(tokenizer.decode(part[:-1].tolist()).split()) for part in parts]

    trained, held_out = (texts(np.asarray(x)) for x in (text.training_NxT, text.held_out_HxT))
    assert set(trained + held_out) <= set(documents)  # encoding and decoding lose letter case only
    assert len(trained + held_out) >= len(documents) - 2  # the last of a part may be cut off
    share = text.held_out_HxT.size / (text.held_out_HxT.size + text.training_NxT.size)
    assert 0.08 < share < 0.25


def test_the_seed_decides_the_held_out_documents_and_not_the_tokens(prepared):
    section = ConfigDict(prepared)
    section.seed = 1
    other = FrozenConfigDict(section)
    assert TEXT.is_prepared(other)
    one, two = make_language(prepared), make_language(other)
    assert (
        one.held_out_HxT.shape != two.held_out_HxT.shape
        or (np.asarray(one.held_out_HxT) != np.asarray(two.held_out_HxT)).any()
    )


def test_a_given_tokenizer_has_its_own_words_and_the_end_of_a_document(prepared, tmp_path):
    (folder,) = Path(prepared.data_dir).glob("jaxflat/text-*")
    section = ConfigDict(prepared)
    section.text.tokenizer, section.data_dir = str(folder), str(tmp_path)
    given = FrozenConfigDict(section)
    with Display(1) as display:
        TEXT.prepare(given, display)
    assert TEXT.sizes(given) == (VOCABULARY, LENGTH)  # its 299 tokens, and the end
    for one, two in zip(real_text._packed(prepared), real_text._packed(given), strict=True):
        np.testing.assert_array_equal(one, two)


def test_another_text_has_other_tokens(prepared, tmp_path):
    write_text(tmp_path, number=61)
    section = FrozenConfigDict(text_config(tmp_path)).language
    assert not TEXT.is_prepared(section)
    folders = {real_text._token_folder(one).name for one in (prepared, section)}
    assert len(folders) == 2


@pytest.mark.parametrize(
    "names", [("tokenizer.json",), ("vocab.json", "merges.txt", "tokenizer_config.json")]
)
def test_only_a_tokenizers_own_files_decide_its_tokens(names, tmp_path):
    section = text_config(tmp_path).language
    write_text(tmp_path)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    section.text.tokenizer = str(folder)
    for name in names:
        (folder / name).write_text("1")

    def digests() -> list[str]:
        return real_text.file_digests(FrozenConfigDict(section))

    before = digests()
    (folder / "model.safetensors").write_text("weights")
    assert digests() == before
    for name in names:
        (folder / name).write_text("12")
        assert digests() != before
        (folder / name).write_text("1")
        assert digests() == before


CONFIG_FILE = """
from pathlib import Path
from tests.runs.test_real_text import text_config

def get_config(scale):
    return text_config(Path(__file__).parent)
"""
REFUSED = {
    "language.text.path=none.txt": r"language\.text\.path: /.*/none\.txt: no such file or folder",
    "language.text.path=": r"language\.text\.path='' must be a text file or a folder",
    "language.text.path={folder}/empty_folder": r"empty_folder: the folder has no \.txt file",
    "language.text.path={folder}/latin.txt": r"latin\.txt: line 2 is not UTF-8",
    "language.text.path={folder}/few.txt": r"few\.txt: 15 documents; 16 are needed",
    "language.text.length=200": r"my\.txt: [\d,]+ tokens in 60 documents.* part has.* 1,600 \(8",
    "language.text.vocabulary=5000": r"my\.txt: too short for language\.text\.vocabulary=5000",
    "language.text.vocabulary=256": r"language\.text\.vocabulary=256 must be at least 257",
    "language.text.tokenizer={folder}/empty_folder": r"tokenizer\.json: no such file",
    "language.text.tasks=({folder}/no.tsv,)": r"no\.tsv: no such file",
    "language.text.tasks=()": r"claims\.primary='accuracy' needs labels, .*='text' has none; set",
    "language.text.tasks=() --config.claims.primary=effect": r"claims\.primary='effect' needs",
    "language.stored_sentences=100": r"language\.stored_sentences=100 must be 0",
    "phases.pretrain.targets=exact": r"phases\.pretrain\.targets='exact' must be 'sampled'",
    "phases.pretrain.projection.checkpoint_steps=(3,)": r"projection\.checkpoint_steps must be",
    "phases.pretrain.adversary.strength=0.5": r"adversary\.strength must be 0",
    "flatness.labels=exact": r"flatness\.labels='exact' must be 'data' or 'model'",
    "claims.loss_margin=0.3": r"claims\.loss_margin=0\.3 has no effect with language\.name='text'",
}


@pytest.mark.slow
@pytest.mark.parametrize("argument", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(argument, tmp_path, capsys):
    write_text(tmp_path)
    (tmp_path / "text.py").write_text(CONFIG_FILE)
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "few.txt").write_text(
        "\n\n".join(f"{c} the cold wind" * 9 for c in "abcdefghijklmno")
    )
    (tmp_path / "latin.txt").write_bytes(b"a\n\xe9\n")
    workdir = tmp_path / "work"
    flags = [f"--config={tmp_path}/text.py", f"--workdir={workdir}"]
    assert main.main([*flags, *f"--config.{argument.format(folder=tmp_path)}".split()]) == 2
    error = capsys.readouterr().err
    assert re.search(REFUSED[argument], error)
    assert error.count("\n") == 1
    assert not list(workdir.glob("*/status.json"))


@pytest.mark.slow
def test_a_lookup_table_is_refused(tmp_path, capsys):
    write_text(tmp_path)
    (tmp_path / "text.py").write_text(CONFIG_FILE)
    flags = [f"--config={tmp_path}/text.py", f"--workdir={tmp_path}/work"]
    assert main.main([*flags, "--config.model.name=lookup_table", "--config.phase_order=()"]) == 2
    assert "model.name='lookup_table' cannot read real sentences" in capsys.readouterr().err


PAGE = (Path(__file__).parents[2] / "docs" / "languages.md").read_text()
SMALLER = {
    **{"seed": 0, "language.text.vocabulary": 280, "language.text.length": 8, "mesh.data": 1},
    **{"phases.pretrain.steps": 20, "phases.pretrain.checkpoint_steps": "(10,20)"},
    **{"phases.pretrain.anneal_steps": 2, "phases.pretrain.schedule.warmup_steps": 2},
    **{"phases.pretrain.batch_size": 8, "evaluation.batch_size": 8, "model.num_layers": 1},
    **{"flatness.num_microbatches": 2, "flatness.microbatch_size": 8, "flatness.num_probes": 2},
    **{"flatness.measures": "fisher_trace"},
}


CAUSAL = {
    **{"language.masking": "causal", "model.name": "causal", "evaluation.num_positions": 0},
    "flatness.labels": "model",
}


@pytest.mark.slow
@pytest.mark.parametrize("block", ["", "modern", *in_full("gpt")])
def test_a_user_with_a_text_file_gets_a_report_from_one_config(
    block, tmp_path, capsys, monkeypatch
):
    """The config is the one that docs/languages.md shows, with its lines for causal models."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text, causal = re.findall(r"```python\n(.*?)```", PAGE.partition("## Your own text")[2], re.S)[
        :2
    ]
    if block:
        (evaluation,) = re.findall(r".*evaluation.*\n", text)
        text = text.replace(evaluation, causal)
    assert len([line for line in text.splitlines() if line]) <= 15
    (tmp_path / "my_text.py").write_text(text)
    assert write_text(tmp_path).name == "my.txt"
    flags = ["--config=my_text.py", f"--workdir={tmp_path}/work"]
    flags += [f"--config.{key}={value}" for key, value in SMALLER.items()]
    flags += [f"--config.model.block={block}"] if block else []
    assert main.main([*flags, "--dry_run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"text, seed 0: 60 documents of [\d,]+ characters in all", printed)
    assert "more accurate" not in printed.partition("No verdict")[0]  # the text has no labels
    assert "all arms reach the same held-out losses" in printed
    assert main.main(flags) == 0
    assert "Held-out loss" in capsys.readouterr().out
    with (tmp_path / "work" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        assert "excess_loss" not in row
        assert "optimal_loss" not in row
        parts = [float(row[name]) for name in row if re.fullmatch(r"loss/documents_\d+", name)]
        assert np.mean(parts) == pytest.approx(float(row["loss"]), rel=1e-5)
        assert float(row["loss_sem"]) > 0
    page = (tmp_path / "work" / "report.html").read_text()
    assert "Held-out loss (nats)" in page
    assert main.main([*flags, "--dry_run"]) == 0  # the memory of its steps is known by now
    printed = " ".join(capsys.readouterr().out.split())
    figures = re.search(r"([\d,]+) tokens to train on, and ([\d,]+) tokens of", printed)
    assert figures
    training, held_out = (int(number.replace(",", "")) for number in figures.groups())
    assert 0.08 < held_out / (training + held_out) < 0.25


@pytest.mark.slow
def test_labelled_sentences_are_probed_and_an_untrained_model_is_the_control(tmp_path):
    write_text(tmp_path)
    points = param("phase_order", [("pretrain",), ()])
    assert sweep.run(text_config(tmp_path), points, tmp_path / "work") == {}
    with (tmp_path / "work" / "results.csv").open() as file:
        *trained, control = csv.DictReader(file)
    assert float(trained[-1]["loss"]) < float(control["loss"])
    for row in (*trained, control):
        assert 0 < float(row["linear_probe/has_cold.given/16"]) <= 1
    assert "untrained" in report_of(tmp_path / "work").read_text()
    assert table_of(tmp_path / "work")[0][2] == "Held-out loss\n(nats)"
    before = {path: path.read_bytes() for path in (tmp_path / "work").glob("*/*.jsonl")}
    assert sweep.run(text_config(tmp_path), points, tmp_path / "work") == {}
    assert before == {path: path.read_bytes() for path in (tmp_path / "work").glob("*/*.jsonl")}
