"""The measure command: correct losses, strict JSON, figures, and one line for bad input.

Traces of Hugging Face folders are compared with PyTorch's in test_measure_torch.py. Traces of a run
are compared with the run's own in test_sweep.py.
"""

import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxflat.datasets.tokenizer import TokenTexts
from jaxflat.distributed import preemption
from jaxflat.flatness import Estimate, mean_loss
from jaxflat.measure import __main__ as measure
from jaxflat.measure import texts as measured_texts
from jaxflat.measure.output import as_json, remarks
from jaxflat.runs import builders, saved_run
from jaxflat.sweeps import points
from tests.models.test_bert import published_logits as bert_logits
from tests.models.test_huggingface import Published
from tests.support.sweeps import tiny_config
from tests.support.tiny_checkpoints import (
    BERT,
    CLS,
    GPT2,
    OPT,
    SEP,
    save,
    tensors_of,
    write_tokenizer,
)

FOLDERS = {"gpt2": GPT2, "opt": OPT, "bert": BERT}
MASK = 3  # the mask token of write_tokenizer's tokenizer
TEXTS = [[1, 5, 2], [7, 7, 0, 12, 3, 4, 9], [11, 2], [6, 5, 4, 3, 2, 1], [8, 10], [4, 4, 4, 4, 1]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder of valid and invalid checkpoints and texts."""
    root = tmp_path_factory.mktemp("files")
    for name, config in FOLDERS.items():
        save(root / name, config, tensors_of(config))
    write_tokenizer(root / "bert")
    save(root / "other", GPT2, {name: 1.1 * x for name, x in tensors_of(GPT2).items()})
    save(root / "heads", GPT2 | {"n_head": 4}, tensors_of(GPT2))
    save(root / "no_mask", BERT, tensors_of(BERT))
    write_tokenizer(root / "no_mask", words=["[PAD]", "[CLS]", "[SEP]", "the"])
    save(root / "mask_beyond", BERT, tensors_of(BERT))
    write_tokenizer(root / "mask_beyond", words=[*map(str, range(20)), "[CLS]", "[SEP]", "[MASK]"])
    save(root / "no_tokenizer", BERT, tensors_of(BERT))
    (root / "no_weights").mkdir()
    (root / "no_weights" / "config.json").write_text(json.dumps(GPT2))
    write_texts(root / "texts.jsonl", TEXTS)
    write_texts(root / "one.jsonl", TEXTS[:1])
    write_texts(root / "single.jsonl", [*TEXTS, [5]])
    write_texts(root / "beyond.jsonl", [*TEXTS, [5, 13]])
    (root / "damaged.jsonl").write_text("[1, 2]\n[3, 4\n")
    (point,) = points.expand(tiny_config(), [{}], root)
    stored = json.dumps({"config": json.loads(point.config.to_json())})
    for name, text in {"run": stored, "cut": stored[:99], "no_run": '{"config": 3}'}.items():
        (root / name / "checkpoints" / "7").mkdir(parents=True)
        (root / name / "config.json").write_text(text)
    return root


def write_texts(path, texts):
    path.write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def signals_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(preemption, "install_handlers", lambda: None)


def strict_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def command(*arguments):
    return measure.main([str(argument) for argument in arguments])


def surprise(logits_V, token):
    return np.log(np.exp(logits_V - logits_V.max()).sum()) + logits_V.max() - logits_V[token]


def expected_losses(name, examples):
    """Return the surprise at every predicted token of a microbatch, text by text, in numpy."""
    tensors = tensors_of(FOLDERS[name])
    losses = []
    if name == "bert":
        for inputs_T, length, (position,), (word,) in zip(*map(np.asarray, examples), strict=True):
            logits_TxV = bert_logits(BERT, tensors, inputs_T[:length])
            losses.append(surprise(logits_TxV[position], word))
        return losses
    for tokens_T, length in zip(*map(np.asarray, examples), strict=True):
        logits_TxV = getattr(Published(tensors, 2), name)(tokens_T[:length])
        losses += [surprise(logits_TxV[t], tokens_T[t + 1]) for t in range(length - 1)]
    return losses


def text_subject(files, name, texts="texts.jsonl", length=64, seed=0, **overrides):
    overrides = {f"flatness.{key}": value for key, value in overrides.items()}
    return measured_texts.text_subject(files / name, files / texts, length, seed, overrides)


def expected_loss(name, batches):
    """Return the mean of microbatches' predictions, and the standard error of a ratio."""
    num_microbatches = len(batches[0])
    groups = [expected_losses(name, [x[m] for x in batches]) for m in range(num_microbatches)]
    weights_M, sums_M = (np.array([f(g) for g in groups]) for f in (len, np.sum))
    mean = sums_M.sum() / weights_M.sum()
    squares = ((sums_M - mean * weights_M) ** 2).sum()
    return mean, np.sqrt(num_microbatches / (num_microbatches - 1) * squares) / weights_M.sum()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.slow
def test_the_loss_is_the_mean_surprise_at_what_is_predicted(files, name):
    subject = text_subject(files, name, num_microbatches=3)
    assert subject.about == f"{name}, 3 microbatches of 2 of 6 texts, labels data"
    problem = subject.problem
    batches = problem.sample(0)
    loss = mean_loss(problem.loss_fn, problem.params, batches)
    np.testing.assert_allclose((loss.mean, loss.sem), expected_loss(name, batches), rtol=1e-4)
    assert loss.num_samples == 3


@pytest.mark.slow
def test_the_command_writes_strict_json_and_pictures(files, tmp_path, capsys):
    where = (f"--checkpoint={files / 'gpt2'}", f"--data={files / 'texts.jsonl'}")
    how = ("--config.flatness.slices.num_points=5", "--config.flatness.slices.num_directions=2")
    new = tmp_path / "new" / "folder"
    out = (f"--json={new / 'out.json'}", f"--figures={new / 'figures'}")
    assert command(*where, *how, *out, "--measures=fisher_trace,loss_slices") == 0
    written = strict_json(new / "out.json")
    assert written["about"] == "gpt2, 6 microbatches of 1 of 6 texts, labels data"
    mean, sem = expected_loss("gpt2", text_subject(files, "gpt2").problem.sample(0))
    half = stats.t.ppf(0.975, 5) * sem
    expected = {"mean": mean, "sem": sem, "low": mean - half, "high": mean + half}
    expected = {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    others = {k: v for k, v in written["measured"].items() if not k.startswith("fisher_trace")}
    assert others == {"loss": {**expected, "num_samples": 6, "over": "sentences"}}
    curves = written["curves"]["loss_slices"]
    np.testing.assert_allclose(curves["steps_G"], np.linspace(-1, 1, 5))
    rises_DxG = np.array(curves["rises_DxG"])
    assert rises_DxG.shape == np.shape(curves["lows_DxG"]) == (2, 5)
    np.testing.assert_allclose(rises_DxG[:, 2], 0, atol=1e-6)
    assert (np.abs(rises_DxG[:, [0, 1, 3, 4]]) > 1e-3).all()
    pictures = {path.name: path.read_bytes() for path in (new / "figures").iterdir()}
    assert sorted(pictures) == ["loss_slices.png", "loss_slices.svg"]
    assert pictures["loss_slices.png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert b"<svg" in pictures["loss_slices.svg"]
    said = capsys.readouterr().out
    assert said.startswith(written["about"])
    assert f"{mean:.4g}"[:4] in said
    assert said.count("figure /") == 2
    assert "no figure: fisher_trace (single numbers)" in said


@pytest.mark.slow
def test_the_loss_on_the_line_to_another_checkpoint(files, tmp_path, capsys):
    """It ends at the difference of the two losses; toward itself it stays at 0."""
    where = (f"--data={files / 'texts.jsonl'}", "--measures=loss_path")
    ways = {"other": (files / "gpt2", files / "other"), "itself": (files / "gpt2",) * 2}
    measured = {}
    for name, (start, end) in ways.items():
        out = (f"--json={tmp_path / 'out.json'}", f"--figures={tmp_path / name}")
        assert command(f"--checkpoint={start}", f"--toward={end}", *where, *out) == 0
        measured[name] = strict_json(tmp_path / "out.json")["measured"]
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "loss_path.png",
            "loss_path.svg",
        ]
    assert (
        command(f"--checkpoint={files / 'other'}", *where[:1], *out, "--measures=loss_slices") == 0
    )
    end_loss = strict_json(tmp_path / "out.json")["measured"]["loss"]["mean"]
    of_other = measured["other"]
    change = end_loss - of_other["loss"]["mean"]
    assert abs(change) > 0.01
    assert of_other["loss_change"]["mean"] == pytest.approx(change, abs=1e-5)
    assert of_other["loss_barrier"]["mean"] >= 0
    for name in ("loss_barrier", "loss_change"):
        assert measured["itself"][name]["mean"] == pytest.approx(0, abs=1e-6)
    assert "loss_barrier" in capsys.readouterr().out


def test_a_missed_precision_and_unconverged_chains_are_reported():
    settings = SimpleNamespace(relative_error=0.05, max_rounds=2)
    one = jnp.float32(1.0)
    wide = Estimate(one, jnp.float32(0.1), 10**6, "probes")
    (line,) = remarks(
        {"hessian_trace": wide, "fisher_trace": Estimate(one, 0 * one, 9, "probes")}, settings
    )
    assert line.startswith("hessian_trace: ±19.60% after 1000000 samples, not relative_error=5.00%")
    settings.relative_error = 0.0
    assert remarks({"hessian_trace": wide}, settings) == []
    names = (f"local_learning_coefficient{n}" for n in ("", "/r_hat", "/effective_samples"))
    estimates = {
        name: Estimate(jnp.float32(value), jnp.float32(jnp.nan), 4, "chains")
        for name, value in zip(names, (1.0, 1.2, 30), strict=True)
    }
    assert remarks(estimates, settings) == []
    estimates["local_learning_coefficient"] = Estimate(one * jnp.nan, one * jnp.nan, 4, "chains")
    (line,) = remarks(estimates, settings)
    assert line == (
        "local_learning_coefficient: no value, because R-hat is 1.200 and there are 30 effective "
        "samples, not below 1.05 and at least 100; raise num_draws"
    )
    nothing = estimates["local_learning_coefficient"]
    (line,) = remarks(dict.fromkeys(estimates, nothing), settings)
    assert line == (
        "local_learning_coefficient: no value, because the Hessian has no positive eigenvalue, the "
        "unit of the localization, or the loss is not a number"
    )


def test_former_keys_of_the_learning_coefficient_in_a_config_of_a_run_are_dropped(tmp_path):
    """Configs hold every key, so each run made before has them."""
    config = tiny_config()
    config.flatness.learning_coefficient.num_chains = 3
    stored = config.to_dict()
    stored["flatness"]["learning_coefficient"] |= {"num_burnin": 200, "localization": 100.0}
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    assert saved_run.read_config(tmp_path / "config.json").flatness == config.flatness


def test_nan_is_null():
    value, nothing = jnp.float32(1.5), jnp.float32(jnp.nan)
    shown = as_json(Estimate(value, nothing, 4, "chains"))
    empty = {"sem": None, "low": None, "high": None}
    assert shown == {"mean": 1.5, **empty, "num_samples": 4, "over": "chains"}
    json.dumps(as_json(Estimate(-nothing, jnp.float32(jnp.inf), 4, "seeds")), allow_nan=False)


@pytest.mark.slow
def test_one_failed_measure_leaves_the_others(files, tmp_path, capsys):
    where = (f"--checkpoint={files / 'gpt2'}", f"--data={files / 'texts.jsonl'}")
    pairs = "--config.flatness.eigenvalues.num_largest=5000"
    steps = "--config.flatness.eigenvalues.num_steps=6000"  # the model has fewer parameters
    out = tmp_path / "out.json"
    assert command(*where, pairs, steps, "--measures=hessian_eigenvalues", f"--json={out}") == 3
    assert set(strict_json(out)["measured"]) == {"loss"}
    progress, line = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[1/1\] hessian_eigenvalues \.\.\. \d+\.\d s", progress)
    start = (
        "failed: hessian_eigenvalues: 5000 largest and 1 smallest eigenvalues need at least 5001"
    )
    assert line.startswith(start)


def test_rounds_share_no_text_and_the_seed_decides_the_order(files):
    texts = [[1 + i // 12, 1 + i % 12] for i in range(100)]
    write_texts(files / "many.jsonl", texts)
    settings = {"num_microbatches": 3, "microbatch_size": 8, "relative_error": 0.1}

    def rounds(**how):
        subject = text_subject(files, "gpt2", "many.jsonl", **how, **settings)
        assert subject.config.flatness.max_rounds == 4
        batches = [subject.problem.sample(i).tokens_BxT for i in range(4)]
        assert {batch.shape for batch in batches} == {(3, 8, 2)}
        return np.concatenate([np.reshape(batch, (-1, 2)) for batch in batches]).tolist()

    used = rounds()
    assert len({tuple(text) for text in used}) == len(used) == 96
    assert all(text in texts for text in used)
    assert rounds() == used
    assert rounds(seed=1) != used


def test_masks_hide_one_ordinary_token_uniformly():
    num_texts, text = 3000, [CLS, 5, 6, 7, 8, SEP, 0]
    tokens_NxT = np.tile(np.array(text, np.int32), (num_texts, 1))
    ordinary_NxT = np.tile([False, True, True, True, True, False, False], (num_texts, 1))
    texts = TokenTexts(tokens_NxT, np.full(num_texts, 6, np.int32), ordinary_NxT)
    hidden = measured_texts.mask_texts(builders.purpose_key(0, "test"), texts, MASK)
    changed_NxT = hidden.inputs_BxT != tokens_NxT
    positions_N = hidden.positions_Bx1[:, 0]
    np.testing.assert_array_equal(changed_NxT.argmax(1), positions_N)
    np.testing.assert_array_equal(changed_NxT.sum(1), 1)
    np.testing.assert_array_equal(hidden.inputs_BxT[changed_NxT], MASK)
    np.testing.assert_array_equal(hidden.words_Bx1[:, 0], np.array(text)[positions_N])
    counts = np.bincount(positions_N, minlength=7)
    assert counts[[0, 5, 6]].sum() == 0
    assert stats.chisquare(counts[1:5]).pvalue > 0.001
    np.testing.assert_array_equal(tokens_NxT, np.tile(text, (num_texts, 1)))


STEP, TEXT = "{files}/run/checkpoints/7", "--data={files}/texts.jsonl"
BAD = {
    "{files}/none": "--checkpoint={files}/none is neither",
    "{files}/gpt2/config.json": "is neither POINT/checkpoints/STEP of a run nor a folder with",
    "{files}/run/checkpoints/9": "{files}/run/checkpoints/9: no such checkpoint; its .* are 7$",
    "{files}/run": "--checkpoint={files}/run is a run: its checkpoints/STEP are 7$",
    "{files}/cut/checkpoints/7": "{files}/cut/config.json: unusable as a run's config.json",
    "{files}/no_run/checkpoints/7": "{files}/no_run/config.json: unusable as a run's config",
    "{files}/gpt2": "--data=FILE is missing",
    f"{STEP} {TEXT}": "--data is for Hugging Face folders; a run has its own language",
    f"{STEP} --length=8": "--length is for Hugging Face folders; a run has its own sentences",
    f"{STEP} --config.flatness.relative_error=0.1 --config.flatness.num_microbatches=8 "
    "--config.flatness.max_rounds=4": (
        "relative_error=0.1 takes 128 samples or more; max_rounds=4 of num_microbatches=8 make 32"
    ),
    f"{STEP} --config.model.width=8": "--config.model.width: only keys of flatness",
    f"{STEP} --config.flatness.labels=mine": "flatness.labels: 'mine' is not one of exact, model",
    f"{STEP} --config.flatness.widht=8": "flatness.widht is not a config key; nearest",
    f"{STEP} --config.flatness.labels=model --measures=gradient_noise": (
        "flatness.labels='model' leaves gradient_noise without meaning"
    ),
    "{files}/gpt2 --data={files}/none.jsonl": "{files}/none.jsonl: no such file",
    "{files}/gpt2 --data={files}/damaged.jsonl": "{files}/damaged.jsonl: line 2 must be a list",
    "{files}/gpt2 --data={files}/beyond.jsonl": "{files}/beyond.jsonl: line 7 .* in 0..12",
    "{files}/gpt2 --data={files}/one.jsonl": "{files}/one.jsonl: one text; errors need two",
    "{files}/gpt2 --data={files}/single.jsonl": "{files}/single.jsonl: line 7 has a single token",
    "{files}/gpt2 --data={files}": "{files}: Is a directory",
    "{files}/no_weights --data={files}/damaged.jsonl": "{files}/damaged.jsonl: line 2 must be",
    f"{{files}}/no_weights {TEXT}": "{files}/no_weights/model.safetensors: no such file",
    f"{{files}}/no_mask {TEXT}": r"{files}/no_mask/tokenizer.json: has no token \[MASK\]",
    f"{{files}}/mask_beyond {TEXT}": r"\[MASK\] is token 22; the model has 0..12",
    f"{{files}}/no_tokenizer {TEXT}": "{files}/no_tokenizer/tokenizer.json: no such file",
    f"{{files}}/gpt2 {TEXT} --toward={{files}}/opt": "--toward=DIR and --measures=loss_path need",
    f"{{files}}/gpt2 {TEXT} --measures=loss_path": "--toward=DIR and --measures=loss_path need",
    f"{{files}}/gpt2 {TEXT} --measures=loss_path --toward={{files}}/none": "is neither POINT/",
    f"{{files}}/gpt2 {TEXT} --measures=loss_path --toward={{files}}/opt": (
        "--toward={files}/opt is another model: activation='relu', not 'gelu"
    ),
    f"{{files}}/gpt2 {TEXT} --measures=loss_path --toward={{files}}/bert": (
        "is another model: a Bert, not a CausalTransformer"
    ),
    f"{{files}}/gpt2 {TEXT} --measures=loss_path --toward={{files}}/heads": (
        "--toward={files}/heads is another model: num_heads=4, not 2"
    ),
    f"{{files}}/gpt2 {TEXT} --measures=hessian": "--measures: 'hessian' is not one of",
    f"{{files}}/gpt2 {TEXT} --measures=": "--measures: '' is not one of hessian_trace",
    f"{{files}}/gpt2 {TEXT} --json={{files}}/one.jsonl/x": "--json: {files}/one.jsonl is a file",
    f"{{files}}/gpt2 {TEXT} --json={{files}}": "--json={files} is a folder; it must be a file",
    f"{{files}}/gpt2 {TEXT} --figures={{files}}/one.jsonl": "is a file; it must be a folder",
    f"{{files}}/gpt2 {TEXT} --length=1": "--length=1 must be at least 2",
    f"{{files}}/gpt2 {TEXT} --length=long": "argument --length: invalid int value: 'long'",
    f"{{files}}/gpt2 {TEXT} --seed=-1": "--seed=-1 must be at least 0",
    f"{{files}}/gpt2 {TEXT} --lenght=8": "--lenght=8: not an argument",
    f"{{files}}/gpt2 {TEXT} --config.flatness.labels=exact": "labels='exact' is for a run's",
    f"{{files}}/gpt2 {TEXT} --config.flatness.microbatch_size=0": "microbatch_size=0 must be at",
    f"{{files}}/gpt2 {TEXT} --config.flatness.num_microbatches=1": "num_microbatches=1 must be at",
    f"{{files}}/gpt2 {TEXT} --config.flatness.slices.num_points=1": "num_points=1 must be at",
    f"{{files}}/gpt2 {TEXT} --config.flatness.max_rounds=0": "flatness.max_rounds=0 must be at",
    f"{{files}}/gpt2 {TEXT} --config.flatness.num_microbatches=3 --measures=gradient_noise": (
        "flatness.num_microbatches=3 must .* gradient_noise, .*: --config.flatness.num_mic"
    ),
    f"{{files}}/gpt2 {TEXT} --config.flatness.labels=model --measures=loss_slices": (
        "flatness.labels='model' leaves loss_slices without meaning"
    ),
    f"{{files}}/gpt2 {TEXT} --config.flatness.labels=model --measures=loss_path "
    "--toward={files}/other": "flatness.labels='model' leaves loss_path without meaning",
    f"{{files}}/gpt2 {TEXT} --measures=hessian_eigenvalues "
    "--config.flatness.eigenvalues.num_steps=5": "num_steps=5 is less than",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_exit_code_2(files, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    before = sorted(files.rglob("*"))
    checkpoint, *rest = arguments.format(files=files).split(" ")
    out = ("--json=out.json", "--figures=drawn")
    assert command(*out, f"--checkpoint={checkpoint}", *rest) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(BAD[arguments].format(files=files), line)
    assert sorted(files.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_figures_without_an_output_are_refused(files, capsys):
    where = (f"--checkpoint={files / 'gpt2'}", f"--data={files / 'texts.jsonl'}")
    assert command(*where, "--measures=loss_slices") == 2
    assert "loss_slices makes figures: set --figures or --json" in capsys.readouterr().err
