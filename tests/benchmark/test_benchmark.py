"""The benchmark: its count of operations, its figures, and one line for bad input."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxflat.benchmark import calibration, languages, machine
from jaxflat.benchmark.__main__ import main
from jaxflat.benchmark.calibration_problems import logistic_regression
from jaxflat.benchmark.calibration_table import QUANTITIES
from jaxflat.benchmark.workload import Shape, resolved_config, step_flops
from jaxflat.flatness import TraceTerms, ratio_estimate
from jaxflat.languages import LANGUAGES
from jaxflat.languages.batches import sampled_batch
from jaxflat.runs import builders
from jaxflat.runs.languages import make_language
from tests.support.tiny_checkpoints import BERT, save, tensors_of

TINY_GRAMMAR = {"level_sizes": (3, 5, 5, 5), "num_words": 30, "length": 8, "tasks": ((), (0, 4))}
# Of eight devices only one shares 11 sentences evenly: compiling for one is several times as fast.
TINY = ["--width=8", "--layers=1", "--head_size=4", "--batch=11", "--length=4", "--words=8"]
FIGURES = {
    "machine/matmul_gflops",
    "training/sentences_per_s",
    "training/matmul_share",
    "training/step_ms",
    "training/gauss_newton_penalty_in_steps",
    "flatness/hvp_probe_in_gradients",
    "flatness/ggn_probe_in_gradients",
    "flatness/fisher_sample_in_gradients",
    "flatness/hessian_form_in_gradients",
    "flatness/gradient_ms",
    "flatness/hvp_first_pass_in_gradients",
    "flatness/probe_memory_in_gradients",
    "flatness/hessian_form_memory_in_gradients",
    "flatness/forward_form_memory_in_gradients",
}
LANGUAGE_FIGURES = {
    "languages/pcfg_sampled_per_s",
    "languages/pcfg_conditionals_16_per_s",
    "languages/pcfg_conditionals_32_per_s",
    "languages/hmm_conditionals_per_s",
    "languages/pcfg_next_symbols_16_per_s",
    "languages/hmm_next_symbols_per_s",
    "languages/official_labels_per_s",
}
NLTK_FIGURES = {"languages/nltk_chart_per_s", "languages/official_labels_in_nltk"}
PEER_FIGURES = {"training/peer_sentences_per_s", "training/sentences_per_s_over_peer"}
TORCH_FIGURES = {
    "flatness/hvp_probe_ms",
    "flatness/curvlinops_product_ms",
    "flatness/torch_gradient_ms",
    "flatness/curvlinops_over_hvp_probe",
    "flatness/ggn_trace_to_2_percent_s",
    "flatness/official_trace_to_2_percent_s",
    "flatness/official_over_ggn_trace",
}
OF_TORCH = {"gradient_ms": 1.0, "product_ms": 6.0, "sample_ms": 30.0, "samples": [9.0, 11.0]}


def loss_and_arguments(shape: Shape):
    config = resolved_config(shape)
    loss_fn, _ = builders.loss_functions(builders.make_model(config))
    language = make_language(config.language)
    params = jax.eval_shape(lambda: builders.init_params(config))
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(lambda k: sampled_batch(language, k, shape.batch, "sampled"), key)
    return loss_fn, params, batch


def full_sentences(shape: Shape) -> np.ndarray:
    return np.zeros((2, shape.length), int)


def product_flops(jaxpr, times: int = 1) -> int:
    """Count the matrix products of a jaxpr; products in loops count once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval, equation.outvars[0].aval
            depth = math.prod(left.shape[axis] for axis in contracted)
            total += times * 2 * math.prod(result.shape) * depth
        inner_times = times * equation.params.get("length", 1)
        for inner in jaxprs_in_params(equation.params):
            total += product_flops(inner, inner_times)
    return total


@pytest.mark.parametrize(
    "shape", [Shape(16, 3, 4, 8, 6, 10), Shape(8, 1, 8, 4, 5, 12), Shape(12, 4, 6, 2, 3, 7)]
)
@pytest.mark.slow
def test_a_steps_matrix_products_are_counted(shape):
    loss_fn, params, batch = loss_and_arguments(shape)
    step = jax.make_jaxpr(jax.grad(loss_fn, has_aux=True))(params, batch)
    assert product_flops(step.jaxpr) == step_flops(shape, full_sentences(shape))


def test_the_compiler_counts_as_many_operations_forward():
    """It also counts norms, softmax and GELU: a few operations per activation."""
    shape = Shape(256, 2, 32, 4, 8, 200)
    loss_fn, params, batch = loss_and_arguments(shape)
    compiled = jax.jit(lambda p, b: loss_fn(p, b)[0]).lower(params, batch).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(
        step_flops(shape, full_sentences(shape)) / 3, rel=0.03
    )


@pytest.fixture
def tiny(monkeypatch):
    """Use matrix products and languages of the smallest sizes."""
    monkeypatch.setattr(machine, "CPU_SIZE", 128)
    grammar = {"level_sizes": (2, 3, 3), "num_words": 8, "length": 4, "min_length": 2}
    for name in ("FULL", "HALF", "SPARSE"):
        monkeypatch.setattr(languages, name, getattr(languages, name) | grammar | {"tasks": ((),)})
    hmm = {"num_states": 3, "num_words": 8, "length": 4, "min_length": 4}
    monkeypatch.setattr(languages, "HMM", languages.HMM | hmm)
    for name in ("BATCH", "SAMPLED"):
        monkeypatch.setattr(languages, name, 11)


def assert_figures(figures):
    for name, figure in figures.items():
        assert set(figure) == {"median", "min", "max", "unit"}
        assert figure["min"] <= figure["median"] <= figure["max"], name
        assert math.isfinite(figure["median"]), name
        assert figure["median"] > 0, name


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_figures(tmp_path, capsys):
    script = tmp_path / "peer.py"
    script.write_text("import sys\nprint(*sys.argv[1:])\nprint('peer: 250.5 sentences/s')")
    save(tmp_path / "bert", BERT, tensors_of(BERT))  # the files that the script would save
    torch = tmp_path / "python_with_torch"
    shell = f"cp {tmp_path}/bert/* ${{12}}\necho '{json.dumps(OF_TORCH)}'"
    torch.write_text(f"#!/bin/sh\n{shell}\n")
    torch.chmod(0o755)
    flags = [f"--json={tmp_path / 'figures.json'}", "--seconds=0.01", "--repeats=3"]
    others = [f"--peers={sys.executable}", f"--peer_script={script}", f"--torch={torch}"]
    assert main([*TINY, *flags, "training", "flatness", *others]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == FIGURES | PEER_FIGURES | TORCH_FIGURES
    assert figures["flatness/curvlinops_product_ms"]["median"] == 6
    assert figures["training/peer_sentences_per_s"]["median"] == 250.5
    assert_figures(figures)
    printed = capsys.readouterr().out
    assert all(name in printed for name in figures)
    assert f"jax {jax.__version__}" in printed


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("installed", [True, False], ids=["nltk", "no nltk"])
@pytest.mark.slow
def test_figures_of_languages(installed, tmp_path, capsys, monkeypatch):
    if installed:
        pytest.importorskip("nltk")
    else:
        monkeypatch.setitem(sys.modules, "nltk", None)
    file = tmp_path / "figures.json"
    assert main(["languages", f"--json={file}", "--seconds=0.01", "--repeats=2"]) == 0
    figures = json.loads(file.read_text())
    expected = LANGUAGE_FIGURES | (NLTK_FIGURES if installed else set())
    assert set(figures) == {"machine/matmul_gflops"} | expected
    assert_figures(figures)
    assert ("pip install nltk" in capsys.readouterr().out) != installed


CALIBRATED = {
    "hessian_trace",
    "hessian_trace_terms",
    "gauss_newton_trace",
    "fisher_trace",
    "average_sharpness",
    *(f"{trace}, half stop by {n}" for trace in calibration.STOPPED for n in (128, 256)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_figures_of_calibration(tmp_path, capsys, monkeypatch):
    problem = logistic_regression(num_features=4, size=2)
    monkeypatch.setattr(calibration, "make_problems", lambda: [problem])
    monkeypatch.setattr(calibration, "make_causal_problems", list)
    monkeypatch.setattr(calibration, "OVERS", ("probes+sentences",))
    monkeypatch.setitem(sys.modules, "matfree", None)
    file = tmp_path / "figures.json"
    short = ["--seconds=0.01", "--repeats=2", "--seeds=20"]
    assert main(["calibration", f"--json={file}", *short]) == 0
    figures = json.loads(file.read_text())
    start, end = "calibration/logistic_regression", "probes+sentences"
    rows = {f"{row}/{end}" for row in CALIBRATED} | {"excess_loss/sentences"}
    expected = {f"{start}/{row}/{q}" for row in rows for q in QUANTITIES}
    assert set(figures) == {"machine/matmul_gflops"} | expected
    for name, figure in figures.items():
        assert figure["min"] <= figure["median"] <= figure["max"], name
        if name.endswith("coverage"):
            assert figure["unit"] == "% of 20 seeds"
            assert figure["median"] > 60, name  # of 20 calibrated intervals, once in 1e8
    printed = capsys.readouterr().out
    assert "pip install matfree" in printed
    assert printed.count("| fisher_trace, half stop by 128 | probes+sentences |") == 2


def test_matfree_and_we_agree_on_the_error_of_the_same_samples():
    """Its standard error divides by the sample size, ours by one less."""
    peer = pytest.importorskip("jaxflat.benchmark.matfree_peer", exc_type=ImportError)
    diagonal, P = np.float32(np.arange(1, 9)), 8
    matrix = np.diag(diagonal) + np.float32(0.1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        estimator, num_vectors = peer.hutchinson(matrix, 16)
        mean, sem = jax.jit(estimator)(jax.random.key(0))
    signs_NxP = jax.random.rademacher(jax.random.key(0), (num_vectors, P), jnp.float32)
    samples_N = diagonal.sum() + 0.1 * np.sum(np.asarray(signs_NxP), axis=1) ** 2
    ours = ratio_estimate(jnp.asarray(samples_N), jnp.ones(16), "probes")
    np.testing.assert_allclose(mean, ours.mean, rtol=1e-5)
    np.testing.assert_allclose(sem, ours.sem * np.sqrt(15 / 16), rtol=1e-4)


@pytest.mark.slow
def test_each_device_labels_its_part_as_one_would(monkeypatch):
    monkeypatch.setattr(languages, "BATCH", 10)
    language = LANGUAGES["pcfg"](1, **languages.SPARSE | TINY_GRAMMAR)
    assert languages._mesh().shape["data"] == 2
    split = languages._in_64_bits(languages._on_batch(languages._official_labels, language))()
    sentences = languages._batch_of(language)
    for labels, task in zip(split, language.tasks.values(), strict=True):
        for found, expected in zip(labels, task.labels(sentences, "official"), strict=True):
            assert found.tolist() == expected.tolist()


@pytest.mark.slow
def test_the_parser_labels_as_we_do():
    peer = pytest.importorskip("jaxflat.benchmark.nltk_peer", exc_type=ImportError)
    language = LANGUAGES["pcfg"](1, **languages.SPARSE | TINY_GRAMMAR)
    sentences = language.sample(jax.random.key(1), 30)
    labels_B, valid_B = language.official_symbols(sentences, ())
    labeler = peer.NltkLabeler(language)
    lengths_B, tokens_BxT = sentences.lengths_B.tolist(), sentences.tokens_BxT.tolist()
    found = [labeler.label(words[:n]) for words, n in zip(tokens_BxT, lengths_B, strict=True)]
    assert valid_B.all()
    assert found == labels_B.tolist()
    assert len(set(found)) > 1


@pytest.mark.usefixtures("tiny")
@pytest.mark.slow
def test_runs_in_one_program_are_compared_on_request(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert (
        main(["sweep", *TINY, "--repeats=2", "--seconds=0.01", "--together=3", f"--json={file}"])
        == 0
    )
    figures = json.loads(file.read_text())
    assert set(figures) == {"machine/matmul_gflops", "sweep/3_together_over_in_turn"}
    assert_figures(figures)


@pytest.mark.slow
def test_each_call_takes_the_requested_steps():
    from jaxflat.benchmark.training import TrainingRuns

    runs = TrainingRuns(resolved_config(Shape(8, 1, 4, 11, 4, 8), together=2))
    for num_steps in (1, 3):
        losses = runs.train(num_steps)
        assert len(losses) == 2
        assert np.isfinite(losses).all()
    assert [int(call.state.step) for call in runs._calls.values()] == [4, 4]


BAD = {
    ("--width=30",): "--width=30 is not divisible by --head_size=4",
    ("--words=1",): "num_words must be >= 2; got 10, 1",
    ("sweep", "--together=1"): "--together=1 must be at least 2",
    ("--peer_script=x",): "--peer_script needs --peers",
    ("flatness", "--peers=python", "--peer_script=x"): "--peers compares training",
    ("--peers=no-such-python", "--peer_script=x"): "--peers=no-such-python is not a program",
    ("languages", "--torch=python"): "--torch compares flatness",
    ("--torch=no-such-python",): "--torch=no-such-python is not a program",
    ("calibration", "--seeds=1"): "--seeds=1: a coverage needs at least 2",
    ("--json=setup.cfg/x.json",): "--json: setup.cfg is a file; it must be a folder",
}


@pytest.mark.parametrize("arguments", BAD, ids=lambda a: a[0])
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, capsys):
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert BAD[arguments] in error


@pytest.mark.parametrize("argument", ["trainign", "--repeats=0", "--widht=8"])
def test_unparsable_arguments_are_one_line_and_exit_code_2(argument, capsys):
    assert main([argument]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert argument.strip("-").partition("=")[0] in line


@pytest.mark.parametrize(
    ("script", "complaint"),
    [("print('fast')", "it is 'fast'"), ("raise OSError('no torch')", "exited with 1: OSError")],
)
def test_a_peer_that_fails_is_one_line(script, complaint, tmp_path):
    from jaxflat.benchmark.peers import Peer
    from jaxflat.config.validation import InputError

    (tmp_path / "peer.py").write_text(script)
    peer = Peer(sys.executable, tmp_path / "peer.py")
    with pytest.raises(InputError, match=complaint):
        peer.sentences_per_s(Shape(8, 1, 4, 11, 4, 8), tmp_path / "sentences.npy")


def test_an_interpreter_without_torch_is_refused_before_timing(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"No module named 'torch'\" >&2\nexit 1\n")
    python.chmod(0o755)
    assert main(["training", f"--peers={python}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: --peers={python} cannot 'import numpy, torch, transformers': "
        "No module named 'torch'"
    )


def test_without_torch_there_is_one_line():
    from jaxflat.benchmark import flatness_peers
    from jaxflat.config.validation import InputError

    python = str(shutil.which("false"))
    with pytest.raises(InputError, match="needs torch, transformers and curvlinops"):
        flatness_peers._run(python, Shape(8, 1, 4, 11, 4, 8), 0, "folder")


def test_each_round_of_torch_draws_other_samples(tmp_path):
    """The script gets the round's number as its seed."""
    from jaxflat.benchmark import flatness_peers

    python = tmp_path / "python_with_torch"
    python.write_text("#!/bin/sh\nshift $(($# - 3))\necho '{\"samples\": ['$1', '$2']}'\n")
    python.chmod(0o755)
    shape = Shape(8, 1, 4, 11, 4, 8)
    found = [flatness_peers._run(str(python), shape, i, "folder")["samples"] for i in range(3)]
    assert found == [[flatness_peers.NUM_SAMPLES, i] for i in range(3)]


def test_seconds_to_a_precision_follow_from_the_measured_errors(monkeypatch):
    """Ours: an error of 1 in 50 is the requested one. Theirs: variance 2 / (2% of 10)^2 is 50."""
    from jaxflat.benchmark import flatness_peers

    monkeypatch.setattr(flatness_peers, "_run", lambda *_: OF_TORCH)
    monkeypatch.setattr(flatness_peers.time, "perf_counter", iter(range(10)).__next__)
    terms = TraceTerms(jnp.asarray([49.0, 51.0]), jnp.ones(2), "probes+sentences")
    monkeypatch.setattr(flatness_peers, "trace_of_saved", lambda *_: lambda _: terms)
    probes = SimpleNamespace(seconds=lambda _: (0.002, 0.005))
    shape = Shape(8, 1, 4, 11, 4, 8)
    figures = flatness_peers.compare_with_torch(shape, "python", 1, probes, 1)
    assert figures["flatness/curvlinops_over_hvp_probe"].median == pytest.approx(3)
    assert figures["flatness/ggn_trace_to_2_percent_s"].median == pytest.approx(1)
    assert figures["flatness/official_trace_to_2_percent_s"].median == pytest.approx(0.03 * 50)
