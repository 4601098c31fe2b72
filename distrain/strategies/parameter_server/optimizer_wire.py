"""How an optimizer's state travels between a worker and a server: in one ``STATE`` frame.

The frame's JSON holds the name, dtype and shape of each tensor and the optimizer's scalars; its body holds the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distrain.communication.types import DTYPES
from distrain.compression.encoding.packing import pack, packed_size, unpack
from distrain.strategies.parameter_server.protocol import Connection, FrameKind

#: Maximum number of values that an optimizer may keep for each value of a parameter.
_MAX_STATE_PER_VALUE = 8


def encode_optimizer_state(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Encodes an optimizer's state as the contents of a ``STATE`` frame.

    Args:
        tensors: Tensors by ``<parameter name>/<state name>``.
        scalars: Other values, by the same kind of name.

    Returns:
        The frame's JSON and its body, a copy of the tensors: uint8 ``[bytes]``, on the CPU.
    """
    specs = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]
    parts = [tensor.detach().cpu().contiguous().flatten() for tensor in tensors.values()]
    body = pack(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return {"tensors": specs, "scalars": scalars}, body


def receive_optimizer_state(
    connection: Connection, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Receives an optimizer's state.

    Args:
        connection: The next frame on it has to be a ``STATE`` frame.
        parameters: The optimizer's parameters by name. Each tensor of the state has to be a scalar or to have the shape
            of its parameter.

    Returns:
        Tensors by ``<parameter name>/<state name>``, on the CPU; and scalars by the same kind of name.

    Raises:
        ProtocolError: The state belongs to other parameters, has other shapes or sizes, or is far too large.
        OSError: The connection is closed.
    """
    frame = connection.receive(FrameKind.STATE)
    specs, scalars = frame.meta.get("tensors"), frame.meta.get("scalars")
    if not isinstance(specs, list) or not isinstance(scalars, dict):
        raise frame.protocol_error("it doesn't list tensors and scalars")
    layout, shapes = [], {}
    for spec in specs:
        is_valid = isinstance(spec, list) and len(spec) == 3 and all(isinstance(part, str) for part in spec[:2])
        if not is_valid or spec[1] not in DTYPES:
            raise frame.protocol_error(f"{spec!r} is not a name, dtype and shape")
        name, dtype, shape = spec[0], DTYPES[spec[1]], spec[2]
        parameter = parameters.get(name.rpartition("/")[0])
        if parameter is None or shape not in ([], list(parameter.shape)):
            raise frame.protocol_error(f"{name} {shape} belongs to none of the parameters here")
        shapes[name] = shape
        layout.append((dtype, torch.Size(shape).numel()))
    size = packed_size(layout)
    if size > _MAX_STATE_PER_VALUE * sum(8 * (parameter.numel() + 1) for parameter in parameters.values()):
        raise frame.protocol_error(f"{size} bytes are far more than an optimizer keeps")
    parts = unpack(connection.read_body(frame, size), layout) if layout else []
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}, scalars
