"""Runs the tutorial, which is a notebook, and turns it into a page."""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat

#: Seconds that a cell may take.
_LIMIT = 300
#: Colours and cursor movements of a terminal.
_ESCAPES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
#: A progress bar.
_BAR = re.compile(r"\d%\|")
#: Runs before the first cell. In Jupyter a cell succeeds whatever the exit code of its command; here it fails.
_STRICT = """
def strict(command, shell=get_ipython(), system=get_ipython().system):
    system(command)
    if shell.user_ns["_exit_code"]:
        raise RuntimeError(f"exit code {shell.user_ns['_exit_code']}: {command}")
get_ipython().system = strict
"""


def run(file: Path, folder: Path, programs: Path) -> Any:
    """Executes all cells, as Jupyter does.

    Args:
        file: The notebook.
        folder: The working directory of its cells.
        programs: The folder of ``distrain`` and ``python``, for cells that are commands.

    Returns:
        The notebook with the outputs of its cells.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an exception, or a command's exit code was not 0.
    """
    notebook: Any = nbformat.read(file, as_version=4)  # type: ignore[no-untyped-call]
    notebook.cells.insert(0, nbformat.v4.new_code_cell(_STRICT))  # type: ignore[no-untyped-call]
    # Images this small are trained faster by one thread, above all on a busy machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    client = nbclient.NotebookClient(notebook, timeout=_LIMIT, resources={"metadata": {"path": str(folder)}})
    with tempfile.TemporaryDirectory() as sockets:
        # The kernel is reached through files, instead of ports that anybody on this machine could connect to.
        manager = client.create_kernel_manager()
        manager.transport, manager.ip = "ipc", f"{sockets}/kernel"
        client.execute(env=environment)
    del notebook.cells[0]
    return notebook


def to_markdown(notebook: Any, folder: Path, pictures: Path) -> str:
    """The page of an executed notebook.

    Args:
        notebook: What :func:`run` returns.
        folder: The working directory of its cells; it is left out of what they printed.
        pictures: The folder of the page, into which the outputs that are pictures are written.
    """
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            parts.append(f"```{_language(cell.source)}\n{cell.source}\n```")
            parts.extend(output.replace(f"{folder}/", "") for output in _outputs(cell, pictures))
    return "\n\n".join(parts) + "\n"


def _language(source: str) -> str:
    return "bash" if source.startswith("!") else "python"


def _outputs(cell: Any, pictures: Path) -> Iterator[str]:
    printed = ""
    for number, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{cell.id}-{number}.png"
            (pictures / name).write_bytes(base64.b64decode(data["image/png"]))
            yield f"![Output of the cell above]({name})"
        else:
            printed += output.get("text", "") or data.get("text/plain", "")
    if printed:
        yield f"```text\n{_screen(printed)}\n```"


def _screen(printed: str) -> str:
    """What a terminal shows at the end: a carriage return starts its line anew, and a progress bar is gone."""
    lines = []
    for line in _ESCAPES.sub("", printed).replace("\r\n", "\n").split("\n"):
        shown = [part for part in line.split("\r") if part.strip() and not _BAR.search(part)]
        if shown or not line:
            lines.append(shown[-1] if shown else "")
    return "\n".join(lines).strip()
