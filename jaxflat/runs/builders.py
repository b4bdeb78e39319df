"""Build a run's objects from its config: model, optimizer, device mesh, random keys, steps.

The model's functions and the compiled steps are cached (`functools.cache`) by the part of the
config on which they depend. So runs with the same model shape share compiled code.
"""

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from jaxflat.config import Config, functions
from jaxflat.config.validation import NEED_WHOLE_BATCH
from jaxflat.distributed import sharding
from jaxflat.flatness.penalty import first_vector
from jaxflat.models.language_model import LanguageModel, make_language_model
from jaxflat.runs.languages import language_kind, padded_lengths
from jaxflat.runs.phase_loss import make_adversary, make_flatness_penalty, make_sampler
from jaxflat.runs.trajectory import Phase
from jaxflat.training.gradient import Division
from jaxflat.training.objectives import masked_lm_loss, masked_log_probs
from jaxflat.training.optimizers import Schedule, make_optimizer
from jaxflat.training.step import Objective, TrainState, VectorTrainState, make_train_steps

_mesh = functools.cache(sharding.make_mesh)

CACHED_TOKENS = 512
"""Tokens of a microbatch on a CPU device; larger ones ran slower at widths 64 to 256."""


def purpose_key(seed: int, purpose: str) -> jax.Array:
    """Return the random key of one purpose, such as "init", under one seed."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def make_model(config: Config) -> Any:
    """Return the model of a config, sized for its language."""
    return sized_model(config.language, config.model)


def make_trained_model(config: Config) -> Any:
    """Return the model as training computes it: with `training.remat` and `training.compute_dtype`.

    Its parameters are those of `make_model`, and its function is the same up to rounding.
    """
    model, training = make_model(config), config.training
    if training.remat:
        model = model.clone(remat=True)
    if training.compute_dtype != "float32":
        model = model.clone(dtype=jnp.dtype(training.compute_dtype))
    return model


def is_ours(config: Config) -> bool:
    """Say whether jaxflat defines the model: the roles of its parameters are then known."""
    return config.model.name not in functions.sections_in(config.model)


def make_largest_model(config: Config) -> Any:
    """Return the larger model in which a config's model is embedded: flatness.embedded_width."""
    layers = config.flatness.embedded_layers or config.model.num_layers
    width = config.flatness.embedded_width
    return sized_model(config.language, config.model, width=width, num_layers=layers)


def sized_model(
    language: Config, section: Config, *, width: int | None = None, num_layers: int | None = None
) -> Any:
    """Return the model of a config's `model` section, sized for a language.

    width and num_layers, unless None, replace the section's.
    """
    num_words, max_length = language_kind(language).sizes(language)
    others = {"features", *functions.sections_in(section)}
    shape: dict[str, Any] = {k: v for k, v in section.items() if k not in others}
    larger = {"width": width, "num_layers": num_layers}
    shape |= {name: size for name, size in larger.items() if size is not None}
    if own := section.get(section.name):
        del shape["block"]  # jaxflat's causal models alone have it
        return functions.call(own, num_words=num_words, max_length=max_length, **shape)
    return make_language_model(num_words, max_length, **shape)


def make_mesh(config: Config) -> Mesh:
    """Return the mesh; with mesh.data=-1, it has as many devices as divide every batch evenly.

    As many of them as possible lie along "sweep", which divides the `training.together` slots.
    Raises ValueError if mesh.model exceeds the number of devices, or if the mesh leaves out a
    device of several processes.
    """
    num_data, num_model, num_devices = config.mesh.data, config.mesh.model, jax.device_count()
    if num_model > num_devices:
        raise ValueError(f"mesh.model={num_model}, but there are {num_devices} devices")
    common, slots = math.gcd(*batch_sizes(config).values()), config.training.together
    fair = [
        (i * n, i, n)
        for i in range(1, min(slots, num_devices) + 1)
        for n in (range(1, num_devices + 1) if num_data == -1 else [num_data])
        if slots % i == 0 and common % (i * n * num_model) == 0 and i * n * num_model <= num_devices
    ]
    _, num_sweep, num_data = max(fair, default=(1, 1, max(num_data, 1)))
    mesh = _mesh(num_data, num_model, num_sweep)
    if jax.process_count() > 1 and mesh.size < num_devices:
        raise ValueError(
            f"mesh.data={num_data} times mesh.model={num_model} leaves out some of the "
            f"{num_devices} devices of {jax.process_count()} processes; set mesh.data="
            f"{num_devices // num_model}, and batch sizes that are multiples of {num_devices}"
        )
    return mesh


def batch_sizes(config: Config) -> dict[str, int]:
    """Return every batch size that is divided over the mesh's devices, by its config key."""
    sizes = {}
    for name, phase in config.phases.items():
        sizes[f"phases.{name}.batch_size"] = phase.batch_size
        if phase.microbatch_size:
            sizes[f"phases.{name}.microbatch_size"] = phase.microbatch_size
        if phase.adversary.strength:
            sizes[f"phases.{name}.adversary.num_sentences"] = phase.adversary.num_sentences
        if phase.projection.checkpoint_steps:
            sizes[f"phases.{name}.projection.batch_size"] = phase.projection.batch_size
    sizes["flatness.microbatch_size"] = config.flatness.microbatch_size
    sizes["evaluation.batch_size"] = config.evaluation.batch_size
    return sizes


@functools.cache
def loss_functions(model: LanguageModel) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return (loss_fn, log_probs_fn) of a model; every call returns the same two functions."""
    return masked_lm_loss(model.apply), masked_log_probs(model.apply)


def phase_loss_fn(model: Any, settings: Config) -> Callable[..., Any]:
    """Return the loss that a phase minimizes, without its adversary and its flatness penalty."""
    own = settings.get(settings.objective)
    return functions.call(own, apply_fn=model.apply) if own else loss_functions(model)[0]


@functools.cache
def phase_optimizer(section: Config) -> Any:
    """Return the optimizer of a phase, for learning rate 1."""
    chosen = section[section.name]
    if functions.is_function(chosen):
        optimizer = functions.call(chosen, learning_rate=1.0)
    else:
        optimizer = make_optimizer(section.name, chosen)
    if not section.skip_nonfinite:
        return optimizer
    return optax.apply_if_finite(optimizer, section.skip_nonfinite)


def train_steps(
    config: Config, settings: Config, mesh: Mesh
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Return the compiled training steps of a phase with these settings; its anneals use them, too.

    Of the config, only the model and what `batch_division` reads decide the compiled code.
    """
    names = ("targets", "objective", "batch_size", "optimizer", "adversary")
    compiled_in = {name: settings[name] for name in names}
    if own := settings.get(settings.objective):
        compiled_in[settings.objective] = own
    if settings.flatness_penalty.strength:  # the strength itself is an argument of the steps
        compiled_in["flatness_penalty"] = {**settings.flatness_penalty, "strength": None}
    return _train_steps(
        make_trained_model(config),
        FrozenConfigDict(compiled_in),
        config.language.masking,
        mesh,
        batch_division(config, settings, mesh),
    )


@functools.cache
def _train_steps(
    model: Any, settings: Config, masking: str, mesh: Mesh, division: Division
) -> Callable[..., tuple[TrainState, jax.Array]]:
    loss_fn, penalty = phase_loss_fn(model, settings), None
    if "flatness_penalty" in settings:
        penalty = make_flatness_penalty(model.apply, loss_fn, settings)

    def place(shardings: Callable[[Mesh, Any], Any]) -> Callable[[Any], Any]:
        return lambda tree: jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))

    return make_train_steps(
        Objective(loss_fn, penalty, make_adversary(model.apply, settings), division),
        make_sampler(settings, masking, mesh, division),
        phase_optimizer(settings.optimizer),
        skips=settings.optimizer.skip_nonfinite > 0,
        constrain_gradient=place(sharding.param_shardings),
        constrain_state=place(state_shardings),
    )


def batch_division(config: Config, settings: Config, mesh: Mesh) -> Division:
    """Return how a step of a phase divides its batch; `settings` are the phase's.

    Without a microbatch_size, a CPU takes parts whose activations stay in its cache. Steps of our
    own models and objectives compute no padding beyond a microbatch's longest sentence. The slots
    of one program would compute it, because they cannot branch apart.
    """
    penalty, on_cpu = settings.flatness_penalty, jax.default_backend() == "cpu"
    num_shards = mesh.shape["data"] if on_cpu and mesh.shape["model"] == 1 else 1
    # The rank of all features together is not a sum over shards.
    if penalty.strength and penalty.measure in NEED_WHOLE_BATCH:
        return Division(1 if penalty.measure == "feature_rank" else num_shards)
    lengths = padded_lengths(config.language)
    num_microbatches = 1
    if settings.microbatch_size:
        num_microbatches = settings.batch_size // settings.microbatch_size
    elif on_cpu and config.training.together == 1:
        size = settings.batch_size // (mesh.shape["data"] * mesh.shape["model"])
        wanted = size * lengths[-1] / CACHED_TOKENS
        divisors = [n for n in range(1, size + 1) if size % n == 0 and n <= max(1, 2 * wanted)]
        num_microbatches = min(divisors, key=lambda n: abs(math.log(n / wanted)))
    cuts = num_microbatches > 1 and len(lengths) > 1 and config.training.together == 1
    if not cuts or not is_ours(config) or settings.objective in settings:
        lengths = ()
    return Division(num_shards, num_microbatches, lengths)


def schedule(settings: Config, anneal: bool) -> Schedule:
    """Return the learning rates of a phase, or of an anneal that branches off it."""
    chosen = settings.schedule
    if anneal:
        length = settings.anneal_steps
        return Schedule(chosen.learning_rate, 0, length, length)
    return Schedule(chosen.learning_rate, chosen.warmup_steps, chosen.decay_steps, settings.steps)


def init_params(config: Config, mesh: Mesh | None = None) -> Any:
    """Return the initial parameters, a function of init_seed and the model's shape.

    With a mesh, each device makes only its shard of the parameters that `model` divides.
    """
    return initializer(make_model(config), mesh)(purpose_key(config.init_seed, "init"))


@functools.cache
def initializer(model: Any, mesh: Mesh | None) -> Callable[[jax.Array], Any]:
    """Return the compiled function from a key to a model's initial parameters, on the mesh."""

    def initialize(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))["params"]
        if mesh is None:
            return params
        return jax.lax.with_sharding_constraint(params, sharding.param_shardings(mesh, params))

    return jax.jit(initialize)


def params_template(config: Config, mesh: Mesh) -> Any:
    """Return the shapes of a model's parameters with their places on the mesh."""
    shapes = jax.eval_shape(lambda: init_params(config))

    def placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, shapes, sharding.param_shardings(mesh, shapes))


def num_params(config: Config) -> int:
    """Return the number of parameters, 0 for the lookup table."""
    if config.model.name == "lookup_table":
        return 0
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_params(config))))


def init_state(params: Any, phase: Phase) -> TrainState:
    """Return the state at a phase's start: `params`, and a new state of optimizer and penalty."""
    optimizer, penalty = phase_optimizer(phase.settings.optimizer), phase.settings.flatness_penalty
    fields = params, optimizer.init(params), jnp.asarray(phase.start, jnp.int32)
    if penalty.strength and penalty.measure == "hessian_max_eigenvalue":
        return VectorTrainState(*fields, first_vector(params))
    return TrainState(*fields)


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Return where each array of a training state is on the mesh."""
    moments = sharding.moment_shardings(mesh, state.optimizer_state)
    return replace(sharding.param_shardings(mesh, state), optimizer_state=moments)
