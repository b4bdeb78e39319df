"""A checkpoint of a run as the subject of `measure`, on sentences of its language."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from jaxflat.config import Config, loading, validation
from jaxflat.flatness import Problem
from jaxflat.runs import builders, checks
from jaxflat.runs.measure_flatness import flattest_problem, make_problem
from jaxflat.runs.measurements import load_params
from jaxflat.runs.saved_run import find_checkpoint
from jaxflat.runs.trajectory import sentences_seen
from jaxflat.storage.leased_folder import Folder


class Subject(NamedTuple):
    """A problem, the config whose `flatness` section has its settings, and a description.

    name: the checkpoint or the file. how: the batches. at(checkpoint): the subject of another
    checkpoint, with the same settings and draws. flattest(): the problem in the coordinates of its
    least Gauss-Newton trace; None if the rescalings of the model are not known.
    """

    problem: Problem
    config: Config
    name: str
    how: str
    at: Callable[[Path], "Subject"]
    flattest: Callable[[], Problem] | None = None

    @property
    def about(self) -> str:
        """The description in one line."""
        return f"{self.name}, {self.how}"


def run_subject(
    path: Path, overrides: dict[str, Any], seed: int | None = None, *, same_draws: bool = False
) -> Subject:
    """Return a run's checkpoint with its own language and settings, after overrides.

    A seed replaces the run's probe_seed and draws other sentences and probes. same_draws: all
    checkpoints of the run have the sentences and probes of step 0. Raises InputError if
    the checkpoint does not exist or an override is wrong.
    """
    directory, checkpoint, config = find_checkpoint(path)
    if seed is not None:
        config.probe_seed = seed
    frozen: Config = FrozenConfigDict(validation.validate(loading.override(config, overrides)))
    checks.check_config(frozen)
    model = builders.make_model(frozen)
    params = load_params(frozen, Folder(directory), checkpoint)
    drawn = checkpoint._replace(step=0) if same_draws else checkpoint
    problem = make_problem(frozen, model, params, drawn)
    problem = problem._replace(num_examples=sentences_seen(frozen, checkpoint))
    chosen = frozen.flatness
    sizes = f"{chosen.num_microbatches} microbatches of {chosen.microbatch_size}"
    where = f"step {checkpoint.step:,}{', projected' if checkpoint.projected else ''}"
    name, how = f"{directory.name}, {where}", f"{sizes}, labels {chosen.labels}"
    at = partial(run_subject, overrides=overrides, seed=seed, same_draws=same_draws)
    flattest = cache(partial(flattest_problem, frozen, problem, drawn))
    return Subject(problem, frozen, name, how, at, flattest if chosen.invariant else None)


def run_model(path: Path) -> Any:
    """Return the model of a run's checkpoint; raise InputError if it does not exist."""
    return builders.make_model(FrozenConfigDict(find_checkpoint(path)[2]))
