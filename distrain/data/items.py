"""A split whose samples are read one at a time, by worker processes where that takes long."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from typing_extensions import override

from distrain import rng
from distrain.config.groups import DataConfig
from distrain.config.setting import setting
from distrain.data.base import DataSpec, Images, Split
from distrain.data.batch import Targets, pick_targets
from distrain.data.reading import CheckedReader, ItemReader, Request, Samples
from distrain.data.sampler import Blocks
from distrain.data.workers import ItemWorkers

log = logging.getLogger(__name__)
#: Identifies random draws inside of readers among the uses of random numbers.
_ITEM = 6
#: Samples that a worker process reads at once where nothing else says how many.
_CHUNK = 64


@dataclass
class ItemsConfig(DataConfig):
    """Keys of data sets whose samples are read one at a time."""

    workers: int | None = setting(
        "Processes of each rank that read samples; 0: the training process; null: one for each core of the rank, at "
        "most 8.",
        at_least=0,
    )


@dataclass(frozen=True)
class Items(Split):
    """A split whose samples are read when they are needed.

    Make one by :meth:`of`; :meth:`subset` makes others that share its reader and worker processes.

    Attributes:
        source: The reader, and what its samples must be.
        reader: The reader's number in ``workers``.
        workers: Reads the samples.
        rows: int64 [N], number for the reader of each sample.
        targets: See :class:`distrain.data.base.Split`; ``None``: the reader tells them.
        classes: The class of each sample, int64 [N], where it is known without reading the sample.
    """

    source: CheckedReader
    reader: int
    workers: ItemWorkers
    rows: Tensor
    targets: Targets
    classes: Tensor | None = None

    @classmethod
    def of(
        cls,
        reader: ItemReader,
        spec: DataSpec,
        workers: ItemWorkers,
        targets: Targets | None = None,
    ) -> Items:
        """All samples of a reader.

        Args:
            reader: Reads them.
            spec: Their shape, kind of target and classes.
            workers: Reads them in worker processes; the splits of one data set share it.
            targets: All targets, where they are known beforehand: from a table, for example.
        """
        source = CheckedReader(reader, spec, torch.uint8 if spec.dtype == "uint8" else torch.float32)
        return cls(source, workers.add(source), workers, torch.arange(len(reader)), targets)

    @override
    def __len__(self) -> int:
        return len(self.rows)

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        spec = self.source.spec
        return spec.channels, spec.height, spec.width

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    @override
    def blocks(self) -> Blocks | None:
        blocks = self.source.reader.blocks()
        return None if blocks is None else Blocks(blocks.numbers.index_select(0, self.rows), blocks.window)

    @override
    def subset(self, positions: Tensor) -> Items:
        targets = None if self.targets is None else pick_targets(self.targets, positions)
        classes = None if self.classes is None else self.classes.index_select(0, positions)
        return Items(self.source, self.reader, self.workers, self.rows.index_select(0, positions), targets, classes)

    @override
    def with_known_classes(self) -> Items:
        return dataclasses.replace(self, classes=self.class_numbers())

    @override
    def class_numbers(self) -> Tensor:
        if self.targets is not None:
            return cast("Tensor", self.targets)
        if self.classes is not None:
            return self.classes
        log.info("reading all %d samples to know their classes", len(self))
        return torch.cat([part.targets for part in self.chunks(_CHUNK)])

    @override
    def read(self, positions: Tensor) -> Images:
        parts = list(self._images(positions.split(_CHUNK)))
        if len(parts) == 1:
            return parts[0]
        images = torch.cat([part.images for part in parts])
        if self.targets is not None:
            return Images(images, pick_targets(self.targets, positions))
        return Images(images, torch.cat([part.targets for part in parts]))

    @override
    def chunks(self, size: int, limit: int | None = None) -> Iterator[Images]:
        yield from self._images(torch.arange(len(self))[:limit].split(min(size, _CHUNK)))

    @override
    def close(self) -> None:
        self.workers.close()

    def batches(self, batches: Iterable[tuple[Tensor, Tensor]], family: int) -> Iterator[Samples]:
        """Reads batches of samples, in worker processes if there are any, which then work some batches ahead.

        Args:
            batches: For each batch the positions of its samples in the split, int64 [n], and a number for each sample
                on which its random draws depend, int64 [n].
            family: What the draws depend on besides; see :func:`draws_of_epoch`.
        """
        kept: list[Tensor] = []

        def requests() -> Iterator[Request]:
            for positions, counters in batches:
                kept.append(positions)
                rows = self.rows.index_select(0, positions).tolist()
                yield Request(self.reader, rows, rng.bits(family, counters).tolist())

        for images, targets in self.workers.read(requests()):
            positions = kept.pop(0)
            yield images, targets if self.targets is None else pick_targets(self.targets, positions)

    def _images(self, parts: Iterable[Tensor]) -> Iterator[Images]:
        # As in the first epoch of a run with the seed 0.
        for images, targets in self.batches(((part, part) for part in parts), draws_of_epoch(0, 0)):
            yield Images(images, targets)


def draws_of_epoch(seed: int, epoch: int) -> int:
    """The family of an epoch's random draws inside of readers; see :func:`distrain.rng.bits`."""
    return rng.key(_ITEM, seed, epoch)
