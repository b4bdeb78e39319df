"""measurements.csv has every line that was measured; results.csv is its pivot."""

import csv
import sys
from pathlib import Path

import pytest

from jaxflat import main
from jaxflat.analysis import results_csv
from jaxflat.analysis.mixed_settings import mixed_settings
from jaxflat.config import param, product
from jaxflat.config.validation import InputError
from jaxflat.storage.files import read_lines, write_json
from jaxflat.sweeps import read_results, results
from tests.support.measured_sweep import add_points
from tests.support.sweeps import tiny_config, tiny_sweep

SECTIONS = ("evaluation", "flatness", "probes")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sweep")
    add_points(tiny_config(), tiny_sweep(), path)
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_both_tables_have_every_measured_number(workdir):
    long = {
        (row["point"], row["step"], row["projected"], row["column"]): row
        for row in read_table(workdir / "measurements.csv")
        if row["column"]
    }
    wide = {
        (row["point"], row["step"], row["projected"]): row
        for row in read_table(workdir / "results.csv")
    }
    lines = [
        (path.parent.name, line)
        for section in SECTIONS
        for path in workdir.glob(f"*/{section}.jsonl")
        for line in read_lines(path)
        if "column" in line
    ]
    assert len(long) == len(lines) > 100
    for point, line in lines:
        checkpoint = point, str(line["step"]), str(line["projected"])
        column, row = line["column"], long[*checkpoint, line["column"]]
        for name, key in (("value", "mean"), ("sem", "sem"), ("n", "num_samples")):
            assert float(row[name]) == line[key]
        assert row["over"] == line["over"]
        assert float(wide[checkpoint][column]) == line["mean"]
        assert float(wide[checkpoint][f"{column}_sem"]) == line["sem"]


def test_columns_that_name_a_checkpoint_are_those_of_the_wide_table(workdir):
    long, wide = (read_table(workdir / f"{name}.csv") for name in ("measurements", "results"))
    names = [name for name in long[0] if name not in results.NUMBER]
    assert names == list(wide[0])[: len(names)]
    assert {tuple(row[name] for name in names) for row in long} == {
        tuple(row[name] for name in names) for row in wide
    }
    assert {"model.width", "seed", "last", "num_params", "sentences_seen"} <= set(names)


def test_a_measure_without_a_number_has_an_empty_row(workdir):
    rows = [r for r in read_table(workdir / "measurements.csv") if not r["column"]]
    assert {row["measure"] for row in rows} == {"hessian_density"}
    assert not any(row["value"] or row["sem"] for row in rows)
    assert "" not in read_table(workdir / "results.csv")[0]


@pytest.mark.parametrize(
    ("section", "column", "parts"),
    [
        ("evaluation", "excess_loss", {"measure": "excess_loss"}),
        ("flatness", "fisher_trace/mlp", {"measure": "fisher_trace", "group": "mlp"}),
        ("flatness", "fisher_trace@embedded", {"measure": "fisher_trace@embedded"}),
        (
            "flatness",
            "hessian_eigenvalue/largest_1@embedded",
            {"measure": "hessian_eigenvalue@embedded", "group": "largest_1"},
        ),
        (
            "probes",
            "linear_probe/span_0_2.map/16",
            {"measure": "linear_probe", "task": "span_0_2", "labeling": "map", "shots": "16"},
        ),
        (
            "probes",
            "own/a/b.c.given/200",
            {"measure": "own", "task": "a/b.c", "labeling": "given", "shots": "200"},
        ),
        ("probes", "bayes/x.latent", {"measure": "bayes", "task": "x", "labeling": "latent"}),
        ("probes", "belief_state/x.y/4", {"measure": "belief_state", "task": "x.y/4"}),
    ],
)
def test_a_column_is_split_into_its_measure_and_its_group_or_task(section, column, parts):
    line = {"column": column, "measure": "made_by", "settings": "0"}
    row = results._number(section, line, {"made_by": "digest"})
    described = ("measure", "group", "task", "labeling", "shots")
    assert {name: row[name] for name in described} == dict.fromkeys(described, "") | parts
    assert (row["column"], row["settings"]) == (column, "digest")


def test_the_analysis_reads_the_same_rows_from_either_table(workdir):
    long = results_csv.read_results(workdir / "measurements.csv")
    assert long == results_csv.read_results(workdir / "results.csv")
    assert len(long) == 2 * 2 * 4 + 1
    assert results_csv.table_path(workdir) == workdir / "measurements.csv"


def test_a_wrong_cell_is_named_with_its_line(tmp_path):
    path = tmp_path / "measurements.csv"
    lines = ("point,step,projected,measure,column,value,sem", "a,4,0,x,x,1,2", "b,4,0,x,x,1,2")
    path.write_text("\n".join([*lines, "b,4,0,y,y,much,2"]))
    with pytest.raises(ValueError, match=r"measurements\.csv, line 3: column 'y' .* has 'much'"):
        results_csv.read_results(path)


def test_mixed_settings_are_named_and_seeds_are_none(tmp_path, capsys):
    config = tiny_config()
    widths = param("model.width", [8])
    add_points(config, product(param("seed", [0, 1]), widths), tmp_path)
    assert mixed_settings(tmp_path) == []
    config.flatness.num_probes = 4
    add_points(config, product(param("seed", [2]), widths), tmp_path)
    (sentence,) = mixed_settings(tmp_path)
    names = [row["point"] for row in read_table(tmp_path / "results.csv")]
    assert sentence == (
        "hessian_trace, hessian_trace@embedded: points were measured under 2 settings "
        f"(2 like {names[0]}, 1 like {names[-1]}); their config.json files show the "
        "difference"
    )
    for status in tmp_path.glob("*/config.json"):
        write_json(status.with_name("status.json"), {"state": "done"})
    main.show_report(tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"warning: {sentence}" in printed
    assert "not finished" not in printed
    (tmp_path / names[0] / "status.json").unlink()
    main.show_report(tmp_path)
    assert "warning: 1 of 3 points are not finished" in capsys.readouterr().out


def test_mixed_settings_need_no_long_table(tmp_path):
    assert mixed_settings(tmp_path) == []


def test_the_data_frame_has_the_numbers_of_the_wide_table(workdir):
    pandas = pytest.importorskip("pandas", reason="needs pip install 'jaxflat[pandas]'")
    table = read_results(workdir)
    assert len(table) == len(read_table(workdir / "measurements.csv"))
    assert {str(table[name].dtype) for name in ("n", "shots")} == {"Int64"}
    assert table["model.width"].isna().sum() == (table["model.name"] == "lookup_table").sum() > 0
    numbers = table.dropna(subset="column").set_index(["point", "step", "projected", "column"])
    found = 0
    for row in read_table(workdir / "results.csv"):
        checkpoint = row["point"], int(row["step"]), int(row["projected"])
        for column in ("excess_loss", "hessian_trace@embedded", "linear_probe/state_2.map/16"):
            if row[column]:
                number = numbers.loc[(*checkpoint, column)]
                assert (number["value"], number["sem"]) == (
                    float(row[column]),
                    float(row[f"{column}_sem"]),
                )
                found += 1
    assert found == 2 * 2 * 4 * 3 + 2
    assert isinstance(table, pandas.DataFrame)


def test_without_pandas_the_error_names_the_extra(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas: pip install 'jaxflat\[pandas\]'$"):
        read_results(workdir)


def test_a_folder_without_measurements_is_named(tmp_path):
    pytest.importorskip("pandas", reason="needs pip install 'jaxflat[pandas]'")
    with pytest.raises(InputError, match=r"measurements\.csv does not exist; run the sweep's"):
        read_results(tmp_path)
