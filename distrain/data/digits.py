"""The 8x8 digits that ship inside scikit-learn: 1,797 real images, no download."""

from __future__ import annotations

import gzip
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distrain.config.registry import register
from distrain.config.schema import DataConfig
from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble, checked, hold_out_test
from distrain.errors import missing

_FILE = Path("datasets", "data", "digits.csv.gz")
_SIDE = 8
_LARGEST = 16
_TEST_FRACTION = 0.2
#: Characters, several times what the file has.
_LARGEST_TEXT = 1 << 20


@dataclass
class DigitsConfig(DataConfig):
    """No keys of its own; a fifth of the images is for testing, chosen by ``split_seed``."""


@register("data", "digits", DigitsConfig)
class Digits(DataSource):
    """The test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI, 1998).

    The file is read from scikit-learn's installed package without importing it.
    """

    def __init__(self, config: DigitsConfig) -> None:
        self._config = config

    def describe(self) -> DataSpec:
        """1x8x8, ten classes.

        Raises:
            ConfigError: scikit-learn isn't installed.
        """
        self._path()
        return checked(self._config, DataSpec(1, _SIDE, _SIDE, tuple("0123456789")))

    def load(self) -> Splits:
        """Reads the file; values 0 to 16 become 0 to 255.

        Raises:
            ConfigError: The file can't be read, or isn't what it should be.
        """
        spec, path = self.describe(), self._path()
        try:
            with gzip.open(path, "rt") as file:
                text = file.read(_LARGEST_TEXT)
            table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.int64, ndmin=2)
        except (OSError, EOFError, ValueError) as error:
            raise missing("data", f"{path} can't be read ({error})") from error
        limits = np.array([_LARGEST] * _SIDE * _SIDE + [9])
        if table.shape[1] != len(limits) or table.min() < 0 or (table > limits).any():
            raise missing("data", f"{path} doesn't hold 8x8 digits with values from 0 to {_LARGEST}")
        # Rounded, in integers: 16 becomes 255.
        pixels = (table[:, :-1] * 255 + _LARGEST // 2) // _LARGEST
        images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, _SIDE, _SIDE)
        everything = Images(images, torch.from_numpy(table[:, -1].copy()))
        keep, test = hold_out_test(len(everything), _TEST_FRACTION, self._config.split_seed)
        return assemble(self._config, spec, everything.subset(keep), everything.subset(test))

    def _path(self) -> Path:
        package = importlib.util.find_spec("sklearn")
        for folder in (package.submodule_search_locations or []) if package else []:
            if (path := Path(folder) / _FILE).is_file():
                return path
        raise missing("data=digits", "the images lie in scikit-learn's package; type pip install 'distrain[digits]'")
