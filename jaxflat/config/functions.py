"""Use your own function in a config: as a model, an optimizer, a language, a measure, ...

    config.model.convolution = custom(Convolution, kernel_size=5)
    config.model.name = "convolution"

A function takes its arguments by name. jaxflat passes the arguments in `GIVEN` that the function
has. Its other parameters, which need a default, are its settings. A function is identified by its
name and a digest of its source.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ml_collections import ConfigDict

from jaxflat.config.ranges import Bounded, Config, InputError
from jaxflat.config.sweeps import SEEDS

GIVEN = {
    "language": ("seed",),
    "model": (
        *("num_words", "max_length", "width", "num_layers"),
        *("head_size", "tied_decoder", "cls"),
    ),
    "objective": ("apply_fn",),
    "optimizer": ("learning_rate",),
    "measure": ("problem",),
    "probe": ("key", "features_NxF", "labels_N", "test_features_MxF", "num_classes"),
}
"""The arguments that jaxflat passes to each kind of function; docs/extending.md explains them."""

SIMPLE = (bool, int, float, str)

RESERVED = (
    *("point", *SEEDS, "phase_order"),
    *("step", "projected", "last", "num_params", "sentences_seen"),
    *("loss", "optimal_loss", "excess_loss", "bayes"),
    *("linear_probe", "linear_probe_projected", "belief_state", "finetune"),
)
"""Names that measures and probes may not have: columns of results.csv begin with them."""


class UserFunction(str):
    """A function as a config value. Its text, the name and a digest, is all that files hold."""

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any]) -> "UserFunction":
        """Raise InputError if the function has no name, or its source cannot be read."""
        unwrapped = inspect.unwrap(function)
        if not (inspect.isroutine(unwrapped) or inspect.isclass(unwrapped)):
            raise InputError(f"custom: {function!r} must be a function or a class")
        name = unwrapped.__qualname__.rpartition(".")[2]
        if name == "<lambda>":
            raise InputError("custom: a lambda has no name; write the function with def")
        digest = hashlib.sha256(_source(unwrapped).encode()).hexdigest()[:12]
        named = super().__new__(cls, f"{name} {digest}")
        named.function = function
        return named

    def __deepcopy__(self, _: Any) -> "UserFunction":
        """Return itself; the function does not change."""
        return self


def custom(function: Callable[..., Any], **settings: Any) -> Config:
    """Return the config section of a function: the function itself, and its settings.

    settings: values that replace the defaults of the function's parameters. Raises InputError if
    the function has no such setting, or if its source cannot be read.
    """
    named, defaults = UserFunction(function), _settings(function)
    if "function" in defaults:
        raise InputError(f"custom: {function.__qualname__} has a setting 'function'; rename it")
    for name in settings:
        if name not in defaults:
            raise InputError(
                f"custom: {function.__qualname__} has no setting {name!r}; its settings, the "
                f"parameters with a default, are: {', '.join(defaults) or 'none'}"
            )
    return ConfigDict({"function": named, **defaults, **settings})


def is_function(section: Any) -> bool:
    """Say whether a value of a config is the section of a user's function."""
    return _is_section(section) and isinstance(section.get("function"), str)


def _is_section(value: Any) -> bool:
    return isinstance(value, (ConfigDict, Mapping))


def sections_in(section: Config) -> dict[str, Config]:
    """Return the sections of user's functions within a section, by name."""
    items = section.items() if _is_section(section) else ()
    return {name: value for name, value in items if is_function(value)}


def with_functions(keys: dict[str, Any], config: Config) -> dict[str, Any]:
    """Add the sections of a config's functions to all declared keys; they become choices.

    Raises InputError that names the function if it is unusable.
    """
    places = [
        *(("language", "language", "name"), ("model", "model", "name")),
        *(("flatness", "measure", "measures"), ("probes", "probe", "")),
        *((f"phases.{name}", "objective", "objective") for name in keys["phases"]),
        *((f"phases.{name}.optimizer", "optimizer", "name") for name in keys["phases"]),
    ]
    for prefix, kind, choice in places:
        section: Any = config
        known: Any = keys
        for name in prefix.split("."):
            section, known = (section.get(name) if _is_section(section) else None), known[name]
        chosen = known.get(choice)
        choices = chosen.choices if isinstance(chosen, Bounded) else ()
        for name, own in sections_in(section).items():
            is_column = kind in ("measure", "probe") and (name in RESERVED or name.endswith("_sem"))
            if name in (*known, *choices) or is_column or not name.isidentifier():
                raise InputError(f"{prefix}.{name} is a name of jaxflat's own; choose another")
            known[name] = _declared(f"{prefix}.{name}", own, kind)
            choices = (*choices, name)
        if isinstance(chosen, Bounded):
            known[choice] = replace(chosen, choices=choices)
    return keys


def _declared(key: str, section: Config, kind: str) -> dict[str, Any]:
    """Return the keys of a function's section, with their bounds: any finite number."""
    source = section["function"]
    if not isinstance(source, UserFunction):
        raise InputError(
            f"{key}.function={source!r}: files hold only its name; run the config that defines it"
        )
    for name, parameter in inspect.signature(source.function).parameters.items():
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        needed = by_name and parameter.default is parameter.empty
        if parameter.kind is parameter.POSITIONAL_ONLY or (needed and name not in GIVEN[kind]):
            raise InputError(
                f"{key}: {source} needs {name!r}; its parameters may be {', '.join(GIVEN[kind])}, "
                "and others with a number, text or tuple as default"
            )
    settings = _settings(source.function)
    for name in settings.keys() & set(GIVEN[kind]):
        raise InputError(f"{key}: jaxflat passes {name!r} to {source}; remove its default")
    bounds = {"least": None, "may_be_empty": True}
    return {"function": source} | {name: Bounded(v, **bounds) for name, v in settings.items()}


def takes(section: Config, name: str) -> bool:
    """Say whether the function of a section has a parameter of this name."""
    return name in inspect.signature(section["function"].function).parameters


def call(section: Config, **given: Any) -> Any:
    """Call the function of a section with its settings, and with the `given` arguments it has."""
    settings = {name: value for name, value in section.items() if name != "function"}
    taken = {name: value for name, value in given.items() if takes(section, name)}
    return section["function"].function(**settings, **taken)


def _settings(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters that have a number, text or tuple as default."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise InputError(f"custom: the signature of {function!r} cannot be read") from None
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if isinstance(parameter.default, (*SIMPLE, tuple))
    }


def _source(function: Any) -> str:
    """Return the source of a function or class, and of all that it uses of the same file.

    These are statements of the file's top level: functions, classes, assignments and imports. Of a
    function within another one, they are also the values that it uses of the outer one. Raises
    InputError if the source cannot be read, or if such a value has no source.
    """
    name = function.__qualname__
    try:
        lines = "".join(inspect.findsource(function)[0])
        statements = _statements_by_name(lines)
        own = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError):
        raise InputError(
            f"custom: the source of {name} cannot be read; define it with def or class in a file"
        ) from None
    if "<locals>" not in name:
        own = statements.get(name.partition(".")[0], own)  # of a method: the whole class
    sources, pending = {own}, [own]
    while pending:
        used = {
            node.id for node in ast.walk(ast.parse(pending.pop())) if isinstance(node, ast.Name)
        }
        new = {statements[word] for word in used & statements.keys()} - sources
        sources |= new
        pending += new
    outer = _outer_values(function) if "<locals>" in name else {}
    values = [f"{word} = {_value_source(name, word, value)}" for word, value in outer.items()]
    return "\n".join(sorted([*sources, *values]))


def _statements_by_name(text: str) -> dict[str, str]:
    """Return the top-level statements of a file by each name that they bind."""
    lines, statements = text.splitlines(), {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        source = "\n".join(lines[first - 1 : node.end_lineno])
        for name in _bound_names(node):
            statements[name] = f"{statements[name]}\n{source}" if name in statements else source
    return statements


def _bound_names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    names = {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Import, ast.ImportFrom)):
            names |= {a.asname or a.name.partition(".")[0] for a in inner.names}
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            names.add(inner.name)
    return names


def _outer_values(function: Any) -> dict[str, Any]:
    """Return what a function, or a class by its methods, uses of the function around it."""
    members = vars(function).values() if inspect.isclass(function) else [function]
    methods = [inspect.unwrap(member) for member in members if inspect.isfunction(member)]
    return {
        word: value
        for method in methods
        for word, value in inspect.getclosurevars(method).nonlocals.items()
        if word != "__class__"
    }


def _value_source(function: str, word: str, value: Any) -> str:
    """Return a text that identifies a value which a function uses of the function around it."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return _source(inspect.unwrap(value))
    if not _is_simple(value):
        raise InputError(
            f"custom: {function} uses {word!r} of the function around it, a "
            f"{type(value).__name__}; make it a setting, or define both at the file's top level"
        )
    return repr(value)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, SIMPLE)
