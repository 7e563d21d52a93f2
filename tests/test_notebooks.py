"""The notebooks run from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """Every cell, in a fresh kernel; what the commands say is in the outputs, and none of them failed."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in book.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "Traceback" not in said
    if path.stem == "tour":
        assert (
            said.count("pictures: ") == 4
            and said.count("written: ") == 5
            and "did you mean kl_coeff" in said
            and "DRaFT+" in said
        )
