"""The 8x8 digits that are part of the scikit-learn package: 1,797 images, without a download."""

from __future__ import annotations

import gzip
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distrain.config.groups import DataConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data import chosen_classes
from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble, check_shared_keys, hold_out_test
from distrain.errors import config_error

_FILE = Path("datasets", "data", "digits.csv.gz")
_SIDE = 8
_CLASSES = tuple("0123456789")
#: Largest pixel value in the file.
_MAX_VALUE = 16
_TEST_FRACTION = 0.2
#: Limit in characters, several times the length of the file.
_MAX_TEXT = 1 << 20


@dataclass
class DigitsConfig(DataConfig):
    """Keys of ``data=digits``; ``split_seed`` selects a fifth of the images for testing."""

    classes: list[str] | None = setting("Use the images of these classes alone; null: of all.", default=None)


@register("data", "digits", DigitsConfig)
class Digits(DataSource):
    """The test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI, 1998).

    The file is read from the installed scikit-learn package, which is not imported.
    """

    def __init__(self, config: DigitsConfig) -> None:
        self._config = config

    def describe(self) -> DataSpec:
        """Returns 1x8x8 and ten classes.

        Raises:
            ConfigError: scikit-learn isn't installed.
        """
        self._path()
        classes = chosen_classes.choose(self._config.classes, _CLASSES)
        return check_shared_keys(self._config, DataSpec(1, _SIDE, _SIDE, classes))

    def load(self) -> Splits:
        """Reads the file; pixel values 0 to 16 are scaled to 0 to 255.

        Raises:
            ConfigError: The file can't be read, or has an unexpected content.
        """
        spec, path = self.describe(), self._path()
        try:
            with gzip.open(path, "rt") as file:
                text = file.read(_MAX_TEXT)
            table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.int64, ndmin=2)
        except (OSError, EOFError, ValueError) as error:
            raise config_error("data", f"{path} can't be read ({error})") from error
        limits = np.array([_MAX_VALUE] * _SIDE * _SIDE + [9])
        if table.shape[1] != len(limits) or table.min() < 0 or (table > limits).any():
            raise config_error("data", f"{path} doesn't contain 8x8 digits with values from 0 to {_MAX_VALUE}")
        # Integer arithmetic, rounded to the nearest.
        pixels = (table[:, :-1] * 255 + _MAX_VALUE // 2) // _MAX_VALUE
        images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, _SIDE, _SIDE)
        everything = Images(images, torch.from_numpy(table[:, -1].copy()))
        keep, test = hold_out_test(len(everything), _TEST_FRACTION, self._config.split_seed)
        parts = (chosen_classes.only(everything.subset(part), spec.classes, _CLASSES) for part in (keep, test))
        return assemble(self._config, spec, *parts)

    def _path(self) -> Path:
        package = importlib.util.find_spec("sklearn")
        for folder in (package.submodule_search_locations or []) if package else []:
            if (path := Path(folder) / _FILE).is_file():
                return path
        raise config_error(
            "data=digits",
            "needs scikit-learn, which contains the images; run pip install 'distrain[digits]'",
        )
