"""The data of the interactive figure: rows of one group differ only in their seeds."""

import csv

from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.page.explorer import LEFT_OUT, MOST_CHARACTERS, explorer_data
from jaxflat.analysis.page.settings import read_provenance
from tests.analysis.conftest import write_rows


def read_rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def data_of(folder, rows):
    write_rows(folder / "results.csv", rows)
    path = folder / "results.csv"
    comparison, made = read_comparison(folder), read_provenance(folder)
    return explorer_data(comparison, made, path, MOST_CHARACTERS)


def test_rows_that_are_not_compared_are_averaged_over_their_own_seeds_only(sweep):
    folder = sweep(lookup_tables=False)
    projected = read_rows(folder)
    raw = [row | {"projected": 0} for row in projected if row["step"] == "4000"]
    data = data_of(folder, projected + raw)
    left_out = [data["arms"][arm]["name"] == LEFT_OUT for arm in data["arm"]]
    assert left_out == [False] * len(projected) + [True] * len(raw)
    groups = {}
    for row, group in zip(projected + raw, data["group"], strict=True):
        groups.setdefault(group, []).append(row)
    assert len(groups) == 3 * 3 + 3
    for rows in groups.values():
        assert len({(row["model.width"], row["step"], row["projected"]) for row in rows}) == 1
        assert len({row["seed"] for row in rows}) == len(rows) == 5


def test_languages_are_replicates_in_one_group_and_an_arm_s_name_is_told_once(sweep):
    folder = sweep(lookup_tables=False, widths=(16,))
    rows = [
        {"point": f"{language},{row.pop('point')}", "arm": "SGD", "language.seed": language} | row
        for language in (0, 1)
        for row in read_rows(folder)
    ]
    data = data_of(folder, rows)
    assert len({*data["group"]}) == 3
    assert "arm" not in data["settings"]
    assert "language.seed" in data["settings"]
