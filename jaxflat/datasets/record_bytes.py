"""The bytes of a record: a tf.Example whose columns have fixed shapes and fixed offsets.

TensorFlow Datasets serialises one record. All others have the same bytes between their columns. So
any number of records is one numpy array of a structured dtype, filled and read column by column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Columns = dict[str, np.ndarray]
"""Arrays with a leading axis N of records, by column name."""

Types = Mapping[str, np.dtype]
"""A column's dtype in one record, its shape included: np.dtype(("int16", (T,)))."""


@dataclass(frozen=True)
class RecordLayout:
    """The structured dtype of a record, and the bytes of a record with all columns zero."""

    dtype: np.dtype
    template: bytes

    def encode(self, columns: Columns) -> list[bytes]:
        """Return N records; raises ValueError on columns of other names, dtypes or shapes."""
        joined, size = self._fill(columns), len(self.template)
        return [joined[start : start + size] for start in range(0, len(joined), size)]

    def decode(self, records: Sequence[bytes]) -> Columns:
        """Return the columns of N records; raises ValueError if a record has another layout."""
        joined = b"".join(records)
        if any(len(record) != len(self.template) for record in records):
            raise ValueError("a record has another length than its columns need")
        table_N = np.frombuffer(joined, self.dtype)
        columns = {name: np.ascontiguousarray(table_N[name]) for name in self.dtype.names or ()}
        if self._fill(columns) != joined:
            raise ValueError("a record has other columns")
        return columns

    def _fill(self, columns: Columns) -> bytes:
        names = list(self.dtype.names or ())
        if set(columns) != set(names):
            raise ValueError(f"columns are {sorted(columns)}; they must be {sorted(names)}")
        num_records = len(columns[names[0]])
        joined = bytearray(self.template * num_records)
        table_N = np.frombuffer(joined, self.dtype)
        for name in names:
            if columns[name].dtype != table_N[name].dtype:
                raise ValueError(f"column {name} is {columns[name].dtype}, not {self.dtype[name]}")
            if columns[name].shape != table_N[name].shape:
                raise ValueError(
                    f"column {name} has shape {columns[name].shape}, not {table_N[name].shape}"
                )
            table_N[name] = columns[name]
        return bytes(joined)


def features_of(types: Types) -> Any:
    """Return the tfds FeaturesDict of columns, each stored as its raw bytes."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(shape=kind.shape, dtype=kind.base.type, encoding="bytes")
            for name, kind in types.items()
        }
    )


def types_of(features: Any) -> Types:
    """Return the types of a FeaturesDict of `features_of`; raises ValueError on any other."""
    try:
        types = {name: np.dtype((f.np_dtype, f.shape)) for name, f in features.items()}
        same = features_of(types).to_json() == features.to_json()
    except (AttributeError, TypeError) as error:
        raise ValueError("the columns are not arrays of fixed shapes") from error
    if not (types and same):
        raise ValueError("the columns are not arrays of fixed shapes stored as bytes")
    return types


def layout_of(types: Types) -> RecordLayout:
    """Return the layout of records with these columns, found by serialising a few of them.

    A column's offset is where a record changes when that column's bits change from all 0 to all 1.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    # The class is made at run time, so no type checker sees it.
    Example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
    features = features_of(types)

    def serialize(full: str = "") -> np.ndarray:
        example = {
            name: np.frombuffer((b"\xff" if name == full else b"\0") * kind.itemsize, kind)[0]
            for name, kind in types.items()
        }
        message = Example.FromString(features.serialize_example(example))
        # Only this option fixes the order of a map.
        return np.frombuffer(message.SerializeToString(deterministic=True), np.uint8)

    template_R = serialize()
    offsets = [int(np.argmax(serialize(name) != template_R)) for name in types]
    fields = {"names": list(types), "formats": list(types.values())}
    fields |= {"offsets": offsets, "itemsize": len(template_R)}
    dtype: Any = np.dtype(fields)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return RecordLayout(dtype, template_R.tobytes())
