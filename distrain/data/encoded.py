"""Encoded images, which are decoded when they are needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from distrain.data.base import DataSpec
from distrain.data.byte_ranges import ByteRanges
from distrain.data.decode import DecodeError, decode_bytes, place, read_piece
from distrain.data.reading import ItemReader
from distrain.data.sampler import Blocks


class EncodedReader(ItemReader):
    """Decodes images to the same pixels as a cache of decoded images holds; the split knows their targets.

    Args:
        pieces: Where the encoded images lie.
        spec: The size that they are given.
        window: Number of files to read from at a time; ``None``: any.
    """

    def __init__(self, pieces: ByteRanges, spec: DataSpec, window: int | None = None) -> None:
        self._pieces, self._shape, self._window = pieces, (spec.height, spec.width, spec.channels), window

    @override
    def __len__(self) -> int:
        return len(self._pieces)

    @override
    def __getitem__(self, row: int) -> tuple[Tensor, None]:
        try:
            data = read_piece(self._pieces, row)
            pixels = decode_bytes(data, self.name(row), *self._shape)
        except DecodeError as error:
            raise ValueError(error.reason) from error  # who reports it adds the name
        # A copy where Pillow's own memory is read-only.
        return torch.from_numpy(np.require(pixels, requirements="W")), None

    @override
    def blocks(self) -> Blocks | None:
        if self._window is None:
            return None
        return Blocks(torch.from_numpy(self._pieces.file).to(torch.int64), self._window)

    @override
    def name(self, row: int) -> str:
        return place(self._pieces, row)
