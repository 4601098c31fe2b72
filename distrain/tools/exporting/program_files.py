"""Programs as files of ``torch.export`` and ONNX: written, and run again as their users will."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain.errors import ConfigError, first_line
from distrain.tools.exporting.program import INPUT, Program

#: Runs an exported program: from a batch of images to the results by name.
Runner = Callable[[Tensor], dict[str, Tensor]]
#: Name of the file with the description inside of a ``.pt2`` archive.
DESCRIPTION = "distrain.json"
#: Name of the dimension that may have any size, in an ONNX file.
_BATCH = "batch"
#: Largest weights, in bytes, that torch.onnx writes into one file.
_LARGEST_ONNX = 1536 << 20
#: Images that a program is traced with; torch would take a batch of one for a constant.
_TRACED_IMAGES = 3


def trace(program: Program, name: str) -> torch.export.ExportedProgram:
    """Records the operations of a program, for batches of any size.

    Args:
        program: Must compute the same operations for all images.
        name: The format, for messages.

    Raises:
        ConfigError: torch can't record it.
    """
    batch = torch.export.Dim(_BATCH, min=1)
    try:
        with quiet_libraries(), torch.no_grad():
            exported = torch.export.export(
                program, (program.example(_TRACED_IMAGES),), dynamic_shapes={INPUT: {0: batch}}, strict=False
            )
    except Exception as error:  # whatever the model's code or torch's tracing raises
        problem = f"torch.export can't record this model ({type(error).__name__}: {first_line(error)})"
        raise ConfigError("format", name, problem, ["safetensors"]) from error
    for node in exported.graph.nodes:
        # Names of files on this machine.
        node.meta.pop("stack_trace", None)
    return exported


def write_torch_export(program: Program, description: Mapping[str, Any], path: Path) -> Runner:
    """Writes a file for ``torch.export.load``, and returns what runs it.

    Raises:
        ConfigError: torch can't record the program.
    """
    exported = trace(program, "torch_export")
    # torch wants this ending, and names a folder in the archive after the file.
    archive = path.with_name("model.pt2")
    with quiet_libraries():
        torch.export.save(exported, archive, extra_files={DESCRIPTION: json.dumps(description)})
        module = torch.export.load(archive).module()
    archive.replace(path)

    def run(images: Tensor) -> dict[str, Tensor]:
        results: dict[str, Tensor] = module(images)
        return results

    return run


def write_onnx(program: Program, description: Mapping[str, Any], opset: int, path: Path) -> Runner:
    """Writes an ONNX file, with the description in its ``metadata_props``, and returns what runs it.

    Args:
        program: What it shall compute.
        description: Becomes text by JSON, value by value; text stays as it is.
        opset: Version of ONNX's operators.
        path: The file.

    Raises:
        ConfigError: A library is missing, the program can't be recorded or translated, or is too large for one file.
    """
    runtime = onnx_runtime()
    size = sum(tensor.nbytes for tensor in program.state_dict().values())
    if size > _LARGEST_ONNX:
        raise ConfigError(
            "format", "onnx", f"one file holds 1.5 GiB, and the model has {size / 2**30:.1f}", ["torch_export"]
        )
    exported = trace(program, "onnx")
    outputs = list(description["outputs"])
    try:
        with quiet_libraries():
            translated: Any = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=outputs,
                verbose=False,
            )
    except Exception as error:  # of torch, onnxscript or onnx
        problem = f"torch.onnx can't translate this model ({type(error).__name__}: {first_line(error)})"
        raise ConfigError("format", "onnx", problem, ["torch_export", "safetensors"]) from error
    written = translated.model.opset_imports[""]
    if written != opset:
        # The translator says so in its log alone.
        raise ConfigError(
            "opset", opset, f"these releases of torch and onnx can't write it for this model; {written} works"
        )
    _tidy(translated.model)
    translated.model.metadata_props.update(as_text(description))
    with quiet_libraries():
        translated.save(path)
    return onnx_runner(path, runtime)


def onnx_runner(path: Path, runtime: Any) -> Runner:
    """What runs an ONNX file by ONNX Runtime, on the CPU and with as many threads as torch would use.

    Args:
        path: The file.
        runtime: The module ``onnxruntime``.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        results = session.run(outputs, {INPUT: images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(outputs, results, strict=True)}

    return run


def as_text(description: Mapping[str, Any]) -> dict[str, str]:
    """A description for formats that hold text by name: everything but text as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in description.items()}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without what the libraries say to their developers while they record, translate and quantise."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    # ONNX Runtime's quantization uses the root logger, which gets a handler at its first message if it has none. This
    # filter is for what is logged there itself, and not for what comes from other loggers.
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    root.addFilter(_drop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(_drop)
        root.removeHandler(silent)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _drop(_: logging.LogRecord) -> bool:
    return False


def onnx_runtime() -> Any:
    """The module ``onnxruntime``.

    Raises:
        ConfigError: It, or another library that ``format=onnx`` needs, is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it and says so in many lines
    except ImportError as error:
        problem = f"needs onnx, onnxscript and onnxruntime ({error}); run pip install 'distrain[onnx]'"
        raise ConfigError("format", "onnx", problem) from error
    return onnxruntime


def _tidy(model: Any) -> None:
    """Names the batch's dimension, and removes the stacks that the translator leaves at each operation."""
    batch = model.graph.inputs[0].shape[0]
    for node in model.graph:
        node.metadata_props.clear()
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for place, size in enumerate(value.shape or ()):
            if size == batch:
                value.shape[place] = _BATCH
