"""The rooms and the arrows between them, read from the code's own imports."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxflat"

# What each room may import from its siblings. Rooms that are not here are joiners: they may
# import every room but those above them in ORDER.
ALLOWED = {
    "languages": set(),
    "models": set(),
    "flatness": set(),
    "hosts": set(),
    "manifest": set(),
    "preemption": {"hosts"},
    "processes": set(),
    "compilation": set(),
    "lock_files": {"processes"},
    "locks": {"lock_files", "preemption", "processes"},
    "checkpoint": {"hosts", "locks", "manifest"},
    "sharding": set(),
    "metrics": {"hosts", "locks"},
    "display": {"hosts"},
    "config": set(),
    "data": set(),
    "trajectory": {"config"},
    "ranges": {"config"},
    "validation": {"config", "ranges"},
    "loading": {"config", "validation"},
    "training": set(),
    "probes": {"training"},
    "analysis": set(),
    "status": {"lock_files", "metrics"},
    "theory": {"languages", "flatness", "analysis", "metrics", "validation"},
}
ORDER = (
    *(
        "teacher",
        "text_language",
        "adversary",
        "experiment",
        "corpus",
        "memory",
        "provenance",
        "stages",
        "run",
        "checks",
        "points",
        "sweep_record",
        "results",
        "attempts",
        "sweep",
        "build",
        "measure",
        "report",
    ),
    *("benchmark", "main"),
)
TOP_LEVEL = {
    *("README.md", "LICENSE", "setup.cfg", "pyproject.toml", "Makefile"),
    *("jaxflat", "configs", "launch", "tests", "docs"),
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


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("jaxflat.")}
    return rooms - {room_of(path)}


def test_imports_flow_one_way():
    for path in FILES:
        room = room_of(path)
        if room == "__init__":
            allowed = set()
        elif room in ALLOWED:
            allowed = ALLOWED[room]
        else:
            assert room in ORDER, f"{room} is a new room: give it a place in this test"
            allowed = ALLOWED.keys() | set(ORDER[: ORDER.index(room)])
        assert imported_rooms(path) <= allowed, path


def test_flax_stays_in_models():
    for path in FILES:
        if room_of(path) != "models":
            assert not any(name.split(".")[0] == "flax" for name in imported_modules(path)), path


def test_analysis_reads_files_only():
    for path in (PACKAGE / "analysis").rglob("*.py"):
        assert not any(name.split(".")[0] == "jax" for name in imported_modules(path))


def test_functions_and_files_stay_short():
    for path in FILES:
        assert path.read_text().count("\n") <= 200, path
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_configs_are_short_and_nothing_else_is_at_the_top():
    for path in (ROOT / "configs").glob("*.py"):
        assert path.read_text().count("\n") <= 60
    visible = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert visible - {"runs", "build", "jaxflat.egg-info"} == TOP_LEVEL
