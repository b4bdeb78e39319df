"""Weights & Biases and MLflow, both offline, show the numbers of results.csv."""

import csv
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from jaxflat.config import param
from jaxflat.export import __main__ as export
from tests.support.measured_sweep import add_points
from tests.support.sweeps import tiny_config

CURVE = {"loss/pretrain": [(2, 0.5), (4, 0.25)], "loss/pretrain/anneal_2": [(4, 0.1)]}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parent") / "my sweep"
    path.mkdir()
    add_points(tiny_config(), param("seed", [0, 1]), path)
    (path / "report.html").write_text("the report")
    return path


def expected(workdir: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return (step, number) of each point and name, from results.csv and the curves."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    with (workdir / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = found.setdefault(row["point"], {name: list(CURVE[name]) for name in CURVE})
            for name, text in row.items():
                if text and name not in ("point", "seed", "step", "projected", "last"):
                    shown = f"projected/{name}" if row["projected"] == "1" else name
                    numbers.setdefault(shown, []).append((int(row["step"]), float(text)))
    return found


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of an offline run: a LevelDB log, after a header of 7 bytes."""
    content, offset, record = path.read_bytes(), 7, b""
    while offset < len(content):
        if (left := 32768 - offset % 32768) < 7:  # no header fits in the rest of the block
            offset += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, offset)
        record += content[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_shows_the_numbers_of_results_csv(workdir, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs pip install 'jaxflat[wandb]'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert export.main(["wandb", str(workdir)]) == 0
    shown, artifacts = {}, []
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        name, numbers = "", {}
        for content in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.HasField("run"):
                name = record.run.display_name
                assert (record.run.project, record.run.run_group) == ("jaxflat", "my sweep")
            elif record.HasField("artifact"):
                artifacts += [entry.path for entry in record.artifact.manifest.contents]
            elif record.HasField("history"):
                items = record.history.item
                line = {(i.key or i.nested_key[0]): float(i.value_json) for i in items}
                for key in line.keys() - {"step", "_step", "_runtime", "_timestamp"}:
                    numbers.setdefault(key, []).append((int(line["step"]), line[key]))
        shown[name] = numbers
    assert shown.pop("my sweep: report") == {}
    assert {"report.html", "results.csv"} <= set(artifacts)
    assert shown == expected(workdir)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_shows_the_numbers_of_results_csv(workdir, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs pip install 'jaxflat[mlflow]'")
    store = {"MLFLOW_TRACKING_URI": tmp_path.as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    with mock.patch.dict(os.environ, store):
        os.environ.pop("MLFLOW_EXPERIMENT_NAME", None)
        assert export.main(["mlflow", str(workdir)]) == 0
        runs = {run.info.run_name: run for run in mlflow.search_runs(output_format="list")}
        client = mlflow.MlflowClient()
        parent = runs.pop("my sweep").info.run_id
        files = {file.path for file in client.list_artifacts(parent)}
        assert {"report.html", "results.csv"} <= files
        wanted = expected(workdir)
        assert runs.keys() == wanted.keys()
        for seed, (point, numbers) in enumerate(wanted.items()):
            run = runs[point]
            assert run.data.tags["mlflow.parentRunId"] == parent
            assert run.data.params == {"seed": str(seed)}
            assert {
                name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            } == {name.replace("@", ":").replace("/", "."): numbers[name] for name in numbers}


@pytest.mark.parametrize("package", export.TRACKERS)
def test_without_the_package_the_error_names_the_extra(workdir, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert export.main([package, str(workdir)]) == 2
    assert capsys.readouterr().err == (
        f"error: the package {package} is missing: pip install 'jaxflat[{package}]'\n"
    )


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert export.main(["wandb", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: WORKDIR={tmp_path} has no results; ")
