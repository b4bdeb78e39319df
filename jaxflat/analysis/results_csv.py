"""Read the table of a sweep as typed rows, and add the means over tasks that comparisons use."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxflat.analysis.plan import Plan

SEEDS = ("seed", "data_seed", "init_seed", "probe_seed")
LANGUAGE = "language.seed"
OF_LANGUAGE = " of language "
MAP_ACCURACY = "mean over tasks: map"
LATENT_ACCURACY = "mean over tasks: latent"
GIVEN_ACCURACY = "mean over tasks: given"
PRIMARY_ACCURACY = "mean over tasks"
LATENT_CEILING = "mean over tasks: latent ceiling"

_PROBE = re.compile(r"(?P<probe>\w+)/.+\.(?P<labeling>[^./]+)/(?P<shots>\d+)")


@dataclass(frozen=True)
class Row:
    """One measured checkpoint. A missing value is absent from `values`.

    `swept` has the text of every swept key, "" if the point does not set it. `last` is True at the
    last checkpoint that its run measures, projected or not. If the sweep varies language.seed, the
    languages are replicates: `language` has its value, and `seed` has it too. `arm` is the name
    that the sweep gives, "" if it gives none.
    """

    point: str
    swept: dict[str, str]
    seed: str
    step: int
    projected: bool
    values: dict[str, float]
    last: bool = True
    language: str = ""
    arm: str = ""

    @property
    def is_lookup_table(self) -> bool:
        return self.swept.get("model.name") == "lookup_table"

    @property
    def is_control(self) -> bool:
        """True if no training produced it."""
        return self.is_lookup_table or self.is_untrained

    @property
    def is_untrained(self) -> bool:
        """True for a model at initialisation: it has no phases and is no lookup table."""
        return bool(self.swept.get("phase_order")) and not self.phases and not self.is_lookup_table

    @property
    def phases(self) -> list[str]:
        """The names of its phases, if the sweep varies them."""
        return re.findall(r"\w+", self.swept.get("phase_order", ""))


def table_path(workdir: Path) -> Path:
    """Return the table to read: measurements.csv, or results.csv where a sweep has only that."""
    long = workdir / "measurements.csv"
    return long if long.exists() else workdir / "results.csv"


def read_results(path: Path) -> list[Row]:
    """Return the rows of measurements.csv or of results.csv, or none if the file is missing.

    Swept keys come before `step`. Raises ValueError that names the file and line of a wrong cell.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        if header and not {"point", "step"} <= set(header):
            raise ValueError(f"{path}: needs the columns 'point' and 'step', has {header}")
        rows = []
        for line, record in _wide_records(reader, header):
            try:
                rows.append(_read_row(record, header))
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
        return rows


def _wide_records(
    reader: csv.DictReader, header: list[str]
) -> Iterable[tuple[int, dict[str, str]]]:
    """Return each checkpoint as a record of results.csv, and the number of its line.

    In measurements.csv, where each line has one number, that is the checkpoint's first line.
    """
    if not {"measure", "column", "value", "sem"} <= set(header):
        return ((reader.line_num, record) for record in reader)
    checkpoint = header[: header.index("measure")]
    found: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}
    for line in reader:
        key = line["point"], line["step"], line["projected"]
        start = reader.line_num, {name: line[name] for name in checkpoint}
        _, record = found.setdefault(key, start)
        record |= {line["column"]: line["value"], f"{line['column']}_sem": line["sem"]}
    return found.values()


def independent_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of replicates that share no seed: all of them, unless a sweep crosses seeds.

    A sweep may vary data_seed and init_seed separately. Two replicates with the same data_seed
    depend on each other, so of replicates that share a seed only the first is returned. A seed
    that never varies does not count.
    """
    trained_first = sorted(rows, key=lambda row: row.is_control)
    names = {row.seed: _seed_parts(row.seed) for row in trained_first}
    width = max((len(seeds) for seeds, _ in names.values()), default=0)
    varying = [
        place
        for place in range(width)
        if len({seeds[place] for seeds, _ in names.values() if place < len(seeds)}) > 1
    ]
    taken: set[tuple[str, int, str]] = set()
    kept = set()
    for name, (seeds, language) in names.items():
        parts = {(language, place, seeds[place]) for place in varying if place < len(seeds)}
        if not parts & taken:
            kept.add(name)
            taken |= parts
    return [row for row in rows if row.seed in kept]


def _seed_parts(seed: str) -> tuple[list[str], str]:
    seeds, _, language = seed.partition(OF_LANGUAGE)
    return seeds.split("/"), language


def read_number(text: str) -> float | None:
    """Return the number in a cell; None if the cell is empty (not set) or holds text."""
    try:
        return float(text)
    except ValueError:
        return None


def accuracy_columns(rows: Iterable[Row], labeling: str, plan: Plan) -> list[str]:
    """Return the columns of the declared probe and number of shots, one per task."""
    by_shots = _columns_by_shots(rows, labeling, plan)
    return by_shots.get(plan.shots or max(by_shots, default=0), [])


def budget_column(shots: int) -> str:
    """Return the column of task means (primary labeling) for `shots` labelled sentences."""
    return f"{PRIMARY_ACCURACY}, {shots} shots"


def budgets(rows: Iterable[Row]) -> list[int]:
    """Return the numbers of labelled sentences that have task means, ascending."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    found = (re.fullmatch(budget_column(0).replace("0", r"(\d+)"), name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def _columns_by_shots(rows: Iterable[Row], labeling: str, plan: Plan) -> dict[int, list[str]]:
    names = dict.fromkeys(name for row in rows for name in row.values)
    found = [match for match in map(_PROBE.fullmatch, names) if match]
    by_shots: dict[int, list[str]] = {}
    for match in found:
        if match["probe"] == plan.probe and match["labeling"] == labeling:
            by_shots.setdefault(int(match["shots"]), []).append(match.string)
    return {shots: sorted(columns) for shots, columns in by_shots.items()}


def primary_labeling(rows: Iterable[Row], plan: Plan) -> str:
    """Return the labeling that comparisons use: the first of `order` that was measured."""
    rows = list(rows)
    order = ("map", "given", "official", "latent")
    return next((labeling for labeling in order if accuracy_columns(rows, labeling, plan)), "map")


def add_task_means(rows: Sequence[Row], plan: Plan) -> None:
    """Add the means over tasks, of the declared probe, to each row that has every task."""
    labeling = primary_labeling(rows, plan)
    by_shots = _columns_by_shots(rows, labeling, plan)
    means = {budget_column(shots): columns for shots, columns in by_shots.items()} | {
        MAP_ACCURACY: accuracy_columns(rows, "map", plan),
        LATENT_ACCURACY: accuracy_columns(rows, "latent", plan),
        GIVEN_ACCURACY: accuracy_columns(rows, "given", plan),
        PRIMARY_ACCURACY: accuracy_columns(rows, labeling, plan),
        LATENT_CEILING: sorted(
            {name for row in rows for name in row.values if re.fullmatch(r"bayes/.+\.latent", name)}
        ),
    }
    for row in rows:
        for name, columns in means.items():
            if columns and all(column in row.values for column in columns):
                row.values[name] = float(np.mean([row.values[column] for column in columns]))


def _read_row(record: dict[str, str], header: list[str]) -> Row:
    before_step = header[: header.index("step")]
    swept = [name for name in before_step if name not in ("point", "arm", LANGUAGE, *SEEDS)]
    taken = {"point", "arm", "step", "projected", "last", LANGUAGE, *swept, *SEEDS}
    measured = {name: text for name, text in record.items() if text and name not in taken}
    numbers = {name: read_number(text) for name, text in measured.items()}
    for name, number in numbers.items():
        if number is None:
            raise ValueError(
                f"column {name!r} needs a number or an empty cell, has {measured[name]!r}"
            )
    seed, language = _seeds_text(record), record.get(LANGUAGE, "")
    return Row(
        point=record["point"],
        swept={name: record[name] or "" for name in swept},
        seed=f"{seed}{OF_LANGUAGE}{language}" if language else seed,
        step=int(float(record["step"] or 0)),
        projected=record.get("projected") in ("1", "True"),
        values={name: one for name, one in numbers.items() if one is not None and np.isfinite(one)},
        last=record.get("last") != "0",
        language=language,
        arm=record.get("arm") or "",
    )


def _seeds_text(record: dict[str, str]) -> str:
    return "/".join(record[name] for name in SEEDS if record.get(name))
