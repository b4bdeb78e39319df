"""The examples of docs/languages.md; its recipe "Adding a language" in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "languages.md").read_text()
RECIPE = PAGE.partition("\n## Adding a language\n")[2].partition("\n## ")[0]
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def steps() -> dict[str, str]:
    """Return the text of each step by its title."""
    _, *parts = re.split(r"^\*\*\d\. (.*?)\.\*\*", RECIPE, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def code_of(step: str) -> str:
    (code,) = BLOCK.findall(step)
    return code


def insert(path: Path, before: str, code: str) -> None:
    """Put code above the first line that contains `before`."""
    lines = path.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if before in line)
    path.write_text("".join([*lines[:place], code, *lines[place:]]))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package with the language of the recipe."""
    copy = tmp_path_factory.mktemp("copy")
    no_cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jaxflat", copy / "jaxflat", ignore=no_cache)
    recipe = steps()
    for title in ("The language", "The check", "Training"):
        text, code = recipe[title], code_of(recipe[title])
        path = copy / re.findall(r"`((?:jaxflat|tests|configs)/\S+\.py)`", text)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    added_import, added_line = re.findall(r"`(from [^`]+|\"[^`]+,)`", recipe["The list"])
    languages = copy / "jaxflat" / "languages" / "__init__.py"
    insert(languages, "LANGUAGES = {", f"{added_import}\n\n")
    insert(languages, '"dyck": random_dyck', f"    {added_line}\n")
    insert(copy / "jaxflat/config/languages.py", '"generated": ', code_of(recipe["The keys"]))
    return copy


def run(copy: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_grammar_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = BLOCK.findall(PAGE.partition("`write_grammar` writes")[2].partition("\n## ")[0])
    exec(code, {})
    assert (tmp_path / "grammar.txt").exists()


@pytest.mark.slow
def test_its_check_passes(copy):
    command = re.search(r"Run it with `python (\S+)`", steps()["The check"])
    assert command is not None
    assert "the oracle and the sampler agree" in run(copy, command[1])


def main_of_recipe() -> list[str]:
    command = re.search(r"Run `python (-m jaxflat.main --config=\S+)`", steps()["Training"])
    assert command is not None
    return [*command[1].split(), "--config.language.markov_chain.length=3"]


@pytest.mark.slow
def test_its_config_is_accepted(copy):
    assert "GiB of memory" in run(copy, *main_of_recipe(), "--dry_run")


@pytest.mark.slow
def test_its_config_trains(copy):
    settings = {"steps": 4, "anneal_steps": 2, "checkpoint_steps": "(4,)"}
    settings["schedule.warmup_steps"] = 1
    flags = [f"--config.phases.pretrain.{key}={value}" for key, value in settings.items()]
    run(copy, *main_of_recipe(), "--workdir=run", "--stages=train", *flags)
    assert "excess_loss" in (copy / "run" / "results.csv").read_text()


def test_it_imports_no_other_package(copy):
    text = (copy / "jaxflat" / "languages" / "markov_chain.py").read_text()
    rooms = re.findall(r"^from jaxflat\.(\w+)", text, re.M)
    assert set(rooms) == {"languages"}
