"""The tutorial runs, as in Jupyter, and says what its text says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tests.runs import LAUNCH
from website import notebook

DOCS = LAUNCH.parent / "docs"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``distrain``, as an installation puts it beside ``python``."""
    monkeypatch.setenv("PYTHONPATH", str(LAUNCH.parent))
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "distrain").write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore -m distrain "$@"\n')
    (folder / "distrain").chmod(0o755)
    return folder


def outputs(executed: Any) -> str:
    """Everything that the cells printed."""
    return "".join(
        output.get("text", "") for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs
    )


@pytest.mark.docs
def test_the_tutorial_runs_and_its_three_trainings_give_one_model(tmp_path: Path, programs: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    executed = notebook.run(DOCS / "tutorial.ipynb", folder, programs)
    said = outputs(executed)
    differences = [float(line.rpartition(":")[2]) for line in said.splitlines() if "largest difference" in line]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    page = notebook.to_markdown(executed, folder, folder)
    assert "test_accuracy 0.9" in page
    assert "strategy.name: ddp → single" in page
    assert "![Output of the cell above](" in page
    assert "\x1b" not in page
    assert str(folder) not in page


def test_a_command_that_fails_fails_the_notebook(tmp_path: Path, programs: Path) -> None:
    file = tmp_path / "wrong.ipynb"
    cell = nbformat.v4.new_code_cell("!distrain nonsense")  # type: ignore[no-untyped-call]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)  # type: ignore[no-untyped-call]
    with pytest.raises(CellExecutionError, match="exit code 2"):
        notebook.run(file, tmp_path, programs)
