"""docs/tour.ipynb runs from top to bottom, and stores outputs of the kinds that its cells make."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "docs" / "tour.ipynb"
SET_BY_CONFTEST = ("XLA_FLAGS", "MPLBACKEND", "JAX_COMPILATION_CACHE_DIR")


@pytest.fixture
def stored():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """Return the kind of each output of a cell, such as stdout or image/png."""
    return [sorted(output.get("data", [output.get("name")])) for output in cell.outputs]


def test_the_stored_notebook_is_small_and_names_no_folder(stored):
    text = PATH.read_text()
    assert len(text) < 300_000
    assert not re.findall(r'(?<![\w<])/(?:tmp|home|root|Users|usr|opt|var)/[^"]*', text)
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    counts = [cell.execution_count for cell in code_cells(stored)]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.slow
def test_the_notebook_runs_and_warns_of_nothing(stored, tmp_path, monkeypatch):
    for name in SET_BY_CONFTEST:  # a reader has none of these
        monkeypatch.delenv(name)
    notebook = nbformat.read(PATH, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,  # seconds of one cell
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
        coalesce_streams=True,
    )
    client.execute()
    for cell, before in zip(code_cells(notebook), code_cells(stored), strict=True):
        assert kinds(cell) == kinds(before), cell.source
    assert "stderr" not in str([kinds(cell) for cell in code_cells(notebook)])
