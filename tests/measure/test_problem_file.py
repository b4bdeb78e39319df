"""`measure --problem`: numbers of known losses, docs/extending.md's file, and one-line errors."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from jaxflat.config import loading
from jaxflat.flatness import fisher_trace, hessian_trace_terms
from jaxflat.flatness.trees import path_name
from jaxflat.measure import __main__ as measure
from jaxflat.measure import problem_file
from tests.measure.test_measure import command, signals_stay_as_they_are, strict_json

__all__ = ["signals_stay_as_they_are"]

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
QUADRATIC = """
import jax
import jax.numpy as jnp

from jaxflat.flatness import Problem

CURVATURES = {"first": jnp.array([1.0, 2.0]), "second": jnp.array([5.0])}


def loss_fn(params, batch):
    def squares(a, w, x):
        return (a[None] * (w[None] - x) ** 2).sum()

    sums = jax.tree.map(squares, CURVATURES, params, batch)
    return sum(jax.tree.leaves(sums)) / 2, jnp.asarray(4.0)


def batches(i):
    keys = jax.random.split(jax.random.key(i))
    return {
        "first": jax.random.normal(keys[0], (64, 4, 2)),
        "second": jax.random.normal(keys[1], (64, 4, 1)),
    }


def get_problem():
    return Problem.from_batches(loss_fn, jax.tree.map(jnp.ones_like, CURVATURES), batches)
"""


@pytest.fixture
def quadratic(tmp_path):
    """Return a function that writes the file of a quadratic loss, with (old, new) text."""

    def write(replacement=("", ""), name="own.py"):
        assert replacement[0] in QUADRATIC
        (tmp_path / name).write_text(
            QUADRATIC.replace(*replacement) if replacement[0] else QUADRATIC
        )
        return tmp_path / name

    return write


def test_a_quadratic_loss_has_its_trace_by_group(quadratic, tmp_path, capsys):
    out = tmp_path / "out.json"
    how = ("--measures=hessian_trace", f"--json={out}")
    assert command(f"--problem={quadratic()}", *how) == 0
    written = strict_json(out)
    assert written["about"] == "own.py, 3 parameters, 64 microbatches"
    traces = {"hessian_trace": 8, "hessian_trace/first": 3, "hessian_trace/second": 5}
    assert written["measured"].keys() == {"loss", *traces}
    for name, trace in traces.items():
        assert written["measured"][name]["mean"] == pytest.approx(trace, rel=1e-5)
        assert written["measured"][name]["num_samples"] == 64
    loss = written["measured"]["loss"]  # (1 + 2 + 5) E (1 - x)^2 / 2 = 8
    assert loss["low"] < 8 < loss["high"]
    said = capsys.readouterr().out
    assert said.startswith(written["about"])
    assert re.search(r"hessian_trace +8 .* probes\+sentences", said)


@pytest.mark.parametrize(
    ("params", "groups"),
    [
        (jnp.ones(3), None),
        ({"w": jnp.ones(3)}, None),
        ({"a": {"w": 1.0, "b": 2.0}, "c": 3.0}, ["a", "a", "c"]),
        ({"layers": [{"w": 1.0, "b": 2.0}, {"w": 1.0}]}, ["layers/0", "layers/0", "layers/1"]),
    ],
)
def test_groups_are_of_the_first_level_with_several_entries(params, groups):
    found = [
        [group(path_name(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for group in problem_file.default_groupings(params)
    ]
    assert found == ([groups] if groups else [])


def test_rounds_are_drawn_until_precise(quadratic, tmp_path):
    out = tmp_path / "out.json"
    how = ("--config.flatness.relative_error=0.1", "--config.flatness.by_block=False")
    assert (
        command(f"--problem={quadratic()}", "--measures=hessian_trace", *how, f"--json={out}") == 0
    )
    measured = strict_json(out)["measured"]
    assert measured.keys() == {"loss", "hessian_trace"}
    assert measured["hessian_trace"]["num_samples"] == 128  # the rule needs at least as many


def test_an_exception_in_a_later_round_ends_only_its_measure(quadratic, tmp_path, capsys):
    out = tmp_path / "out.json"
    file = quadratic(("(64,", "(16,"))  # 8 rounds for the least number of samples
    file.write_text(file.read_text().replace("jax.random.key(i)", "jax.random.key([0, 1][i])"))
    how = ("--config.flatness.relative_error=1e-6", f"--json={out}")
    assert command(f"--problem={file}", "--measures=hessian_trace,gradient_noise", *how) == 3
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("failed: "))
    reason = "IndexError: list index out of range (own.py, line 19)"
    assert line == f"failed: hessian_trace: {file}: {reason}"
    assert "gradient_noise/noise_scale" in strict_json(out)["measured"]


def test_round_0_is_drawn_once_for_all_measures(quadratic, capsys):
    file = quadratic(("def batches(i):\n", "def batches(i):\n    print('drawn', i)\n"))
    assert command(f"--problem={file}", "--measures=gradient_noise,critical_sharpness") == 0
    assert re.findall(r"drawn (\d)", capsys.readouterr().out) == ["0"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return a folder with docs/extending.md's file and a checkpoint of its model."""
    section = PAGE.partition("\n## Any JAX model\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "classifier.py").write_text(code)
    module = loading.import_file(str(folder / "classifier.py"))
    for step in (5, 10):
        params = module.model.init(jax.random.key(step), jnp.zeros((1, 16)))["params"]
        (folder / f"step{step}").write_bytes(serialization.to_bytes(params))
    return folder, module


@pytest.mark.slow
def test_the_file_of_the_docs_is_measured_as_by_the_estimators(classifier, tmp_path, capsys):
    folder, module = classifier
    problem = f"--problem={folder / 'classifier.py'}"
    numbers = []
    for seed in ((), ("--seed=1",)):
        out = tmp_path / "out.json"
        where = (problem, f"--checkpoint={folder / 'step5'}")
        assert command(*where, *seed, f"--json={out}") == 0
        numbers.append(strict_json(out)["measured"])
    measured, other = numbers
    assert capsys.readouterr().out.startswith(f"classifier.py, {folder / 'step5'}, 874 parameters")
    made = module.get_problem(folder / "step5")
    key = jax.random.fold_in(made.key, 0)  # traces have a key for each round
    args = made.params, made.sample(0), key
    with jax.default_matmul_precision("highest"):
        options = {"num_probes": 4, "probes_per_pass": 4}
        terms = hessian_trace_terms(module.loss_fn, *args, **options)
        fisher = fisher_trace(module.log_probs_fn, *args, num_samples=4, samples_per_pass=4)
    for name, estimate in {"hessian_trace": terms.total(), "fisher_trace": fisher}.items():
        np.testing.assert_allclose(measured[name]["mean"], estimate.mean, rtol=1e-5)
        np.testing.assert_allclose(measured[name]["sem"], estimate.sem, rtol=1e-4)
        assert measured[name]["num_samples"] == 32
        assert other[name]["mean"] != measured[name]["mean"]  # other probes
        assert abs(other[name]["mean"] / measured[name]["mean"] - 1) < 0.2
    assert {"hessian_trace/hidden", "fisher_trace/output"} <= measured.keys()
    assert other["loss"] == measured["loss"]


RETURN = "return Problem.from_batches(loss_fn, jax.tree.map(jnp.ones_like, CURVATURES), batches)"
FIXED = (RETURN, RETURN.replace("batches)", "batches(0))"))
UNEQUAL = (RETURN, RETURN.replace("batches)", "[{'a': jnp.ones(3)}, {'a': jnp.ones(2)}])"))
BAD_FILES = {
    "no function": (("def get_problem", "def get_it"), "has no function get_problem"),
    "syntax": (("def get_problem():", "def get_problem(:"), r"SyntaxError: .*line 26\)"),
    "import": (("import jax\n", "import jaxx\n"), r"No module named 'jaxx' \(own.py, line 2\)"),
    "exception": ((RETURN, "return {}['params']"), r"KeyError: 'params' \(own.py, line 27\)"),
    "wrong type": ((RETURN, "return loss_fn, 3"), "must return a jaxflat.flatness.Pr.*, not a tup"),
    "checkpoint": (("get_problem()", "get_problem(path)"), "get_problem has parameters: set --ch"),
    "bug": (("/ 2, ", "/ two, "), r"NameError: name 'two' is not defined \(own.py, line 15\)"),
    "shapes": (("(64, 4, 2)", "(64, 4, 3)"), r"TypeError: .*\(1, 2\), \(4, 3\).*\(own.py, line 12"),
    "unequal batches": (UNEQUAL, r"batches\[1\] has the shapes .* last batch \(own.py, line 27\)"),
    "num_examples": (
        (RETURN, RETURN.replace("batches)", "batches, num_examples='many')")),
        r"num_examples must be a whole number of at least 2, not 'many' \(own.py, line 27\)",
    ),
    "one microbatch": (("(64,", "(1,"), "needs at least 2 microbatches"),
    "a mean loss": ((", jnp.asarray(4.0)", ""), r"pass jaxflat.flatness.from_mean_loss\(loss_fn"),
    "an iterator": (
        (RETURN, RETURN.replace("batches)", "iter([batches(0)]))")),
        "list_iterator, not",
    ),
    "whole numbers": (("ones_like, CURV", "int32, CURV"), "params/first has dtype int32; "),
}
BAD_FLAGS = {
    "--measures=loss_slices,fisher_trace --json=x": r"fisher_trace needs log_probs_fn\(params, ba",
    "--measures=local_learning_coefficient": "needs num_examples, the number of training examples",
    "--measures=loss_path": "loss_path needs the parameters at its end: Problem.toward",
    "--config.flatness.relative_error=0.1 --config.flatness.max_rounds=1": (
        "relative_error=0.1 takes 128 samples or more; max_rounds=1 of num_microbatches=64 make 64"
    ),
    "--config.flatness.num_microbatches=8": "num_microbatches has no effect with --problem: .*own",
    "--config.flatness.labels=model": "labels has no effect with --problem: .*own.py decides",
    "--config.model.width=8": "--config.model.width: only keys of flatness",
    "--config.flatness.widht=8": "flatness.widht is not a config key",
    "--data=x.txt": "--data has no effect with --problem: its file gives the batches",
    "--toward=x": "--toward has no effect with --problem: its file gives Problem.toward",
    "--checkpoint=x": r"get_problem takes no checkpoint: define get_problem\(checkpoint\)",
    "--checkpoint=x*": r"--checkpoint=x\*: no checkpoint matches",
}


def refusal(file, flags, capsys):
    """Return the one line on stderr of a command that stops with exit code 2."""
    asked = [] if any(flag.startswith("--measures") for flag in flags) else ["hessian_trace"]
    assert command(f"--problem={file}", *flags, *(f"--measures={name}" for name in asked)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line_with_its_line(quadratic, capsys, case):
    replacement, message = BAD_FILES[case]
    assert re.search(message, refusal(quadratic(replacement), [], capsys))


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_line_before_anything_is_written(
    quadratic, tmp_path, monkeypatch, capsys, flags
):
    monkeypatch.chdir(tmp_path)
    assert re.search(BAD_FLAGS[flags], refusal(quadratic(), flags.split(" "), capsys))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["own.py"]


@pytest.mark.parametrize(
    ("replacement", "flag", "message"),
    [
        (("(64,", "(5,"), "--measures=gradient_noise", "needs at least 6 microbatches"),
        (FIXED, "--config.flatness.relative_error=0.1", "give a function of the round"),
    ],
)
def test_batches_that_do_not_suffice_are_refused(quadratic, capsys, replacement, flag, message):
    assert message in refusal(quadratic(replacement), [flag], capsys)


@pytest.mark.parametrize(
    ("name", "message"), [("none.py", "no such file"), ("own.txt", "is Python and ends in .py")]
)
def test_a_file_that_is_no_python_file_is_refused(quadratic, capsys, name, message):
    assert message in refusal(quadratic(name="own.txt").with_name(name), [], capsys)


def test_neither_a_checkpoint_nor_a_problem_is_refused(capsys):
    assert measure.main([]) == 2
    assert capsys.readouterr().err == "error: set --checkpoint=DIR or --problem=FILE.py\n"


def test_an_exception_names_the_line_even_if_its_message_has_several(quadratic, capsys):
    file = quadratic((RETURN, "raise ValueError('first\\nsecond')"))
    assert refusal(file, [], capsys) == f"error: {file}: first (own.py, line 27)"
