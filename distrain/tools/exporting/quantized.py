"""ONNX files whose convolutions and linear layers compute with 8-bit whole numbers, by ONNX Runtime's quantization.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (arXiv
1712.05877). Weights have a scale for each output channel. Convolutions are quantised statically: the range of what they
take and give is measured on calibration images. Linear layers are quantised dynamically: the range of their inputs is
found anew in each call, since in a transformer it differs much between images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distrain.errors import ConfigError, first_line
from distrain.tools.exporting.program import INPUT
from distrain.tools.exporting.program_files import quiet_libraries

#: Operations whose results stay 8-bit numbers between quantised convolutions.
_BETWEEN = frozenset({"Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_LINEAR = frozenset({"Gemm", "MatMul"})
#: Of weights, in bits. On x86 without VNNI, products of 8-bit numbers overflow: a file that is accurate where it was
#: made would not be so there. 7 bits are safe on every CPU, and cost next to nothing with a scale for each channel.
_REDUCED_RANGE = True


def write_int8(source: Path, calibration: Iterable[Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Writes the quantised version of an ONNX file.

    Args:
        source: The file in float32.
        calibration: Batches of images as the file takes them.
        metadata: For ``metadata_props``.
        path: The new file.

    Raises:
        ConfigError: The program has no convolution and no linear layer, or ONNX Runtime can't quantise it.
        OSError: A file can't be written.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kinds = {node.op_type for node in onnx.load(source).graph.node}
    if not kinds & (_CONVOLUTIONS | _LINEAR):
        raise ConfigError("quantize", "int8", "the model has no convolution and no linear layer", ["null"])
    common = {
        "per_channel": True,
        "reduce_range": _REDUCED_RANGE,
        "weight_type": quantization.QuantType.QInt8,
    }
    try:
        with quiet_libraries(), tempfile.TemporaryDirectory(prefix=".distrain-", dir=path.parent) as folder:
            current = Path(folder, "prepared.onnx")
            # Merges normalisations into convolutions, and infers shapes.
            quant_pre_process(source, current, skip_symbolic_shape=True)
            if kinds & _CONVOLUTIONS:
                static = Path(folder, "static.onnx")
                quantization.quantize_static(
                    current,
                    static,
                    _Reader(calibration),
                    quant_format=quantization.QuantFormat.QDQ,
                    activation_type=quantization.QuantType.QUInt8,
                    nodes_to_quantize=_static_nodes(onnx.load(current).graph),
                    **common,
                )
                current = static
            if kinds & _LINEAR:
                dynamic = Path(folder, "dynamic.onnx")
                quantization.quantize_dynamic(current, dynamic, op_types_to_quantize=[*_LINEAR], **common)
                current = dynamic
            model = onnx.load(current)
            del model.metadata_props[:]
            onnx.helper.set_model_props(model, dict(metadata))
            onnx.save(model, path)
    except (ConfigError, OSError):  # of the calibration images, or of the disk
        raise
    except Exception as error:  # of onnx or onnxruntime
        problem = f"ONNX Runtime can't quantise this model ({type(error).__name__}: {first_line(error)})"
        raise ConfigError("quantize", "int8", problem, ["null"]) from error


def _static_nodes(graph: Any) -> list[str]:
    """Names of the convolutions, and of what lies between them alone.

    An addition after a linear layer, as in a transformer, is none of these: its numbers have too large a range.
    """
    constants = {tensor.name for tensor in graph.initializer}
    names: list[str] = []
    quantised: set[str] = set()
    for node in graph.node:
        inputs = [name for name in node.input if name and name not in constants]
        if node.op_type in _CONVOLUTIONS or (node.op_type in _BETWEEN and inputs and quantised.issuperset(inputs)):
            names.append(node.name)
            quantised.update(node.output)
    return names


class _Reader:
    """Hands calibration images to ONNX Runtime, batch by batch."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; ``None`` after the last one."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}
