"""Sentences and labels from text files; errors name the file and the line."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Examples:
    """Sentences, or pairs (first, second), and their labels.

    labels_N: int32 indices into `label_names`, or None without labels.
    """

    name: str
    texts: tuple[str, ...] | tuple[tuple[str, str], ...]
    labels_N: np.ndarray | None = None
    label_names: tuple[str, ...] = ()


def manual_folder(data_dir: str | Path | None = None) -> Path:
    """Return the folder for data sets that the user fetches: TFDS's <data_dir>/downloads/manual.

    data_dir: by default TFDS_DATA_DIR, and without it ~/tensorflow_datasets.
    """
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir).expanduser() / "downloads" / "manual"


def read_sentences(path: str | Path) -> Examples:
    """Return the sentences of a UTF-8 file with one sentence on each line, unchanged.

    Raises ValueError of one line with the file and the line.
    """
    lines = numbered_lines(read_bytes(path), path)
    texts = tuple(require_text(text, f"{path}: line {number}") for number, text in lines)
    return Examples(name=Path(path).stem, texts=texts)


def read_table(
    path: str | Path,
    text_columns: Sequence[str],
    label_column: str | None = None,
    label_values: Sequence[str] = (),
    label_names: Sequence[str] = (),
) -> Examples:
    """Return sentences (one text column) or pairs (two) of a UTF-8 file of tab-separated fields.

    The first line names the columns. Quotation marks have no special meaning, as in GLUE.
    label_values: the possible values of the label column, in the order of the classes.
    label_names: the names of the classes, by default their values.
    Raises ValueError of one line with the file, the line and the column.
    """
    if len(text_columns) not in (1, 2):
        raise ValueError(f"text_columns={tuple(text_columns)!r} must name one column or two")
    lines = numbered_lines(read_bytes(path), path)
    _, first = next(lines)
    header = first.split("\t")
    text_places = [_place(header, column, path) for column in text_columns]
    label_place = None if label_column is None else _place(header, label_column, path)
    class_of = {value: place for place, value in enumerate(label_values)}
    texts, labels = [], []
    for number, line in lines:
        where = f"{path}: line {number}"
        fields = split_fields(line, len(header), where)
        texts.append(
            tuple(
                require_text(fields[place], f"{where}, column {column!r}")
                for place, column in zip(text_places, text_columns, strict=True)
            )
        )
        if label_place is not None:
            if (label := fields[label_place]) not in class_of:
                raise ValueError(
                    f"{where}, column {label_column!r}: {_short(label)} is not one of "
                    f"{', '.join(map(repr, class_of))}"
                )
            labels.append(class_of[label])
    if not texts:
        raise ValueError(f"{path}: line 1 names the columns, and no line follows")
    return Examples(
        name=Path(path).stem,
        texts=unwrap_single(texts),
        labels_N=None if label_column is None else np.array(labels, np.int32),
        label_names=tuple(label_names or label_values) if label_column is not None else (),
    )


def read_bytes(path: str | Path) -> bytes:
    """Return the bytes of a file; raises ValueError of one line if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or type(error).__name__}") from error


def numbered_lines(raw: bytes, path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line of UTF-8 text; lines end in LF or CR LF.

    Unicode's other separators are part of a line. Raises ValueError if the file is empty or not
    UTF-8. The iterator raises ValueError at a line with a NUL or a carriage return within it.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error counts bytes after the byte order mark, which has no newline.
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {number} is not UTF-8 ({error.reason})") from None
    if not text:
        raise ValueError(f"{path}: the file is empty")
    text = text.replace("\r\n", "\n").removesuffix("\n")
    return _checked_lines(text.split("\n"), path)


def _checked_lines(lines: list[str], path: str | Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        for character, name in (("\0", "NUL character"), ("\r", "carriage return")):
            if character in line:
                raise ValueError(f"{path}: line {number} has a {name} within it")
        yield number, line


def split_fields(line: str, num_fields: int, where: str) -> list[str]:
    """Return the tab-separated fields of a line; raises ValueError unless there are num_fields."""
    fields = line.split("\t")
    if len(fields) != num_fields:
        raise ValueError(f"{where}: the number of fields is {len(fields)}, not {num_fields}")
    return fields


def require_text(text: str, where: str) -> str:
    """Return the text; raises ValueError if it is empty or blank."""
    if not text.strip():
        raise ValueError(f"{where}: the text is empty")
    return text


def unwrap_single(rows: Sequence[tuple[str, ...]]) -> tuple[Any, ...]:
    """Return rows of one text as texts, and rows of two unchanged."""
    return tuple(row[0] if len(row) == 1 else row for row in rows)


def _place(header: list[str], column: str, path: str | Path) -> int:
    if header.count(column) != 1:
        problem = "there are two columns" if column in header else "there is no column"
        raise ValueError(
            f"{path}: line 1: {problem} {column!r}; the columns are "
            f"{', '.join(_short(name) for name in header[:10])}"
        )
    return header.index(column)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
