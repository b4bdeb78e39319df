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
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ml_collections import ConfigDict

from jaxflat.config.ranges import Bounded, Config, InputError

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


class UserFunction(str):
    """A function as a config value. Its text, the name and a digest, is all that files hold."""

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any]) -> "UserFunction":
        """Raise InputError if the function has no name, or its source cannot be read."""
        if not inspect.isroutine(function) and not inspect.isclass(function):
            raise InputError(f"custom: {function!r} must be a function or a class")
        name = function.__qualname__.rpartition(".")[2]
        if name == "<lambda>":
            raise InputError("custom: a lambda has no name; write the function with def")
        source = super().__new__(cls, f"{name} {_digest(function)}")
        source.function = function
        return source


def custom(function: Callable[..., Any], **settings: Any) -> Config:
    """Return the config section of a function: the function itself, and its settings.

    settings: values that replace the defaults of the function's parameters. Raises InputError if
    the function has no such setting, or if its source cannot be read.
    """
    source = UserFunction(function)
    defaults = _settings(function)
    for name in settings:
        if name not in defaults:
            raise InputError(
                f"custom: {function.__qualname__} has no setting {name!r}; its settings, the "
                f"parameters with a default, are: {', '.join(defaults) or 'none'}"
            )
    return ConfigDict({"function": source, **defaults, **settings})


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
            if name in (*known, *choices):
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


def _digest(function: Callable[..., Any]) -> str:
    """Return a digest of a function's source, and of all that it uses of the same file.

    Functions, classes, numbers and texts count by their source or value, imported ones by name.
    """
    sources: dict[str, str] = {}
    _collect_sources(inspect.unwrap(function), sources)
    text = "\n".join(sources[name] for name in sorted(sources))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _collect_sources(function: Any, sources: dict[str, str]) -> None:
    name = function.__qualname__
    if name in sources:
        return
    try:
        sources[name] = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise InputError(
            f"custom: the source of {name} cannot be read; define it with def or class in a file"
        ) from None
    namespace = dict(vars(sys.modules[function.__module__]))
    if inspect.isfunction(function):
        namespace |= inspect.getclosurevars(function).nonlocals
    words = {node.id for node in ast.walk(ast.parse(sources[name])) if isinstance(node, ast.Name)}
    for word in sorted(words & namespace.keys()):
        value = namespace[word]
        if getattr(value, "__module__", None) == function.__module__:
            value = inspect.unwrap(value)
            if inspect.isfunction(value) or inspect.isclass(value):
                _collect_sources(value, sources)
        elif _is_simple(value):
            sources[f"{name}:{word}"] = repr(value)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_simple, value))
    return isinstance(value, SIMPLE)
