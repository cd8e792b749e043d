"""The notebook runs from its first cell to its last, and shows a picture wherever it says so."""

import sys

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs/notebooks/look_inside_pretraining.ipynb"
PICTURES = (
    7  # masks, reconstructions, orders, attention of one and of two models, parts, frequencies
)


def test_the_notebook_is_saved_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert 'REPOSITORY = ""' in code[0].source and "pip" in code[0].source


def test_the_first_cell_finds_the_repository_or_says_what_to_do(tmp_path, monkeypatch):
    """In the notebook's folder, or in a folder beside it as one uploads it to Colab."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    monkeypatch.setenv("UNIMIM_NOTEBOOK_OUT", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict = {}
    exec(cell, names)
    assert names["root"] == ROOT and sys.path[0] == str(ROOT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"upload its folder, or write the address .* REPOSITORY"):
        exec(cell, {})
    (tmp_path / "UniMIM").symlink_to(ROOT)
    exec(cell, names)
    assert names["root"].resolve() == ROOT


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIMIM_NOTEBOOK_OUT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("EPOCHS = 8", "EPOCHS = 1")
        cell.source = cell.source.replace("os.cpu_count()", "1")
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(shown) == PICTURES
    assert (tmp_path / "mae/checkpoint-0.pth").is_file()
    assert (tmp_path / "fourier/fourier.csv").is_file()
