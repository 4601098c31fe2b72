"""A batch for passes of a model that are tried before a run starts."""

from __future__ import annotations

import torch

from distrain.data.base import Splits
from distrain.data.batch import Batch
from distrain.data.loader import Loader


def trial_batch(
    splits: Splits, count: int, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Batch:
    """The first training samples, not augmented.

    Args:
        splits: The data.
        count: Samples of the batch; fewer if there are fewer.
        device: Where the batch is.
        dtype: Type of its inputs.
        layout: Memory layout of its inputs.
    """
    images = splits.train.read(torch.arange(min(count, len(splits.train))))
    loader = Loader(
        images,
        batch_size=len(images),
        shard=(0, 1),
        mean=splits.mean,
        std=splits.std,
        device=device,
        dtype=dtype,
        memory_format=layout,
        spec=splits.spec,
    )
    return next(loader.epoch(0))
