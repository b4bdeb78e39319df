"""Configs with random errors in keys, types, ranges and sweeps run, or are refused in one line."""

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxflat import config as base_config
from jaxflat import main
from jaxflat.config import loading
from jaxflat.config.validation import InputError
from jaxflat.sweeps import points
from tests.support.counts import FULL


def dotted(section: ConfigDict, prefix: str = "") -> list[str]:
    """Every key, sections included."""
    keys = []
    for name, value in section.items():
        keys.append(prefix + name)
        if isinstance(value, ConfigDict):
            keys += dotted(value, f"{prefix}{name}.")
    return keys


KEYS = st.sampled_from(dotted(base_config.base()))
NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, 30, -1, -(2**40), 2**31, 2**64, 0.0, 0.5, 1.0, -1.0, 1e300]
)
SPECIAL = st.sampled_from(["nan", "inf", "-inf"]).map(lambda text: f"float('{text}')")
WORDS = st.sampled_from(["", "adamw", "hmm", "pretrain", "lookup_table", "a\nb", "Ünbekannt", "1"])
ATOMS = st.one_of(
    (NUMBERS | WORDS | st.none() | st.booleans()).map(repr), SPECIAL, st.just("object()")
)
TUPLES = st.lists(ATOMS, max_size=3).map(lambda items: f"({''.join(f'{i}, ' for i in items)})")
VALUES = ATOMS | TUPLES | TUPLES.map(lambda text: f"[{text}]") | st.just("{'name': 1}")


def misspelt(key: str) -> str:
    return key[:-1] + ("x" if key[-1] != "x" else "y")


EDITS = st.one_of(
    st.builds(lambda key, value: (key, f"c.{key} = {value}"), KEYS, VALUES),
    st.builds(lambda key: (key, f"del c.{key}"), KEYS),
    st.builds(lambda key: (misspelt(key), f"c.{misspelt(key)} = 1"), KEYS),
)
POINTS = st.one_of(
    st.builds(
        lambda key, value: (key, f"[{{}}, {{{key!r}: {value}}}]"), KEYS | KEYS.map(misspelt), VALUES
    ),
    st.sampled_from(["[]", "{}", "[3]", "None", "[{3: 4}]", "[{'': 1}]", "[{'.': 1}]"]).map(
        lambda text: ("get_sweep", text)
    ),
)
SWEEP = st.just(("", "[{}]"))


@st.composite
def mutilated(draw) -> tuple[list[str], str]:
    """The keys that were changed, and the text of a config file."""
    edits = draw(st.lists(EDITS, max_size=2))
    key, listed = draw(POINTS if not edits else SWEEP | POINTS)
    body = "".join(f"    {line}\n" for _, line in edits)
    text = (
        "from jaxflat import config as base_config\n\n"
        f"def get_config(scale=None):\n    c = base_config.base()\n{body}    return c\n\n"
        f"def get_sweep(scale=None):\n    return {listed}\n"
    )
    return [key, *(key for key, _ in edits)], text


def assert_one_line_on(keys: list[str], line: str) -> None:
    """A line is printable, not long, and names a key that was changed."""
    assert line.isprintable(), line
    assert len(line) < 600
    names = {name for key in keys for name in re.split(r"[.]", key) if name}
    assert any(name in line for name in names), (keys, line)


def trials(number: int) -> settings:
    """Return settings for `number` configs, the same ones in every run."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=number, deadline=None, derandomize=True, suppress_health_check=unhealthy
    )


SECTION_FOR_A_SEED = """
from jaxflat import config as base_config

def get_config(scale=None):
    c = base_config.base()
    del c.data_seed
    c.data_seed = {"name": 1}
    return c
"""


NO_PHASES = SECTION_FOR_A_SEED.replace('data_seed = {"name": 1}', "phases = None").replace(
    "    del c.data_seed\n", ""
)


@trials(500 if FULL else 50)
@example((["phases"], NO_PHASES))
@example((["data_seed"], SECTION_FOR_A_SEED))
@given(mutilated())
def test_a_mutilated_config_is_accepted_or_refused_in_a_line(tmp_path, config):
    keys, text = config
    path = tmp_path / "user.py"
    path.write_text(text)
    try:
        points.expand(*loading.load(str(path)), tmp_path / "work")
    except InputError as error:
        assert_one_line_on(keys, str(error))


@trials(20 if FULL else 2)
@given(mutilated())
@pytest.mark.slow
def test_the_command_says_the_line_and_writes_nothing(tmp_path, capsys, config):
    keys, text = config
    path, workdir = tmp_path / "user.py", tmp_path / "work"
    path.write_text(text)
    code = main.main([f"--config={path}", f"--workdir={workdir}", "--dry_run"])
    error = capsys.readouterr().err
    assert not workdir.exists()
    assert code == (2 if error else 0)
    if error:
        assert error.startswith("error: ")
        assert_one_line_on(keys, error.removesuffix("\n"))
