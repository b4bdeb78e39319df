"""GLUE's SST-2 and QNLI, from GLUE's own files or through TensorFlow Datasets."""

import importlib
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxflat.datasets.text import Examples, manual_folder, read_table, require_text, unwrap_single


@dataclass(frozen=True)
class _Task:
    folder: str
    text_columns: tuple[str, ...]
    label_values: tuple[str, ...]
    label_names: tuple[str, ...]


TASKS = {
    "sst2": _Task("SST-2", ("sentence",), ("0", "1"), ("negative", "positive")),
    "qnli": _Task(
        "QNLI",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        ("entailment", "not_entailment"),
    ),
}
# GLUE's name of each split, and TFDS's. The labels of the test split were never published.
SPLITS = {"train": "train", "dev": "validation"}
CONNECT_SECONDS = 10.0


def read_glue(folder: str | Path, task: str, split: str) -> Examples:
    """Return a split of "sst2" or "qnli" from GLUE's files: <folder>/SST-2/train.tsv and so on.

    split: "train" or "dev". Sentences keep their trailing spaces.
    Raises ValueError of one line with the file, the line and the column.
    """
    spec = _task(task, split)
    table = read_table(
        Path(folder) / spec.folder / f"{split}.tsv",
        text_columns=spec.text_columns,
        label_column="label",
        label_values=spec.label_values,
        label_names=spec.label_names,
    )
    return Examples(f"{task}/{split}", table.texts, table.labels_N, table.label_names)


def load_glue(task: str, split: str, data_dir: str | Path | None = None) -> Examples:
    """Return a split as `read_glue` does, from files in TFDS's manual folder or through TFDS.

    data_dir: TFDS's directory, by default its own. If <data_dir>/downloads/manual has GLUE's folder
    of the task, its files are read. Otherwise TFDS downloads and prepares the task once, without
    TensorFlow. Examples have the order of GLUE's files.
    If TFDS fails, raises ValueError of one line that says where to put the files.
    """
    spec = _task(task, split)
    manual = manual_folder(data_dir)
    if (manual / spec.folder).is_dir():
        return read_glue(manual, task, split)
    try:
        rows = _tfds_rows(f"glue/{task}", SPLITS[split], manual.parents[1])
        return _from_rows(f"{task}/{split}", rows, spec)
    except Exception as error:  # TFDS, its dependencies and the network raise many classes.
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, ImportError) and error.name:
            cause += f"; pip install {error.name}"
        raise ValueError(
            f"glue/{task} through TFDS: {cause}; else put GLUE's train.tsv and dev.tsv into "
            f"{manual / spec.folder}"
        ) from error


def _task(task: str, split: str) -> _Task:
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    return TASKS[task]


def _tfds_rows(name: str, split: str, data_dir: Path) -> list[dict[str, Any]]:
    """Return TFDS's examples of a split in the order of GLUE's file."""
    import tensorflow_datasets as tfds

    # Without TensorFlow, TFDS cannot import all of its builders; this one is enough.
    importlib.import_module("tensorflow_datasets.text.glue")
    builder: Any = tfds.builder(name, data_dir=str(data_dir), try_gcs=False)
    if not builder.data_path.exists():
        _check_reachable(builder.builder_config.data_url)
        builder.download_and_prepare(file_format="array_record")
    rows = builder.as_data_source(split)
    return sorted((dict(row) for row in rows), key=lambda row: int(row["idx"]))


def _check_reachable(url: str) -> None:
    """Raise OSError within seconds; TFDS would retry for minutes."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError as error:  # The server answers, so a GET by TFDS may succeed.
        error.close()


def _from_rows(name: str, rows: list[dict[str, Any]], spec: _Task) -> Examples:
    texts = [
        tuple(
            require_text(row[column].decode(), f"example {row['idx']}, {column!r}")
            for column in spec.text_columns
        )
        for row in rows
    ]
    labels_N = np.array([row["label"] for row in rows], np.int32)
    if not texts or labels_N.min() < 0 or labels_N.max() >= len(spec.label_names):
        raise ValueError("the split is empty or has unlabelled examples")
    return Examples(name, unwrap_single(texts), labels_N, spec.label_names)
