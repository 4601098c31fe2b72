"""A compressor's own work is timed without communication, and its bytes are counted."""

from __future__ import annotations

import torch

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.compression.autotune.compressor_cost import (
    CompressorCost,
    LoopbackCommunicator,
    measure_cost,
    uncompressed_cost,
)
from distrain.compression.bucket import Bucket
from distrain.config.groups import CompressionConfig
from tests.compression.autotune.sleeping import SlowCompressor


def test_each_section_of_work_is_timed_and_sent_bytes_are_counted() -> None:
    like = Communicator()
    like.size, like.rank = 4, 3
    flat = torch.arange(6.0)
    measured = measure_cost(
        SlowCompressor(CompressionConfig(name="slow")), [Bucket(flat, {"a": flat[:2], "b": flat[2:]})] * 2, like
    )
    assert len(measured.buckets) == 2
    for bucket in measured.buckets:
        assert all(0.8 * b <= a < b + 0.05 for a, b in zip(bucket.work, SlowCompressor.sleeps, strict=True))
        assert bucket.collectives == [[("all_reduce", ring_all_reduce_bytes(24, 4))]] * 2
    assert measured.sent == 4 * ring_all_reduce_bytes(24, 4)
    assert 0.03 < measured.seconds < 0.3
    assert flat.tolist() == [0, 1, 2, 3, 4, 5]
    assert like.ledger.total() == 0
    assert CompressorCost.from_plain(measured.to_plain()) == measured


def test_a_loopback_answers_as_if_all_ranks_sent_the_same() -> None:
    like = Communicator()
    like.size, like.rank = 3, 1
    loopback = LoopbackCommunicator(like)
    gathered = loopback.all_gather(torch.tensor([7, 8], dtype=torch.uint8))
    assert [received.tolist() for received in gathered] == [[7, 8]] * 3
    assert loopback.all_reduce(torch.tensor([1.0])).tolist() == [1.0]
    assert loopback.started == [("all_gather", 4), ("all_reduce", ring_all_reduce_bytes(4, 3))]
    assert (loopback.rank, loopback.size) == (1, 3)


def test_without_compression_each_bucket_costs_one_all_reduce() -> None:
    cost = uncompressed_cost([1000, 400], ranks=4)
    assert [bucket.collectives for bucket in cost.buckets] == [
        [[("all_reduce", ring_all_reduce_bytes(size, 4))]] for size in (1000, 400)
    ]
    assert cost.sent == ring_all_reduce_bytes(1000, 4) + ring_all_reduce_bytes(400, 4)
    assert cost.seconds == 0
