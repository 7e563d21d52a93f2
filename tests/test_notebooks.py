"""The notebooks run from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

SMALLER = {
    "sampler.steps=10 eval_sampler.steps=10": "sampler.steps=4 eval_sampler.steps=4",
    "evaluation.images=4": "evaluation.images=2",
    "evaluation.final_images=2": "evaluation.final_images=1",
    '"diversity_images=10"': '"diversity_images=3", "eval_sampler.steps=4"',
    '"images=4"': '"images=2"',
}
"""What the published outputs were made with, and what will do to see that every cell runs."""

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """Every cell, in a fresh kernel and at smaller sizes; what the commands say is in the outputs, and none
    of them failed."""
    book = nbformat.read(path, as_version=4)
    published = printed(book)
    for cell in book.cells:
        for size, smaller in SMALLER.items():
            cell.source = cell.source.replace(size, smaller)
    NotebookClient(
        book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = printed(book)
    assert "Traceback" not in said
    for line in ("pictures: ", "written: ", "did you mean "):
        assert said.count(line) == published.count(line), (
            f"{line!r}: run the notebook again and commit its outputs"
        )
    if path.stem == "tour":
        assert (
            "pictures: " in said
            and "written: " in said
            and "did you mean kl_coeff" in said
            and "DRaFT+" in said
        )


def printed(book: nbformat.NotebookNode) -> str:
    """What the code cells wrote."""
    return "".join(
        output.get("text", "") for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
    )
