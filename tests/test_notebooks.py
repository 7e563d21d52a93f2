"""The notebooks run from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SMALLER = {
    "steps=6 samples_per_step=8 eval_every=3": "steps=2 samples_per_step=4 eval_every=1",
    "steps=4 samples_per_step=8 eval_every=2": "steps=2 samples_per_step=4 eval_every=1",
    "for step in (0, 6)": "for step in (0, 2)",
    "sampler.steps=10 eval_sampler.steps=10": "sampler.steps=3 eval_sampler.steps=3",
    "evaluation.prompts=4": "evaluation.prompts=2",
    "evaluation.images=4": "evaluation.images=2",
    "evaluation.final_images=2": "evaluation.final_images=1",
    "prompts.prompts=[lion,frog,fox,duck]": "prompts.prompts=[lion,frog]",
    "prompts.unseen=[panda,koala]": "prompts.unseen=[panda]",
    '"diversity_images=10"': '"diversity_images=2", "eval_sampler.steps=3"',
    '"images=4"': '"images=2"',
}
"""What the published outputs were made with, and what will do to see that every cell runs."""

WARM = f"""import subprocess, sys
sys.path.append({str(ROOT)!r})
from tests import warm
subprocess.run = warm.run"""
"""The commands of the cells start from a process that has the libraries."""

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """Every cell, in a fresh kernel and at smaller sizes; what the commands say is in the outputs, and none
    of them failed."""
    book = nbformat.read(path, as_version=4)
    published = printed(book)
    book.cells.insert(0, nbformat.v4.new_code_cell(WARM))
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
