"""The rooms of the package and the arrows between them, read from the code's own imports."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxflat"

# The lowest layer is first. A room imports only from layers with a smaller number.
LAYERS = (
    ("config", "distributed"),
    ("storage",),
    ("console",),
    ("datasets", "models", "training", "flatness"),
    ("probes",),
    ("languages",),
    ("runs",),
    ("sweeps",),
    ("analysis",),
    ("theory",),
    ("build", "dry_run", "export", "measure", "report", "status"),
    ("benchmark", "main"),
)
# Core rooms know nothing but arrays and files: these import no other room of jaxflat, or few.
CORE = {
    "config": set(),
    "distributed": set(),
    "models": set(),
    "training": set(),
    "flatness": set(),
    "datasets": {"storage"},
    "probes": {"training"},
    "analysis": set(),
}
# Only a language that a model writes trains a model and reads texts.
GENERATED = PACKAGE / "languages" / "generated"
IMPORTED_BY_USERS = {"flatness", "training", "probes", "languages", "models", "analysis"}
TOP_LEVEL = {
    *("README.md", "LICENSE", "setup.cfg", "pyproject.toml", "Makefile"),
    *("jaxflat", "configs", "launch", "tests", "docs"),
}
# Words that docs/architecture.md's glossary replaces: one noun a thing.
RETIRED = {
    **{"lane": "slot", "snapshot": "checkpoint", "variant": "arm", "algorithm": "arm"},
    **{"twin": "projection", "experiment": "builders"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imported_modules(path: Path) -> set[str]:
    """Return every module a file imports, those named in "from package import module" included."""
    names: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTED = {path: imported_modules(path) for path in FILES}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = {name.split(".")[1] for name in IMPORTED[path] if name.startswith("jaxflat.")}
    return rooms - {room_of(path)}


def test_every_room_has_a_layer():
    assert {room_of(path) for path in FILES} - {"__init__"} == {r for row in LAYERS for r in row}


def test_imports_flow_one_way():
    height = {room: number for number, row in enumerate(LAYERS) for room in row}
    upward = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in FILES
        for room in imported_rooms(path)
        if height[room] >= height[room_of(path)]
    ]
    assert not upward


def test_core_rooms_stand_alone():
    for path in FILES:
        if room_of(path) in CORE:
            assert imported_rooms(path) <= CORE[room_of(path)], path
        if room_of(path) == "languages" and not path.is_relative_to(GENERATED):
            assert not imported_rooms(path), path


def test_flax_stays_in_models():
    for path in FILES:
        if room_of(path) != "models":
            assert not any(name.split(".")[0] == "flax" for name in IMPORTED[path]), path


def test_private_names_of_jax_stay_in_ranks():
    """`tests/distributed/test_ranks.py` says what to do when JAX moves them."""
    for path in FILES:
        if path != PACKAGE / "distributed" / "ranks.py":
            assert not any(name.startswith("jax._src") for name in IMPORTED[path]), path


def test_analysis_and_status_read_files_only():
    for path in FILES:
        if room_of(path) in {"analysis", "status"}:
            assert not any(name.split(".")[0] == "jax" for name in IMPORTED[path]), path


def test_file_names_are_unique_but_for_those_of_rooms():
    """`benchmark/flatness.py` times the room flatness; a file of config holds another's keys."""
    rooms = {room for row in LAYERS for room in row}
    files = [path for path in FILES if room_of(path) != "config"]
    stems = Counter(path.stem for path in files if not path.stem.startswith("__"))
    assert not [stem for stem, count in stems.items() if count > 1 and stem not in rooms]


def test_class_names_are_unique():
    names = Counter(
        node.name
        for path in FILES
        for node in nodes_of(path)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


def identifiers(path: Path) -> set[str]:
    """Return the names that a file defines or uses, its own name included."""
    names = {path.stem}
    for node in nodes_of(path):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                names.add(name)
    return names


def test_no_name_has_a_retired_word():
    found = [
        f"{path.relative_to(ROOT)}: {name}: say {RETIRED[word.removesuffix('s')]}"
        for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
        for name in sorted(identifiers(path))
        for word in re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())
        if word.removesuffix("s") in RETIRED
    ]
    assert not found, "\n".join(found)


def test_the_page_on_architecture_has_the_layers():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.M)
    assert [tuple(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows] == list(LAYERS)
    assert [int(number) for number, _ in rows] == list(range(1, len(LAYERS) + 1))


def test_no_public_function_hides_its_keywords():
    """In the rooms that users import, `help` shows the name of every argument."""
    for path in FILES:
        if room_of(path) not in IMPORTED_BY_USERS:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.args.kwarg is None, f"{path}: {node.name}"


def test_functions_stay_short():
    for path in FILES:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_the_top_levels_hold_what_users_type_and_packages():
    visible = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert visible - {"runs", "build", "jaxflat.egg-info"} == TOP_LEVEL
    for path in (ROOT / "configs").glob("*.py"):
        assert path.read_text().count("\n") <= 60
