"""What tests of compression=powersgd share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.compression.bucket import Bucket
from distrain.compression.powersgd import PowerSGD, PowerSGDConfig
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch

ALONE = Communicator()


def configured(**changes: Any) -> PowerSGDConfig:
    keys: dict[str, Any] = {
        "name": "powersgd",
        "min_elements": 1,
        "error_feedback": True,
        "rank": 2,
        "warm_start": True,
        "min_compression_rate": 0,
        "start_step": 0,
        "alternate": False,
    }
    return PowerSGDConfig(**keys | changes)


def make_compressor(seed: int = 0, **changes: Any) -> PowerSGD:
    return PowerSGD(configured(**changes), seed)


def one(matrix: Tensor, name: str = "weight") -> Bucket:
    """A bucket of one matrix, copied."""
    flat = matrix.clone().flatten()
    return Bucket(flat, {name: flat.view(matrix.shape)})


def step(compressor: PowerSGD, *buckets: Bucket, communicator: Communicator = ALONE) -> None:
    """One step's exchange of all buckets."""
    exchanges = BucketExchanger(compressor, communicator, Stopwatch(torch.device("cpu")))
    compressor.begin_step()
    for bucket in buckets:
        exchanges.start(bucket)
    exchanges.finish()


def sent(compressor: PowerSGD, matrix: Tensor) -> Tensor:
    """The approximation of a matrix that a step sends."""
    bucket = one(matrix)
    step(compressor, bucket)
    return bucket.tensors["weight"]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
