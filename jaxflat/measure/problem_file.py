"""A Python file as the subject of `measure`: its get_problem returns any JAX model's problem."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config, loading, validation
from jaxflat.config.validation import InputError
from jaxflat.console import first_line
from jaxflat.flatness import MEASURES, Problem, mean_loss
from jaxflat.flatness.trees import path_name
from jaxflat.measure.subjects import Subject
from jaxflat.runs import checks

OF_THE_FILE = (
    *("num_microbatches", "microbatch_size", "labels", "remat"),
    *("invariant", "embedded_width", "embedded_layers"),
)
"""The keys of `flatness` without effect on a problem: its file decides the batches and the loss."""

NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
"""The errors of a measure that is traced without values, where its Python code reads one."""


def load_function(file: Path) -> Callable[..., Any]:
    """Run a user's file and return its get_problem; raise InputError if there is none."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    if file.suffix != ".py":
        raise InputError(f"{file}: a problem's file is Python and ends in .py")
    with errors_of(file):
        module = loading.import_file(str(file))
    function = getattr(module, "get_problem", None)
    if not callable(function):
        raise InputError(f"{file}: has no function get_problem, which returns a Problem")
    return function


def problem_subject(
    file: Path,
    get_problem: Callable[..., Any],
    measures: Sequence[str],
    overrides: dict[str, Any],
    seed: int | None,
    checkpoint: Path | None,
) -> Subject:
    """Return the problem that a file's function returns, if it has all that the measures need.

    get_problem: of `load_function`; it is called with the checkpoint, or without arguments. A seed
    replaces the problem's key. Raises InputError of one line, before any measure runs. The line
    names the file, the mistake, and the line of the file that raised an exception. So does the
    InputError of the subject's problem.sample, if the file's function fails in a later round.
    """
    for name in OF_THE_FILE:
        if f"flatness.{name}" in overrides:
            raise InputError(
                f"--config.flatness.{name} has no effect with --problem: {file} decides the "
                "batches and the loss"
            )
    config = base_config.base()
    config.flatness.labels = "data"
    config = validation.validate(loading.override(config, overrides))
    settings = config.flatness
    checks.check_flatness(settings)
    given = () if checkpoint is None else (checkpoint,)
    try:
        inspect.signature(get_problem).bind(*given)
    except TypeError:
        raise InputError(
            f"{file}: get_problem takes no checkpoint: define get_problem(checkpoint)"
            if given
            else f"{file}: get_problem has parameters: set --checkpoint, or give them defaults"
        ) from None
    with errors_of(file):
        problem = get_problem(*given)
    if not isinstance(problem, Problem):
        raise InputError(
            f"{file}: get_problem must return a jaxflat.flatness.Problem, such as "
            f"Problem.from_batches(loss_fn, params, batches), not a {type(problem).__name__}"
        )
    problem = problem._replace(sample=_with_first_round_cached(problem.sample))
    if seed is not None:
        problem = problem._replace(key=jax.random.key(seed))
    if settings.by_block:
        problem = problem._replace(groupings=problem.groupings or default_groupings(problem.params))
    else:
        problem = problem._replace(groupings=())
    with errors_of(file), jax.default_matmul_precision("highest"):
        _trace_measures(problem, measures, settings, file)
    problem = problem._replace(sample=errors_of(file)(problem.sample))  # in later rounds, too
    settings.num_microbatches = jax.tree.leaves(problem.sample(0))[0].shape[0]
    checks.check_rounds(settings)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    plural = "" if num_params == 1 else "s"
    how = f"{num_params:,} parameter{plural}, {settings.num_microbatches} microbatches"
    name = file.name if checkpoint is None else f"{file.name}, {checkpoint}"
    at = partial(problem_subject, file, get_problem, measures, overrides, seed)
    return Subject(problem, FrozenConfigDict(config), name, how, at)


@contextmanager
def errors_of(file: Path) -> Iterator[None]:
    """Turn any exception into an InputError of one line with the line of the user's file."""
    try:
        yield
    except Exception as error:  # the user's code may raise anything
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        place = loading.place_in(str(file), error)
        raise InputError(f"{file}: {kind}{first_line(error)}{place}") from error


def _with_first_round_cached(sample: Callable[[int], Any]) -> Callable[[int], Any]:
    """Return `sample` with round 0 drawn once: most measures use only this round."""
    first_round = cache(partial(sample, 0))
    return lambda i: sample(i) if i else first_round()


def _trace_measures(
    problem: Problem, measures: Sequence[str], settings: Config, file: Path
) -> None:
    """Compute the loss, and trace each measure without values: they raise what they refuse."""
    batches = problem.sample(0)
    mean_loss(problem.loss_fn, problem.params, batches)
    if settings.relative_error > 0:
        problem.sample(1)
    for name in measures:

        def estimates(params: Any, batches: Any, name: str = name) -> Any:
            abstract = problem._replace(params=params, sample=lambda _: batches)
            return MEASURES[name](abstract, settings).estimates

        try:
            jax.eval_shape(estimates, problem.params, batches)
        except NEEDS_VALUES as error:
            if loading.place_in(str(file), error):  # the user's code reads a value, too
                raise


def default_groupings(params: Any) -> tuple[Callable[[str], str], ...]:
    """Return the grouping by the first level of the parameters that has several entries."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [path_name(path).split("/") for path, _ in leaves]
    if len(paths) < 2:
        return ()
    depth = next(d for d in itertools.count(1) if len({tuple(path[:d]) for path in paths}) > 1)
    return (lambda path: "/".join(path.split("/")[:depth]),)
