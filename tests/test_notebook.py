"""docs/digits.ipynb: all its cells run, shortened, in a folder like a clone."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "digits.ipynb"
# one epoch of a tiny model
SHORTER = {
    "EPOCHS = 9": "EPOCHS = 1",
    "--epochs {EPOCHS}": (
        "--epochs {EPOCHS} --warmup-epochs 0 --batch-size 256 --device cpu --num_workers 0 "
        "--model-kwargs depth=1 embed_dim=32 num_heads=2"
    ),
    "--visualize head_tokens --n_visualization 4": "--visualize head_tokens --n_visualization 1 --device cpu",
    "predict.py output/images": "predict.py output/images --device cpu --num_workers 0",
}


def test_the_notebook_is_small_and_holds_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 15 and NOTEBOOK.stat().st_size < 10_000
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    # links are of docs/
    assert "](../README.md)" in notebook.cells[0].source


def in_kernel(source: str) -> str:
    """Return a cell whose Python commands run in the kernel: importing torch again takes longer than most of them."""

    def call(match: re.Match) -> str:
        return f"import {match[1]}\nassert {match[1]}.main(f{match[2]!r}.split()) == 0"

    return re.sub(r"^!python (\w+)\.py (.*)$", call, source.removeprefix("%%script python\n"), flags=re.MULTILINE)


def check_status(source: str) -> str:
    """Return a cell that fails with its commands, which alone would not end it."""
    return re.sub(r"^!.*$", r"\g<0>\nassert _exit_code == 0", source, flags=re.MULTILINE)


@pytest.mark.parametrize("change", [in_kernel, pytest.param(str, marks=pytest.mark.slow)])
def test_all_cells_run(change, tmp_path, monkeypatch):
    # a folder like a clone
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("docs", "output", "exported"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(word in "".join(cell.source for cell in notebook.cells) for word in SHORTER)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        for word, other in SHORTER.items():
            cell.source = cell.source.replace(word, other)
        cell.source = check_status(change(cell.source))
    place = {"metadata": {"path": tmp_path / "docs"}}
    NotebookClient(notebook, timeout=120, startup_timeout=60, resources=place).execute()

    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert sum(".png  " in line and line.count("%") == 3 for line in texts[-3].splitlines()) == 12
    assert "['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']" in texts[-1]
    assert (tmp_path / "exported" / "README.md").exists()
