"""`examples/first_card.ipynb` runs from its first cell to its last, and is kept with what it shows."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "first_card.ipynb"


def test_it_is_kept_with_its_output() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    assert all(cell["outputs"] for cell in cells[2:])
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


def test_it_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model, as a program would run it: every cell in a kernel of its own process."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("LAYERCARD_EXAMPLE_MODEL", str(tiny_folder))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    done = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "layers in backward" in done.cells[-2].outputs[-1]["text"]
    assert (tmp_path / "first-card-adapter" / "adapter_model.safetensors").exists()
