"""`measure` of several checkpoints: their order, the same draws, one table, one JSON, one picture.

Checkpoints of a run are measured in tests/sweeps/test_sweep.py.
"""

import logging
import re
from pathlib import Path

import jax
import pytest

from jaxflat.config.validation import InputError
from jaxflat.distributed import preemption
from jaxflat.measure.checkpoints import (
    check_comparable,
    find_checkpoints,
    labels_of,
    shared_folder,
    steps_of,
)
from tests.measure.test_measure import (
    TEXTS,
    command,
    signals_stay_as_they_are,
    strict_json,
    write_texts,
)
from tests.support.tiny_checkpoints import BERT, GPT2, save, tensors_of, write_tokenizer

__all__ = ["signals_stay_as_they_are"]

LOSSES = """
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxflat.flatness import Problem


def loss_fn(params, batch):
    return (params["a"] * batch**2).sum(), jnp.asarray(batch.shape[0] + 0.0)


def get_problem(checkpoint):
    params = {"a": jnp.asarray(float(checkpoint.read_text()))}
    return Problem.from_batches(loss_fn, params, jax.random.normal(jax.random.key(1), (9, 5)))
"""


@pytest.fixture
def losses(tmp_path):
    """Return a file, and a folder of checkpoints that each hold one number."""
    (tmp_path / "own.py").write_text(LOSSES)
    (tmp_path / "steps").mkdir()
    for step, value in {"step2": "1", "step10": "3", "step100": "2"}.items():
        (tmp_path / "steps" / step).write_text(value)
    return tmp_path


def test_checkpoints_are_in_natural_order_and_named_without_their_folder(tmp_path):
    names = ("a10/model", "a9/model", "b/model", "a9/other")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    found = find_checkpoints(tmp_path / "*" / "model", any_file=True)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a9/model",
        "a10/model",
        "b/model",
    ]
    assert shared_folder(found) == tmp_path
    assert labels_of(found) == ["a9/model", "a10/model", "b/model"]
    assert labels_of([Path("x/step1"), Path("x/step2")]) == ["step1", "step2"]
    (tmp_path / "a[9]").mkdir()
    assert find_checkpoints(tmp_path / "a[9]") == [tmp_path / "a[9]"]  # it exists


@pytest.mark.parametrize(
    ("labels", "steps"),
    [
        (["7", "16"], [7, 16]),
        (["epoch1-step500", "epoch2-step900"], [500, 900]),
        (["step1.h5", "step20.h5"], [1, 20]),
        (["7/weights.h5", "16/weights.h5"], [7, 16]),
        (["model.ckpt-100", "model.ckpt-200"], [100, 200]),
        (["step5.npz", "final"], None),
        (["step5-v2", "step6-v2"], None),
    ],
)
def test_the_step_is_the_last_number_of_each_name(labels, steps):
    assert steps_of(labels) == steps


def test_other_folders_that_match_are_left_out(tmp_path):
    for name in ("checkpoints/7", "checkpoints/16", "checkpoints/damaged-8"):
        (tmp_path / name).mkdir(parents=True)
    found = find_checkpoints(tmp_path / "checkpoints" / "*")
    assert [path.name for path in found] == ["7", "16"]


def test_one_table_one_json_and_one_picture(losses, capsys):
    """The loss is a E x^2: the same draws, so the estimates are exact multiples."""
    out, figures = losses / "out.json", losses / "figures"
    pattern = losses / "steps" / "*"
    slices = [f"--config.flatness.slices.{key}=2" for key in ("num_points", "num_directions")]
    where = (f"--problem={losses / 'own.py'}", f"--checkpoint={pattern}", *slices)
    asked = ("--measures=gradient_noise,loss_slices", f"--json={out}", f"--figures={figures}")
    assert command(*where, *asked) == 0
    written = strict_json(out)
    assert written["about"].endswith("steps: 3 checkpoints, 1 parameter, 9 microbatches")
    lines = written["checkpoints"]
    assert [line["checkpoint"] for line in lines] == ["step2", "step10", "step100"]
    assert [line["step"] for line in lines] == [2, 10, 100]
    losses_S = [line["measured"]["loss"]["mean"] for line in lines]
    assert losses_S == pytest.approx([losses_S[0] * a for a in (1, 3, 2)], rel=1e-6)
    assert all(line["curves"].keys() == {"loss_slices"} for line in lines)
    pictures = sorted(str(path.relative_to(figures)) for path in figures.rglob("*.png"))
    each = [f"step{n}/loss_slices.png" for n in (10, 100, 2)]
    assert pictures == [*each, "trajectory.png"]
    said = capsys.readouterr().out
    assert said.startswith(f"{losses / 'own.py'}, {losses / 'steps'}: 3 checkpoints")
    (table,) = re.findall(r"loss +sentences *\n(.*?)\n gradient_noise", said, re.S)
    rows = [line.split() for line in table.splitlines()]
    assert [row[0] for row in rows] == ["step2", "step10", "step100"]
    assert [float(row[1]) for row in rows] == pytest.approx(losses_S, rel=1e-3)
    assert said.count("figure /") == 8


def test_a_checkpoint_that_cannot_be_loaded_leaves_the_others(losses, capsys):
    (losses / "steps" / "step10").write_text("damaged")
    out, pattern = losses / "out.json", losses / "steps" / "*"
    where = (f"--problem={losses / 'own.py'}", f"--checkpoint={pattern}", f"--json={out}")
    assert command(*where, "--measures=gradient_noise") == 3
    assert [line["step"] for line in strict_json(out)["checkpoints"]] == [2, 100]
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("failed: "))
    assert line.startswith("failed: step10: ")
    assert line.endswith("could not convert string to float: 'damaged' (own.py, line 15)")


def test_the_checkpoints_before_an_interruption_are_in_the_json(losses, monkeypatch, capsys):
    measured = []

    def interrupt_third():
        measured.append("a checkpoint's only measure")
        if len(measured) == 3:
            raise preemption.Preempted("SIGTERM")

    monkeypatch.setattr(preemption, "stop_if_requested", interrupt_third)
    out, pattern = losses / "out.json", losses / "steps" / "*"
    where = (f"--problem={losses / 'own.py'}", f"--checkpoint={pattern}", f"--json={out}")
    assert command(*where, "--measures=gradient_noise") == preemption.Preempted.code
    assert [line["step"] for line in strict_json(out)["checkpoints"]] == [2, 10]
    said = capsys.readouterr().err
    assert "of several checkpoints, only --json is saved, with the finished ones" in said


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return GPT-2s of one training, with others beside them, and texts."""
    root = tmp_path_factory.mktemp("folders")
    for number, name in enumerate(("step5", "step10", "heads1", "words1", "words2")):
        config = GPT2 | {"n_head": 4} if name == "heads1" else GPT2
        save(root / name, config, tensors_of(config, seed=number))
    save(root / "bert1", BERT, tensors_of(BERT))
    for name in ("words1", "words2"):
        write_tokenizer(root / name, words=["the", f"of_{name}"])
    for name in ("run_1", "run_2"):
        (root / name / "checkpoints" / "7").mkdir(parents=True)
    write_texts(root / "texts.jsonl", TEXTS)
    return root


@pytest.mark.slow
def test_each_folder_is_measured_as_alone_and_compiles_nothing_again(folders, tmp_path, caplog):
    where = (f"--data={folders / 'texts.jsonl'}", "--measures=hessian_trace,average_sharpness")
    out = tmp_path / "out.json"

    def measured(pattern):
        assert command(f"--checkpoint={folders / pattern}", *where, f"--json={out}") == 0
        return strict_json(out)

    alone = measured("step10")["measured"]
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        both = measured("step*")
    messages = [record.getMessage() for record in caplog.records]
    started = [m for m in messages if m.startswith("Finished XLA compilation of jit(hessian_trace")]
    assert len(started) == 1
    assert both["about"] == f"{folders}: 2 checkpoints, 6 microbatches of 1 of 6 texts, labels data"
    first, second = both["checkpoints"]
    assert (first["step"], second["step"]) == (5, 10)
    assert second["measured"] == alone
    assert first["measured"]["hessian_trace"] != alone["hessian_trace"]


def test_tokenizers_are_compared_by_the_files_that_are_loaded(tmp_path):
    pair = [save(tmp_path / name, GPT2, tensors_of(GPT2)) for name in ("one", "two")]
    for folder in pair:
        write_tokenizer(folder)
        (folder / "vocab.json").write_text(folder.name)
    check_comparable(pair)  # tokenizer.json is loaded, and the same
    (pair[1] / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"two/vocab\.json is another tokenizer"):
        check_comparable(pair)
    for folder in pair:
        (folder / "vocab.json").write_text("")
        (folder / "tokenizer_config.json").write_text(folder.name)
    with pytest.raises(InputError, match=r"two/tokenizer_config\.json is another tokenizer"):
        check_comparable(pair)


BAD = {
    "run_*/checkpoints/*": "--checkpoint matches several runs: .*run_1/checkpoints/7, .*run_2",
    "[hs]*": "step5 is another model than .*heads1: num_heads=2, not 4",
    "[bh]*": "heads1 is another model than .*bert1: a CausalTransformer, not a Bert",
    "words*": "words2/tokenizer.json is another tokenizer than .*words1/tokenizer.json",
    "none*": r"--checkpoint=.*none\*: no checkpoint matches",
    "*.jsonl": "no checkpoint matches",
    "step* --measures=loss_path --toward={root}/step5": "--toward needs one checkpoint; 2 match",
}


@pytest.mark.parametrize("arguments", BAD)
def test_what_is_no_training_is_one_line_and_exit_code_2(folders, capsys, arguments):
    pattern, *flags = arguments.format(root=folders).split(" ")
    where = (f"--checkpoint={folders / pattern}", f"--data={folders / 'texts.jsonl'}")
    assert command(*where, *flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert re.search(BAD[arguments], line), line
