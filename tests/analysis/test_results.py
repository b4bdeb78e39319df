"""results.csv becomes rows and cells without loss, also if parts of it are missing."""

import csv

import pytest

from jaxflat.analysis.cells import group_cells
from jaxflat.analysis.plan import UNDECLARED
from jaxflat.analysis.results_csv import MAP_ACCURACY, add_task_means, read_results


def read_text(tmp_path, text):
    path = tmp_path / "results.csv"
    path.write_text(text)
    return read_results(path)


def test_every_number_of_the_file_is_read_back(sweep):
    path = sweep() / "results.csv"
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    rows = read_results(path)
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        assert (row.point, row.step, row.seed) == (
            record["point"],
            int(record["step"]),
            record["seed"],
        )
        assert row.swept["model.width"] == record["model.width"]
        for name, value in row.values.items():
            assert value == float(record[name])


def test_empty_and_not_finite_values_are_missing(tmp_path):
    (row,) = read_text(tmp_path, "point,seed,step,loss,excess_loss,x\na,0,1,,nan,2\n")
    assert row.values == {"x": 2.0}


def test_no_file_and_no_rows(tmp_path):
    assert read_results(tmp_path / "results.csv") == []
    assert read_text(tmp_path, "") == []


def test_a_file_of_another_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match="needs the columns"):
        read_text(tmp_path, "a,b\n1,2\n")


def test_arms_are_what_varies_besides_seeds_from_small_to_large(tmp_path):
    header = "point,model.width,model.layers,seed,step,num_params,loss\n"
    lines = ["a,64,2,0,5,900,1", "b,8,2,0,5,100,2", "c,8,2,1,5,100,4", "d,8,2,0,9,100,3"]
    cells = group_cells(read_text(tmp_path, header + "\n".join(lines)))
    assert list(cells) == ["width 8", "width 64"]
    assert [cell.step for cell in cells["width 8"]] == [5, 9]
    assert cells["width 8"][0].by_seed("loss") == {"0": 2.0, "1": 4.0}


def test_the_primary_is_the_map_labeling_at_most_shots_and_needs_every_task(tmp_path):
    names = ["a.map/200", "a.map/4000", "b.map/4000", "b.latent/4000", "a.map/4000_sem"]
    header = "point,seed,step," + ",".join(f"linear_probe/{name}" for name in names)
    rows = read_text(tmp_path, f"{header}\nx,0,1,.1,.8,.6,.2,.01\ny,1,1,.1,.8,,.2,.01\n")
    add_task_means(rows, UNDECLARED)
    assert rows[0].values[MAP_ACCURACY] == pytest.approx(0.7)
    assert MAP_ACCURACY not in rows[1].values


def test_a_key_that_only_follows_another_does_not_name_the_arm(sweep):
    rows = read_results(sweep() / "results.csv")
    for row in rows:
        if not row.is_lookup_table:
            row.swept["phases.pretrain.steps"] = "1" + row.swept["model.width"]
    trained = [row for row in rows if not row.is_lookup_table]
    assert list(group_cells(trained)) == ["width 16", "width 32", "width 64"]
