"""Programs in ONNX files, run by ONNX Runtime. Such a file holds numbers and known operators, and no code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from distrain.errors import ConfigError, first_line
from distrain.tools.exporting.program import INPUT
from distrain.tools.serving.model import Pixels
from distrain.tools.serving.program_model import FROM, Program, read


def load(path: Path, threads: int) -> Program:
    """Reads an ONNX file.

    Args:
        path: The file.
        threads: CPU threads of the runtime.

    Raises:
        ConfigError: ONNX Runtime is missing, or can't read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        problem = "needs ONNX Runtime; run pip install 'distrain[serve,onnx]'"
        raise ConfigError("run", path, problem) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for work by computing would take the cores from those that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = read(path)
    try:
        # From memory, so that a file which names others for its weights can't have them read.
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has types of its own for each of its errors
        raise ConfigError("run", path, f"ONNX Runtime can't read it ({first_line(error)}); {FROM}") from error
    names = [output.name for output in session.get_outputs()]

    def run(images: Pixels) -> Mapping[str, npt.NDArray[Any]]:
        return dict(zip(names, session.run(names, {INPUT: images}), strict=True))

    return Program(
        session.get_modelmeta().custom_metadata_map,
        [
            (entry.name, entry.type.removeprefix("tensor(").removesuffix(")"), entry.shape[1:])
            for entry in session.get_inputs()
        ],
        {output.name: output.shape[1:] for output in session.get_outputs()},
        run,
    )
