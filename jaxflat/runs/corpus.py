"""Write a language's sentences to disk as a data set, and read the batch of a training step."""

import functools
import queue
from collections.abc import Callable, Iterator, Sequence
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
from jaxflat.distributed.leases import acquire_lease
from jaxflat.languages.generated import text_language
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import all_labels
from jaxflat.runs import builders
from jaxflat.runs.languages import language_kind, make_language
from jaxflat.storage.files import Check, sha256

SHARD_SIZE = 65_536
SLICE = 1024  # sentences whose labels and conditionals are computed in one call


def column_types(language: Any, labelings: Sequence[str], conditionals: bool) -> Types:
    """Return the types of a language's columns; integers take 16 bits if their values fit.

    The columns are tokens (T,), length, and `<task>.<labeling>` for every task and each of
    `labelings`, -1 for a sentence without a label. With `conditionals` there is also the column
    `conditionals` (T, V) in nats.
    """
    types: dict[str, np.dtype] = {}
    types["tokens"] = np.dtype((_integer_type(language.num_words), (language.max_length,)))
    types["length"] = np.dtype(np.int32)
    for name, task in language.tasks.items():
        for labeling in labelings:
            types[f"{name}.{labeling}"] = np.dtype(_integer_type(task.num_classes))
    if conditionals:
        shape = (language.max_length, language.num_words)
        types["conditionals"] = np.dtype((np.float32, shape))
    return types


def columns_of(
    language: Any,
    key: jax.Array,
    size: int,
    labelings: Sequence[str],
    conditionals: bool,
    *,
    num_sentences: int,
) -> Iterator[Columns]:
    """Yield the columns of the first num_sentences of a batch of `size`, SLICE at a time.

    They are a function of the language, the key and the size.
    """
    types = column_types(language, labelings, conditionals)
    sentences = jax.device_get(language.sample(key, size))
    for start in range(0, num_sentences, SLICE):
        preemption.stop_if_requested()
        rows = slice(start, start + SLICE)
        part = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), sentences)
        columns = {"tokens": part.tokens_BxT, "length": part.lengths_B}
        for name, (labels_B, valid_B) in all_labels(language.tasks, part, labelings).items():
            columns[name] = jnp.where(valid_B, labels_B, -1)
        if conditionals:
            args = part.tokens_BxT, part.lengths_B
            columns["conditionals"] = language.conditional_log_probs(*args)
        columns = jax.device_get(columns)
        yield {
            name: columns[name][: num_sentences - start].astype(kind.base)
            for name, kind in types.items()
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
    assert_owned: Check = lambda: None,
    on_shard: Callable[[int, bool], None] = lambda size, missing: None,
) -> Dataset:
    """Write sentences of a language, given by its config section, to a directory of shards.

    Existing shards are kept and missing ones are made. A shard is a function of the section, the
    seed and its number, so a resumed directory gets the same bytes. The SHA-256 of every shard is
    recorded once all shards exist; only then can shards be verified. Each device makes whole
    shards. on_shard is called as on_shard(0, False) at the start, then with each shard's number of
    sentences and whether the shard was missing.

    Raises DatasetError if the directory holds anything else, Preempted after a signal, and
    what `assert_owned` raises if the directory now belongs to another worker.
    """
    shard_size = min(shard_size, num_sentences)
    lengths = [shard_size] * (num_sentences // shard_size)
    lengths += [num_sentences % shard_size] if num_sentences % shard_size else []
    chosen = {"name": section.name, "seed": section.seed}
    settings = {"language": chosen | {section.name: section[section.name].to_dict()}, "seed": seed}
    settings |= {"num_sentences": num_sentences, "shard_size": shard_size, "purpose": purpose}
    settings |= {"content": language_kind(section).file_digests(section)}
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
                    key = jax.random.fold_in(builders.purpose_key(seed, purpose), shard)
                    what = (placed, key, shard_size, labelings, conditionals)
                    parts = columns_of(*what, num_sentences=lengths[shard])
                    write_shard(path, layout, parts, assert_owned)
            finally:
                free.put((device, placed))
        on_shard(lengths[shard], missing)
        return sha256(path)

    with claim(directory, settings, assert_owned):
        on_shard(0, False)
        digests = _make_shards(make, len(lengths), len(devices))
        finish(directory, section.name, types, lengths, digests, assert_owned)
    return open_dataset(directory)


def prepare_language(section: Config, display: Display) -> None:
    """Make the files that a language needs, unless they exist: its teacher and stored sentences."""
    language_kind(section).prepare(section, display)
    if section.stored_sentences and not is_finished(folder := _stored_folder(section)):
        num_stored = 0

        def on_shard(size: int, _: bool) -> None:
            nonlocal num_stored
            num_stored += size
            display.advance_stage(num_stored, "store sentences")

        shard_size = min(SHARD_SIZE, -(-section.stored_sentences // 16))
        with acquire_lease(folder, display.print_wait) as lease:
            if is_finished(folder):  # another worker stored them meanwhile
                return
            display.start_stage("store sentences", section.stored_sentences)
            build_dataset(
                section,
                folder,
                num_sentences=section.stored_sentences,
                seed=section.seed,
                shard_size=shard_size,
                purpose="stored",
                assert_owned=lease.assert_owned,
                on_shard=on_shard,
            )


def stored_sentences(
    section: Config, seed: int, step: int, num_steps: int, batch_size: int
) -> Sentences:
    """Return the stored sentences of steps step .. step + num_steps - 1, as arrays SxBx...

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
    settings |= {"content": language_kind(section).file_digests(section)}
    return text_language.product_folder(section, section.name, settings)


_open = functools.cache(open_dataset)


def _make_shards(make: Callable[[int], str], num_shards: int, num_threads: int) -> list[str]:
    """Return make(shard) for all shards; the first error cancels the remaining shards."""
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(make, shard) for shard in range(num_shards)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _integer_type(largest: int) -> type[np.integer]:
    return np.int16 if largest <= np.iinfo(np.int16).max else np.int32
