"""compression=none: gradients are summed uncompressed, and there is no state."""

from __future__ import annotations

import torch

from distrain.communication.collectives import Communicator
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.groups import CompressionConfig


def make_compressor() -> NoCompression:
    return NoCompression(CompressionConfig(name="none"))


def test_one_rank_keeps_its_gradients() -> None:
    flat, alone = torch.tensor([1.0, 2.0, 3.0]), Communicator()
    for pending in make_compressor().aggregate(Bucket(flat, {"weight": flat[:2], "bias": flat[2:]}), alone):
        pending.wait()
    assert flat.tolist() == [1.0, 2.0, 3.0]
    assert alone.ledger.total() == 0


def test_state_is_empty() -> None:
    compressor = make_compressor()
    compressor.begin_step()
    assert compressor.state_dict() == {}
    assert compressor.residual_norm() is None
