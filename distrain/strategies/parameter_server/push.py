"""A push as the server receives it: one ``PUSH`` frame, then one ``BUCKET`` frame for each bucket of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distrain.strategies.parameter_server.protocol import Connection, Frame, FrameKind


@dataclass
class Push:
    """One worker's gradients of one step, as its part of the mean gradient of the batch.

    Attributes:
        step: The compressor's step.
        learning_rate: Learning rate of a whole batch's update.
        share: The worker's part of the batch, from 0 to 1.
        version: The server's version of the parameters from which the gradients were computed.
        samples: Number of samples in the worker's part.
        payloads: The compressed buckets, uint8 ``[bytes]`` each.
    """

    step: int
    learning_rate: float
    share: float
    version: int
    samples: int
    payloads: list[Tensor]


def receive_push(connection: Connection, frame: Frame, payload_sizes: Sequence[int]) -> Push:
    """Receives the rest of a push.

    Args:
        connection: The worker's connection.
        frame: The ``PUSH`` frame.
        payload_sizes: Expected size of each bucket's payload, in bytes.

    Raises:
        ProtocolError: A field, or the order or size of the buckets, is wrong.
        OSError: The connection is closed.
    """
    payloads = []
    for index, size in enumerate(payload_sizes):
        bucket_frame = connection.receive(FrameKind.BUCKET)
        if bucket_frame.integer("index") != index:
            raise bucket_frame.protocol_error(f"it is not bucket {index} of {len(payload_sizes)}")
        payloads.append(connection.read_body(bucket_frame, size))
    push = Push(
        frame.integer("step"),
        frame.number("learning_rate"),
        frame.number("share"),
        frame.integer("version"),
        frame.integer("samples"),
        payloads,
    )
    if push.samples and not 0 < push.share <= 1:
        raise frame.protocol_error(f"share is {push.share}, not a part of a batch")
    return push
