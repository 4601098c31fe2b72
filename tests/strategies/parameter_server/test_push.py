"""A push with an invalid field, bucket size or bucket index is refused."""

from __future__ import annotations

import json

import pytest

from distrain.errors import PeerLost
from distrain.strategies.parameter_server import protocol
from distrain.strategies.parameter_server.protocol import FrameKind, ProtocolError
from tests.strategies.parameter_server.helpers import PUSH_HEADER, running_server, server_policy


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with running_server(1, server_policy()) as run:
        with pytest.raises(PeerLost):
            run.push(0, 0.25, share=share)
        run.join()
    (error,) = run.errors
    assert "not a part of a batch" in str(error)


@pytest.mark.parametrize(
    ("index", "size", "problem"),
    [
        (0, 31, "31 bytes, 32 were expected"),
        (0, 1 << 40, f"{1 << 40} bytes, 32 were expected"),
        (1, 32, "it is not bucket 0 of 1"),
    ],
)
def test_a_bucket_of_wrong_size_or_index_is_refused(index: int, size: int, problem: str) -> None:
    with running_server(1, server_policy()) as run:
        client = run.clients[0]
        client._send(FrameKind.PUSH, PUSH_HEADER, None)
        client._thread.submit(lambda: None).result(10)
        meta = json.dumps({"index": index}).encode()
        head = protocol._HEADER.pack(b"dst1", FrameKind.BUCKET, len(meta), size)
        client._connections["parameters"].socket.sendall(head + meta)
        run.join()
    (error,) = run.errors
    assert isinstance(error, ProtocolError)
    assert problem in str(error)
