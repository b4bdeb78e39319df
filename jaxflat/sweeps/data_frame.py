"""The long table of a sweep as a pandas DataFrame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxflat.config.validation import InputError

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]


def read_results(workdir: Path | str) -> pandas.DataFrame:
    """Return measurements.csv of a sweep: one row per number, with the exact values of the file.

    Empty cells are missing values; `n` and `shots` are integers. Raises ImportError if pandas is
    not installed, and InputError if the folder has no measurements.csv.
    """
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("read_results needs pandas: pip install 'jaxflat[pandas]'") from None
    path = Path(workdir) / "measurements.csv"
    if not path.is_file():
        raise InputError(f"{path} does not exist; run the sweep's command again to write it")
    table = pandas.read_csv(
        path,
        dtype={"value": "str", "sem": "str", "shots": "Int64", "n": "Int64"},
        keep_default_na=False,
        na_values=[""],
    )
    return table.astype({"value": float, "sem": float})  # exact, unlike some parsers of read_csv
