"""From a resolved config to the objects of one experiment: language, model, compiled functions.

What is compiled is built once for each distinct piece of config (`functools.cache` on frozen
configs), so the points of a sweep that share a model shape share its compiled code.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxflat import sharding, text_language
from jaxflat.config import Config
from jaxflat.languages import LANGUAGES
from jaxflat.languages.batches import MaskedBatch, Source, source_batch
from jaxflat.models.transformer import Transformer
from jaxflat.training.objectives import masked_lm_loss, masked_log_probs
from jaxflat.training.optimizers import OPTIMIZERS, Schedule
from jaxflat.training.step import TrainState, make_train_steps
from jaxflat.trajectory import Phase

_mesh = functools.cache(sharding.make_mesh)


def purpose_key(seed: int, purpose: str) -> jax.Array:
    """Return the key of everything random that one seed decides for one purpose."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


@functools.cache
def make_language(section: Config) -> Any:
    """Return the language of a config's `language` section; ValueError names what is wrong."""
    if section.name == "generated":
        return text_language.make_generated(section)
    return LANGUAGES[section.name](section.seed, **section[section.name])


def language_sizes(section: Config) -> tuple[int, int]:
    """Return (words, longest sentence) of a language, whose teacher may not be there yet."""
    if section.name == "generated":
        return section.generated.num_words, section.generated.length
    language = make_language(section)
    return language.num_words, language.max_length


def make_model(config: Config) -> Any:
    """Return the transformer of a config, sized for its language."""
    num_words, max_length = language_sizes(config.language)
    return Transformer(
        num_words=num_words,
        max_length=max_length,
        width=config.model.width,
        num_layers=config.model.num_layers,
        num_heads=config.model.width // config.model.head_size,
        tied_decoder=config.model.tied_decoder,
    )


def make_mesh(config: Config) -> Mesh:
    """Return the mesh; with mesh.data=-1, of as many devices as share every batch evenly."""
    num_data = config.mesh.data
    if num_data == -1:
        common = math.gcd(*batch_sizes(config).values())
        num_data = max(n for n in range(1, jax.device_count() + 1) if common % n == 0)
    return _mesh(num_data)


def batch_sizes(config: Config) -> dict[str, int]:
    """Return every size that is split over the mesh's data axis, by its config key."""
    sizes = {f"phases.{name}.batch_size": config.phases[name].batch_size for name in config.phases}
    for name, phase in config.phases.items():
        if phase.projection.checkpoint_steps:
            sizes[f"phases.{name}.projection.batch_size"] = phase.projection.batch_size
    sizes["flatness.microbatch_size"] = config.flatness.microbatch_size
    sizes["evaluation.batch_size"] = config.evaluation.batch_size
    return sizes


@functools.cache
def loss_functions(model: Transformer) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return (loss_fn, log_probs_fn) of a model, the same objects at every call."""
    return masked_lm_loss(model.apply), masked_log_probs(model.apply)


@functools.cache
def make_optimizer(section: Config) -> Any:
    """Return the optimizer of a phase, at learning rate 1."""
    return OPTIMIZERS[section.name](**section[section.name])


def train_steps(
    model: Any, settings: Config, masking: str, mesh: Mesh
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Return the compiled steps of a phase, for its trunk and its anneals alike."""
    how = (settings.targets, masking)
    return _train_steps(model, settings.optimizer, settings.batch_size, how, mesh)


@functools.cache
def _train_steps(
    model: Any, optimizer: Config, batch_size: int, how: tuple[str, str], mesh: Mesh
) -> Callable[..., tuple[TrainState, jax.Array]]:
    def sample_batch(source: Source, key: jax.Array, index: jax.Array) -> MaskedBatch:
        batch = source_batch(source, key, index, batch_size, *how)
        return sharding.shard_examples(mesh, batch)

    num_shards = mesh.shape["data"] if jax.default_backend() == "cpu" else 1
    loss_fn, _ = loss_functions(model)
    return make_train_steps(loss_fn, sample_batch, make_optimizer(optimizer), num_shards)


def schedule(settings: Config, anneal: bool) -> Schedule:
    """Return the learning rate of a phase's trunk, or of an anneal that branches off it."""
    chosen = settings.schedule
    if anneal:
        length = settings.anneal_steps
        return Schedule(chosen.learning_rate, 0, length, length)
    return Schedule(chosen.learning_rate, chosen.warmup_steps, chosen.decay_steps, settings.steps)


def init_params(config: Config) -> Any:
    """Return the initial parameters, a function of init_seed and the model's shape."""
    return _initializer(make_model(config))(purpose_key(config.init_seed, "init"))


@functools.cache
def _initializer(model: Any) -> Callable[[jax.Array], Any]:
    def initialize(key: jax.Array) -> Any:
        tokens_1xT = jnp.zeros((1, model.max_length), jnp.int32)
        return model.init(key, tokens_1xT, jnp.full(1, model.max_length))["params"]

    return jax.jit(initialize)


def num_params(config: Config) -> int:
    """Return the number of parameters; the lookup table has none."""
    if config.model.name == "lookup_table":
        return 0
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_params(config))))


def init_state(params: Any, phase: Phase) -> TrainState:
    """Return the state at a phase's start: these parameters and a fresh optimizer."""
    optimizer = make_optimizer(phase.settings.optimizer)
    return TrainState(params, optimizer.init(params), jnp.asarray(phase.start, jnp.int32))
