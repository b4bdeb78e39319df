"""A language's sentences as a data set on disk: its columns, and the shards that devices make."""

import functools
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.datasets.order import example_ids
from jaxflat.datasets.reader import Dataset, open_dataset
from jaxflat.datasets.record_bytes import Columns, Types, layout_of
from jaxflat.datasets.shards import claim, finish, is_finished, shard_path, write_shard
from jaxflat.distributed import preemption
from jaxflat.distributed.leases import hold
from jaxflat.languages.generated import text_language
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import all_labels
from jaxflat.runs import experiment
from jaxflat.runs.languages import kind_of, make_language
from jaxflat.storage.files import sha256

SHARD_SIZE = 65_536
SLICE = 1024  # sentences whose labels and conditionals are computed in one call


def column_types(language: Any, labelings: Sequence[str], conditionals: bool) -> Types:
    """Return the types of a language's columns; numbers have 16 bits if they fit.

    tokens (T,) and length; one `<task>.<labeling>` for every task and labeling asked for, -1
    where the task has no label; with `conditionals`, `conditionals` (T, V) in nats.
    """
    types: dict[str, np.dtype] = {}
    types["tokens"] = np.dtype((_integer(language.num_words), (language.max_length,)))
    types["length"] = np.dtype(np.int32)
    for name, task in language.tasks.items():
        for labeling in labelings:
            types[f"{name}.{labeling}"] = np.dtype(_integer(task.num_classes))
    if conditionals:
        shape = (language.max_length, language.num_words)
        types["conditionals"] = np.dtype((np.float32, shape))
    return types


def columns_of(
    language: Any, key: jax.Array, size: int, labelings: Sequence[str], conditionals: bool
) -> Columns:
    """Return the columns of `size` sentences, a function of the language and the key."""
    sentences = jax.device_get(language.sample(key, size))

    def part(rows: slice) -> Columns:
        preemption.stop_if_requested()
        some = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), sentences)
        columns = {"tokens": some.tokens_BxT, "length": some.lengths_B}
        for name, (labels_B, valid_B) in all_labels(language.tasks, some, labelings).items():
            columns[name] = jnp.where(valid_B, labels_B, -1)
        if conditionals:
            args = some.tokens_BxT, some.lengths_B
            columns["conditionals"] = language.conditional_log_probs(*args)
        return jax.device_get(columns)

    parts = [part(slice(start, start + SLICE)) for start in range(0, size, SLICE)]
    return {
        name: np.concatenate(
            [columns[name] for columns in parts], dtype=kind.base, casting="unsafe"
        )
        for name, kind in column_types(language, labelings, conditionals).items()
    }


def build_dataset(
    section: Config,
    directory: Path,
    *,
    num_sentences: int,
    seed: int,
    shard_size: int = SHARD_SIZE,
    purpose: str = "corpus",
    labelings: Sequence[str] = (),
    conditionals: bool = False,
    on_shard: Callable[[int, bool], None] = lambda size, made: None,
) -> Dataset:
    """Write a language's sentences to a directory, or complete the ones that exist.

    A shard is a function of the section, the seed and its number; so a directory that was left
    half-way ends up with the same bytes. The
    SHA-256 of all shards is recorded, and later verified, when all exist. Each device makes its own
    shards. on_shard is called
    with 0 when work starts, then with each shard's sentences and whether it had to be made. Raises
    DatasetError where the directory holds anything else, Preempted where a signal came.
    """
    shard_size = min(shard_size, num_sentences)
    lengths = [shard_size] * (num_sentences // shard_size)
    lengths += [num_sentences % shard_size] if num_sentences % shard_size else []
    chosen = {"name": section.name, "seed": section.seed}
    settings = {"language": chosen | {section.name: section[section.name].to_dict()}, "seed": seed}
    settings |= {"num_sentences": num_sentences, "shard_size": shard_size, "purpose": purpose}
    settings |= {"content": kind_of(section).file_digests(section)}
    settings |= {"labelings": list(labelings), "conditionals": conditionals}
    language = make_language(section)
    types = column_types(language, labelings, conditionals)
    layout = layout_of(types)
    devices = jax.local_devices()[: len(lengths)]
    free: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    for device in devices:
        free.put((device, jax.device_put(language, device)))

    def make(shard: int) -> str:
        path = shard_path(directory, section.name, shard, len(lengths))
        if missing := not path.exists():
            device, placed = free.get()
            try:
                with jax.default_device(device):
                    key = jax.random.fold_in(experiment.purpose_key(seed, purpose), shard)
                    columns = columns_of(placed, key, shard_size, labelings, conditionals)
            finally:
                free.put((device, placed))
            kept = {name: column[: lengths[shard]] for name, column in columns.items()}
            write_shard(path, layout, kept)
        on_shard(lengths[shard], missing)
        return sha256(path)

    with claim(directory, settings):
        on_shard(0, False)
        digests = _run(make, len(lengths), len(devices))
        finish(directory, section.name, types, lengths, digests)
    return open_dataset(directory)


def prepare(section: Config, display: Display) -> None:
    """Make what a language needs on disk, unless it exists: its teacher, stored sentences."""
    kind_of(section).prepare(section, display)
    if section.stored_sentences and not is_finished(folder := _stored_folder(section)):
        made = 0

        def on_shard(size: int, _: bool) -> None:
            nonlocal made
            made += size
            display.advance_stage(made, "store sentences")

        shard_size = min(SHARD_SIZE, -(-section.stored_sentences // 16))
        with hold(folder, display.wait):
            if is_finished(folder):  # by another, meanwhile
                return
            display.start_stage("store sentences", section.stored_sentences)
            build_dataset(
                section,
                folder,
                num_sentences=section.stored_sentences,
                seed=section.seed,
                shard_size=shard_size,
                purpose="stored",
                on_shard=on_shard,
            )


def stored_sentences(
    section: Config, seed: int, step: int, num_steps: int, batch_size: int
) -> Sentences:
    """Return the stored sentences of steps step .. step + num_steps - 1, arrays SxBx...

    The batch of a step is a function of (seed, step): see `datasets.order`.
    """
    dataset = _open(_stored_folder(section))
    ids = [example_ids(seed, s, batch_size, len(dataset)) for s in range(step, step + num_steps)]
    columns = dataset.read(np.concatenate(ids))
    tokens_SxBxT = columns["tokens"].reshape(num_steps, batch_size, -1).astype(np.int32)
    lengths_SxB = columns["length"].reshape(num_steps, batch_size)
    return Sentences(jnp.asarray(tokens_SxBxT), jnp.asarray(lengths_SxB), latents=None)


def _stored_folder(section: Config) -> Path:
    settings = section[section.name].to_dict() | {"seed": section.seed}
    settings |= {"num_sentences": section.stored_sentences}
    settings |= {"content": kind_of(section).file_digests(section)}
    return text_language.product_folder(section, section.name, settings)


_open = functools.cache(open_dataset)


def _run(make: Callable[[int], str], num_shards: int, num_threads: int) -> list[str]:
    """Return the results for all shards; the first error ends the rest."""
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(make, shard) for shard in range(num_shards)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _integer(largest: int) -> type[np.integer]:
    return np.int16 if largest <= np.iinfo(np.int16).max else np.int32
