"""Programs in files of ``torch.export``, which can contain code: torch runs it when it reads such a file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from distrain.errors import ConfigError, first_line
from distrain.tools.exporting.program_files import DESCRIPTION, as_text, quiet_libraries
from distrain.tools.serving.model import Pixels
from distrain.tools.serving.program_model import FROM, Program, read


def load(path: Path) -> Program:
    """Reads a file that its user trusts; it runs on the CPU.

    Raises:
        ConfigError: torch can't read it, or it is no file of distrain.
    """
    content, texts = io.BytesIO(read(path)), {DESCRIPTION: ""}
    try:
        with quiet_libraries():
            exported = torch.export.load(content, extra_files=texts)
            module = exported.module()
        description = json.loads(texts[DESCRIPTION])
        outputs = {name: output["shape"][1:] for name, output in description["outputs"].items()}
    except Exception as error:  # whatever a damaged file makes torch raise
        problem = f"torch can't read it, or it does not describe itself ({type(error).__name__}: {first_line(error)})"
        raise ConfigError("run", path, f"{problem}; {FROM}") from error

    @torch.inference_mode()
    def run(images: Pixels) -> Mapping[str, npt.NDArray[Any]]:
        return {name: result.numpy() for name, result in module(torch.from_numpy(images)).items()}

    return Program(as_text(description), _inputs(exported), outputs, run)


def _inputs(exported: torch.export.ExportedProgram) -> list[tuple[str, str, list[Any]]]:
    names = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.name in names}
    return [
        (name, str(value.dtype).removeprefix("torch."), [int(size) for size in value.shape[1:]])
        for name, value in values.items()
    ]
