"""Take the measures that a config or a command names, such as hessian_trace.

A measure is a function of a `Problem` and the settings. It returns named estimates; most measures
have one, with the measure's name. The settings are the `flatness` section of a config, or any
object with these attributes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, Over
from jaxflat.flatness.gradient_noise import gradient_noise
from jaxflat.flatness.inputs import LogProbsFn, LossFn
from jaxflat.flatness.landscape import filter_normalized, loss_barrier, loss_rises
from jaxflat.flatness.learning_coefficient import LANCZOS_STEPS, local_learning_coefficient
from jaxflat.flatness.products import curvature_along, mean_gradient
from jaxflat.flatness.sharpness import (
    NoCriticalStepError,
    average_sharpness,
    critical_sharpness,
    mean_loss,
    worst_sharpness,
)
from jaxflat.flatness.spectrum import hessian_density, hessian_extremes
from jaxflat.flatness.terms import TraceTerms, sample_until
from jaxflat.flatness.trace import (
    Rescale,
    fisher_trace_terms,
    gauss_newton_trace_samples,
    hessian_trace_samples,
    hessian_trace_terms,
)
from jaxflat.flatness.trees import PyTree


class Problem(NamedTuple):
    """The functions, parameters and microbatches to measure.

    MEASURES["hessian_trace"](problem, jaxflat.config.base().flatness) takes a measure by its name.

    log_probs_fn: for fisher_trace and gauss_newton_trace; None: these two raise ValueError.
    sample(i): the microbatches of round i, independent of other rounds and of one shape. Traces
      draw several rounds; other measures use round 0.
    num_examples: n of the learning coefficient, the number of training sentences (for texts of a
      file: of predictions); None: the learning coefficient raises ValueError.
    groupings: each maps a leaf's path to the name of its group; traces are also given by group.
    stacked(path): whether axis 0 of a leaf is a stack of layers.
    rescale(i, v): T v, the coordinates in which microbatch i takes its traces; None: T = 1.
    toward: the parameters at the end of loss_path.
    """

    loss_fn: LossFn
    log_probs_fn: LogProbsFn | None
    params: PyTree
    sample: Callable[[int], PyTree]
    key: jax.Array
    num_examples: int | None
    groupings: Sequence[Callable[[str], str]] = ()
    stacked: Callable[[str], bool] | None = None
    rescale: Rescale | None = None
    toward: PyTree | None = None

    @classmethod
    def from_batches(
        cls,
        loss_fn: LossFn,
        params: PyTree,
        batches: PyTree | list[PyTree] | Callable[[int], PyTree],
        *,
        log_probs_fn: LogProbsFn | None = None,
        key: jax.Array | None = None,
        num_examples: int | None = None,
        toward: PyTree | None = None,
    ) -> "Problem":
        """Return the problem of a loss on given batches; get_problem of `measure --problem` does.

        loss_fn, log_probs_fn, params: as of `hessian_trace` and `fisher_trace`.
        batches: a list of microbatches of one shape; or arrays with a leading axis of microbatches,
        in any pytree but a list at its top; or a function of the round, 0, 1, ..., that returns
        either. Only such a function has several rounds, which `relative_error` needs.
        key: jax.random.key(0) by default. num_examples, toward: see the class.

        Raises ValueError if the batches of a list differ in shape, or if num_examples is no whole
        number of at least 2.
        """
        is_count = isinstance(num_examples, Integral) and num_examples >= 2
        if num_examples is not None and not is_count:
            raise ValueError(
                f"num_examples must be a whole number of at least 2, not {num_examples!r}"
            )
        of_round = batches if callable(batches) else partial(_only_round, stack_batches(batches))

        def sample(i: int) -> PyTree:
            return stack_batches(of_round(i))

        key = jax.random.key(0) if key is None else key
        return cls(loss_fn, log_probs_fn, params, sample, key, num_examples, toward=toward)


def stack_batches(batches: PyTree | list[PyTree]) -> PyTree:
    """Return a list of batches as arrays with a leading axis of microbatches.

    Any other pytree is returned as it is. Raises ValueError if the batches differ in shape.
    """
    if isinstance(batches, list):
        if not batches:
            raise ValueError("batches is an empty list")
        shapes = [jax.tree.map(jnp.shape, batch) for batch in batches]
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"batches[{number}] has the shapes {shape}, batches[0] {shapes[0]}; all need "
                    "the same: leave out a smaller last batch"
                )
        batches = jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *batches)
    return batches


def _only_round(batches: PyTree, i: int) -> PyTree:
    if i:
        raise ValueError(
            "the batches are one round, and relative_error draws several; give a function of the "
            "round as batches"
        )
    return batches


class Measured(NamedTuple):
    """Named estimates, and named arrays to plot."""

    estimates: dict[str, Estimate]
    curves: dict[str, jax.Array] = {}  # noqa: RUF012


def draw_trace_round(name: str, problem: Problem, settings: Any, i: int) -> TraceTerms:
    """Return the samples of a trace's round i, independent of other rounds.

    Samples are by leaf, with two exceptions. A Hessian trace without groupings is cheaper as one
    number. So is the Gauss-Newton trace, whose groups equal fisher_trace's (tr G_ll = tr F_ll).
    """
    key = jax.random.fold_in(problem.key, i)
    if name == "fisher_trace":
        draw = partial(fisher_trace_terms, _log_probs_fn(name, problem), stacked=problem.stacked)
        options = {
            "num_samples": settings.num_probes,
            "samples_per_pass": _draws_per_pass(settings),
            "rescale": problem.rescale,
        }
        return draw(problem.params, problem.sample(i), key, **options)
    if name == "gauss_newton_trace":
        draw = partial(gauss_newton_trace_samples, _log_probs_fn(name, problem))
    elif problem.groupings:
        draw = partial(hessian_trace_terms, problem.loss_fn, stacked=problem.stacked)
    else:
        draw = partial(hessian_trace_samples, problem.loss_fn)
    options = {
        "num_probes": settings.num_probes,
        "probes_per_pass": _draws_per_pass(settings),
        "rescale": problem.rescale,
    }
    return draw(problem.params, problem.sample(i), key, **options)


def _log_probs_fn(name: str, problem: Problem) -> LogProbsFn:
    if problem.log_probs_fn is None:
        raise ValueError(
            f"{name} needs log_probs_fn(params, batch) -> (log_probs_...xV, weights_...); the "
            "problem has none"
        )
    return problem.log_probs_fn


def sample_trace(draw_round: Callable[[int], TraceTerms], settings: Any) -> TraceTerms:
    """Return the samples of as many rounds as the settings' precision requires."""
    rounds = settings.max_rounds if settings.relative_error > 0 else 1
    return sample_until(draw_round, settings.relative_error, rounds)


def trace_estimates(name: str, terms: TraceTerms, problem: Problem) -> Measured:
    """Return the trace under `name`, and the trace of each group under "name/group"."""
    estimates = {name: terms.total()}
    for grouping in problem.groupings if name != "gauss_newton_trace" else ():
        groups = terms.by_block(grouping)
        estimates |= {f"{name}/{group}": estimate for group, estimate in groups.items()}
    return Measured(estimates)


def _trace(name: str, problem: Problem, settings: Any) -> Measured:
    terms = sample_trace(partial(draw_trace_round, name, problem, settings), settings)
    return trace_estimates(name, terms, problem)


def _draws_per_pass(settings: Any) -> int:
    return min(settings.probes_per_pass, settings.num_probes)


def _without_error(value: jax.Array, num_samples: int, over: Over) -> Estimate:
    """Return a number that has no standard error: its sem is nan."""
    return Estimate(value, jnp.full_like(value, jnp.nan), num_samples, over)


def _hessian_eigenvalues(problem: Problem, settings: Any) -> Measured:
    """The extreme eigenvalues with errors over sentences, and their residuals without errors."""
    loss_fn, params, batches = problem.loss_fn, problem.params, problem.sample(0)
    extremes = hessian_extremes(loss_fn, params, batches, problem.key, **settings.eigenvalues)
    estimates = {}
    for side, pairs in (("largest", extremes.largest), ("smallest", extremes.smallest)):
        if not len(pairs.values_k):
            continue
        along = curvature_along(loss_fn, params, batches, pairs.vectors)
        for k, value in enumerate(pairs.values_k):
            name = f"hessian_eigenvalue/{side}_{k + 1}"
            estimates[name] = Estimate(value, along.sem[k], along.num_samples, along.over)
            residual = _without_error(pairs.residuals_k[k], along.num_samples, "sentences")
            estimates[f"{name}_residual"] = residual
    return Measured(estimates)


def _hessian_density(problem: Problem, settings: Any) -> Measured:
    args = problem.loss_fn, problem.params, problem.sample(0), problem.key
    density = hessian_density(*args, **settings.density)
    curves = {"nodes_nxm": density.nodes_nxm, "weights_nxm": density.weights_nxm}
    return Measured({"hessian_effective_rank": density.effective_rank()}, curves)


def _average_sharpness(adaptive: bool, problem: Problem, settings: Any) -> Measured:
    prefix, sharpness = "adaptive_" if adaptive else "", settings.sharpness
    estimate = average_sharpness(
        problem.loss_fn,
        problem.params,
        problem.sample(0),
        problem.key,
        sigma=sharpness[f"{prefix}sigma"],
        num_probes=settings.num_probes,
        adaptive=adaptive,
        probes_per_pass=_draws_per_pass(settings),
    )
    return Measured({f"{prefix}average_sharpness": estimate})


def _worst_sharpness(adaptive: bool, problem: Problem, settings: Any) -> Measured:
    prefix, sharpness = "adaptive_" if adaptive else "", settings.sharpness
    estimate = worst_sharpness(
        problem.loss_fn,
        problem.params,
        problem.sample(0),
        radius=sharpness[f"{prefix}radius"],
        num_steps=sharpness.ascent_steps,
        adaptive=adaptive,
    )
    return Measured({f"{prefix}worst_sharpness": estimate})


def _critical_sharpness(problem: Problem, settings: Any) -> Measured:
    """The direction is minus the gradient of the same sentences; nan if no step brackets it."""
    args = loss_fn, params, batches = problem.loss_fn, problem.params, problem.sample(0)
    update = jax.tree.map(jnp.negative, mean_gradient(*args))
    try:
        estimate = critical_sharpness(*args, update)
    except NoCriticalStepError:
        loss = mean_loss(loss_fn, params, batches)
        nan = jnp.full_like(loss.mean, jnp.nan)
        estimate = _without_error(nan, loss.num_samples, loss.over)
    return Measured({"critical_sharpness": estimate})


def _gradient_noise(problem: Problem, settings: Any) -> Measured:
    noise = gradient_noise(problem.loss_fn, problem.params, problem.sample(0))
    return Measured({f"gradient_noise/{name}": value for name, value in vars(noise).items()})


LEARNING_COEFFICIENT = tuple(
    f"local_learning_coefficient{name}" for name in ("", "/r_hat", "/effective_samples")
)


def _local_learning_coefficient(problem: Problem, settings: Any) -> Measured:
    """The coefficient, nan if its chains are not to be trusted; R-hat and the effective samples.

    The localization is relative_localization times n beta times the largest curvature at w*.
    """
    chosen, n = settings.learning_coefficient, problem.num_examples
    if n is None:
        raise ValueError(
            "local_learning_coefficient needs num_examples, the number of training examples; the "
            "problem has none"
        )
    args = problem.loss_fn, problem.params, problem.sample(0), problem.key
    lanczos = {"num_largest": 1, "num_smallest": 0, "num_steps": LANCZOS_STEPS}
    largest = float(hessian_extremes(*args, **lanczos).largest.values_k[0])
    if not largest > 0:  # no unit for the localization
        nan = _without_error(jnp.asarray(math.nan), chosen.num_chains, "chains")
        return Measured(dict.fromkeys(LEARNING_COEFFICIENT, nan))
    inverse_temperature = 1 / math.log(max(n, 2))
    coefficient = local_learning_coefficient(
        *args,
        num_examples=n,
        num_chains=chosen.num_chains,
        num_draws=chosen.num_draws,
        localization=chosen.relative_localization * n * inverse_temperature * largest,
        inverse_temperature=inverse_temperature,
    )
    diagnostics = (
        _without_error(value, chosen.num_chains, "chains")
        for value in (coefficient.r_hat, coefficient.effective_samples)
    )
    estimates = coefficient.estimate, *diagnostics
    return Measured(
        dict(zip(LEARNING_COEFFICIENT, estimates, strict=True)),
        {"rises_CxT": coefficient.rises_CxT},
    )


def _loss_slices(problem: Problem, settings: Any) -> Measured:
    """The rise of the loss along random filter-normalised directions; curves, no estimates."""
    steps_G = settings.slices.extent * jnp.linspace(-1, 1, settings.slices.num_points)
    args = problem.loss_fn, problem.params, problem.sample(0)
    rises = []
    for key in jax.random.split(problem.key, settings.slices.num_directions):
        direction = filter_normalized(key, problem.params, problem.stacked)
        rises.append(loss_rises(*args, [direction], steps_G[:, None]))
    lows, highs = zip(*(r.interval() for r in rises), strict=True)
    means = jnp.stack([r.mean for r in rises])
    ends = {"lows_DxG": jnp.stack(lows), "highs_DxG": jnp.stack(highs)}
    return Measured({}, {"steps_G": steps_G, "rises_DxG": means, **ends})


def _loss_plane(problem: Problem, settings: Any) -> Measured:
    """The rise over the plane of two such directions; curves, no estimates."""
    slices, params = settings.slices, problem.params
    directions = [
        filter_normalized(k, params, problem.stacked) for k in jax.random.split(problem.key)
    ]
    steps_G = slices.extent * jnp.linspace(-1, 1, slices.plane_points)
    steps_Gx2 = jnp.stack(jnp.meshgrid(steps_G, steps_G, indexing="ij"), axis=-1).reshape(-1, 2)
    rises = loss_rises(problem.loss_fn, params, problem.sample(0), directions, steps_Gx2)
    square = (slices.plane_points, slices.plane_points)
    rises_GxG, sems_GxG = (x.reshape(square) for x in (rises.mean, rises.sem))
    return Measured({}, {"steps_G": steps_G, "rises_GxG": rises_GxG, "sems_GxG": sems_GxG})


def _loss_path(problem: Problem, settings: Any) -> Measured:
    """The loss on the straight line to `toward`, and the barrier, its highest point."""
    loss_fn, start, batches = problem.loss_fn, problem.params, problem.sample(0)
    if problem.toward is None:
        raise ValueError("loss_path needs the parameters at its end: Problem.toward")
    num_points = settings.slices.num_points
    steps_G = jnp.linspace(0, 1, num_points)
    difference = jax.tree.map(jnp.subtract, problem.toward, start)
    rises = loss_rises(loss_fn, start, batches, [difference], steps_G[:, None])
    low_G, high_G = rises.interval()
    above = loss_barrier(loss_fn, start, problem.toward, batches, num_points=num_points)
    highest = jnp.argmax(above.mean)
    barrier, change = (
        Estimate(found.mean[place], found.sem[place], found.num_samples, found.over)
        for found, place in ((above, highest), (rises, -1))
    )
    return Measured(
        {"loss_barrier": barrier, "loss_change": change},
        {"steps_G": steps_G, "rises_G": rises.mean, "low_G": low_G, "high_G": high_G},
    )


TRACES = ("hessian_trace", "gauss_newton_trace", "fisher_trace")

MEASURES: dict[str, Callable[[Problem, Any], Measured]] = {
    **{name: partial(_trace, name) for name in TRACES},
    "hessian_eigenvalues": _hessian_eigenvalues,
    "hessian_density": _hessian_density,
    "average_sharpness": partial(_average_sharpness, False),
    "adaptive_average_sharpness": partial(_average_sharpness, True),
    "worst_sharpness": partial(_worst_sharpness, False),
    "adaptive_worst_sharpness": partial(_worst_sharpness, True),
    "critical_sharpness": _critical_sharpness,
    "gradient_noise": _gradient_noise,
    "local_learning_coefficient": _local_learning_coefficient,
    "loss_slices": _loss_slices,
    "loss_plane": _loss_plane,
    "loss_path": _loss_path,
}
