"""A user's function as a choice in a config: its settings, its identity, and its refusals."""

import functools
import json

import jax
import optax
import pytest
from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import custom, functions, loading, validation
from jaxflat.config.validation import InputError

FILE = """
import functools

import numpy as np

from jaxflat import config as base_config
from jaxflat.config import custom

SCALE = 2.0
TABLE = {"offset": 1.0}
WEIGHTS = np.ones(3)

def helper(x):
    return x + 1

half = functools.partial(helper, x=1)
double = lambda x: 2 * x

def unused(x):
    return x

class Base:
    def size(self):
        return 3

class Model(Base):
    def __init__(self, width, gain=1.0):
        self.sizes = helper(width) * SCALE * gain, TABLE, WEIGHTS, half(), double(1)

def make(power):
    def model(width, gain=1.0):
        return width**power
    return model

def get_config(scale=None):
    config = base_config.base()
    config.model.own = custom(Model)
    config.model.name = "own"
    return config
"""


def measure(problem, scale=1.0, power=2, name="sum", sizes=(1, 2), key=None):
    return problem, scale, power, name, sizes


def majority(labels_N):
    return labels_N


def needs_more(problem, temperature):
    return problem, temperature


def has_default(problem="p"):
    return problem


def source_in(folder, text: str) -> str:
    (folder / "own.py").write_text(text)
    return str(loading.load(str(folder / "own.py"))[0].model.own.function)


def test_an_error_in_a_config_file_names_its_line(tmp_path, monkeypatch):
    """The last line of the file that was running, also if the error arises in a called function."""
    text = FILE.replace("    config.model.own = custom(Model)", "    config.model.own = custom(3)")
    line = text.splitlines().index("    config.model.own = custom(3)") + 1
    (tmp_path / "own.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for path in ("own.py", str(tmp_path / "own.py")):
        with pytest.raises(InputError, match=rf"must be a function.* \(own\.py, line {line}\)$"):
            loading.load(path)
    (tmp_path / "own.py").write_text("x = 1\nx.y\n")
    with pytest.raises(InputError, match=r"AttributeError: .* \(own\.py, line 2\)$"):
        loading.load("own.py")
    (tmp_path / "own.py").write_text("x = 1\n")
    with pytest.raises(InputError, match=r"get_config'$"):
        loading.load("own.py")


def test_settings_are_the_parameters_with_a_number_text_or_tuple():
    section = custom(measure, power=3)
    settings = {name: section[name] for name in section if name != "function"}
    assert settings == {"scale": 1.0, "power": 3, "name": "sum", "sizes": (1, 2)}
    assert functions.call(section, problem="p", seed=1) == ("p", 1.0, 3, "sum", (1, 2))


def test_the_identity_is_the_source_and_all_that_it_uses_of_its_file(tmp_path):
    source = source_in(tmp_path, FILE)
    assert source.startswith("Model ")
    assert source_in(tmp_path, FILE) == source
    for old, new in (("def unused(x)", "def unused(x, y)"), (".base()", ".base()  # ours")):
        assert source_in(tmp_path, FILE.replace(old, new)) == source
    for old, new in (
        *(("x + 1", "x + 2"), ("SCALE = 2.0", "SCALE = 3.0"), ("* gain", "/ gain")),
        *(("1.0}", "2.0}"), ("ones(3)", "ones(4)"), ("x=1)", "x=2)"), ("2 * x", "3 * x")),
        ("return 3", "return 4"),
    ):
        assert FILE.count(old) == 1
        assert source_in(tmp_path, FILE.replace(old, new)) != source, new


def test_the_identity_of_a_function_within_another_includes_what_it_uses_of_that(tmp_path):
    made = FILE.replace("custom(Model)", "custom(make(2))")
    source = source_in(tmp_path, made)
    assert source.startswith("model ")
    assert source_in(tmp_path, made) == source
    assert source_in(tmp_path, made.replace("make(2)", "make(3)")) != source
    with pytest.raises(InputError, match=r"uses 'power' of the function around it, a ndarray"):
        source_in(tmp_path, made.replace("make(2)", "make(np.ones(2))"))


def test_it_survives_the_ways_of_a_config():
    config = base_config.base()
    config.flatness.measure = custom(measure)
    config.flatness.measures = ("hessian_trace", "measure")
    config = loading.override(config, {"flatness.measure.scale": 3})
    frozen = FrozenConfigDict(validation.validate(config))
    section = frozen.flatness.measure
    assert (section.scale, section.function.function) == (3.0, measure)
    stored = json.loads(frozen.to_json())["flatness"]["measure"]
    assert stored["function"] == str(section.function)
    assert hash(section) == hash(FrozenConfigDict(custom(measure, scale=3.0)))


def test_a_stored_config_without_the_function_is_refused():
    config = base_config.base()
    config.flatness.measure = {"function": "measure 0123456789ab"}
    with pytest.raises(InputError, match=r"flatness\.measure\.function=.* only its name"):
        validation.validate(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: custom(lambda problem: problem), "lambda"),
        (lambda: custom(functools.partial(measure, scale=2.0)), "must be a function or a class"),
        (lambda: custom(measure, scales=2.0), "no setting 'scales'; .*: scale, power, name, sizes"),
        (lambda: custom(len), "source of len cannot be read"),
        (lambda: custom(3), "must be a function or a class"),  # pyright: ignore
    ],
)
def test_what_cannot_be_identified_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("prefix", "name", "function", "message"),
    [
        ("flatness", "needs_more", needs_more, r"flatness\.needs_more: .* needs 'temperature'"),
        ("flatness", "own", has_default, r"passes 'problem' to has_default .*; remove its default"),
        ("flatness", "hessian_trace", measure, r"flatness\.hessian_trace is a name of jaxflat"),
        ("flatness", "labels", measure, r"flatness\.labels"),
        ("flatness", "excess_loss", measure, r"flatness\.excess_loss is a name of jaxflat"),
        ("flatness", "init_seed", measure, r"flatness\.init_seed is a name of jaxflat"),
        ("probes", "linear_probe", majority, r"probes\.linear_probe is a name of jaxflat"),
        ("probes", "x_sem", majority, r"probes\.x_sem is a name of jaxflat"),
        ("model", "transformer", needs_more, r"model\.transformer is a name of jaxflat"),
        ("evaluation", "own", measure, r"evaluation\.own is not a config key"),
    ],
)
def test_what_does_not_fit_is_refused(prefix, name, function, message):
    config = base_config.base()
    with config.ignore_type():
        config[prefix][name] = custom(function)
    with pytest.raises(InputError, match=message):
        validation.validate(config)


def test_a_key_that_a_model_does_not_take_has_no_effect():
    def model(num_words, width):
        return num_words, width

    config = base_config.base()
    config.model.own = custom(model)
    config.model.update({"name": "own", "num_layers": 3})
    point = validation.validate(config)
    with pytest.raises(InputError, match=r"model\.num_layers=3 has no effect with model\.name"):
        validation.check_effects(config, [({}, point), ({}, point)])
    config.model.update({"num_layers": 2, "width": 48})
    validation.check_effects(config, [({}, validation.validate(config))] * 2)


def test_a_function_of_a_library_is_one():
    section = custom(optax.adabelief)
    optimizer = functions.call(section, learning_rate=1.0)
    state = optimizer.init(jax.numpy.ones(3))
    with jax.numpy_dtype_promotion("standard"):
        assert optimizer.update(jax.numpy.ones(3), state)[0].shape == (3,)
