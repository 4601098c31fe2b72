"""Slow samples: distrain's loader against torch's DataLoader, both with four worker processes, on one rank.

Each sample of the data set waits 5 ms, as for a disk or a decoder. Run it on an idle machine::

    python benchmarks/loading.py

It prints the samples per second of both in turn, and the ratio of the medians, which should be at least 0.9.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distrain.data.base import DataSpec
from distrain.data.custom import DatasetReader
from distrain.data.items import Items
from distrain.data.loader import Loader
from distrain.data.workers import ItemWorkers

#: What each sample waits, in seconds.
SLEEP = 0.005
SHAPE = (3, 32, 32)


class Slow(Dataset[Any]):
    """Samples that take long to read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        time.sleep(SLEEP)
        return torch.full(SHAPE, row % 256, dtype=torch.uint8), torch.tensor(row % 10)


def rate(batches: Iterable[Any], count: int) -> float:
    """Samples per second of one epoch."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return count / (time.perf_counter() - start)


def measure(count: int, batch_size: int, workers: int, rounds: int) -> tuple[list[float], list[float]]:
    """Samples per second of distrain's loader and of torch's, in rounds; a first epoch of each starts the workers."""
    dataset, classes = Slow(count), tuple("0123456789")
    # As data=custom data._target_=loading.Slow reads it.
    reader = DatasetReader("loading.Slow", {"count": count}, "train", target="class", classes=classes)
    items = Items.of(reader, DataSpec(*SHAPE, classes), ItemWorkers(workers))
    ours = Loader(
        items,
        batch_size=batch_size,
        shard=(0, 1),
        mean=[0.5] * 3,
        std=[0.25] * 3,
        device=torch.device("cpu"),
        dtype=torch.float32,
        memory_format=torch.contiguous_format,
        shuffle=True,
    )
    theirs = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=True)
    own, other = [], []
    for epoch in range(rounds + 1):
        own.append(rate(ours.epoch(epoch), count))
        other.append(rate(theirs, count))
    items.close()
    return own[1:], other[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*worker processes in total.*")
    own, other = measure(given.samples, given.batch_size, given.workers, given.rounds)
    for name, rates in (("distrain", own), ("DataLoader", other)):
        print(f"{name:10}  median {statistics.median(rates):7.1f} samples/s  ({min(rates):.1f} to {max(rates):.1f})")
    print(f"ratio {statistics.median(own) / statistics.median(other):.3f}")


if __name__ == "__main__":
    main()
