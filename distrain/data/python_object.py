"""data=python_object: arrays that a Python program gives to ``distrain.fit`` and the like."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from distrain.config.groups import DataConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble, check_shared_keys
from distrain.errors import ConfigError, config_error


@dataclass(frozen=True)
class DataObject:
    """Samples in memory.

    Attributes:
        spec: Their shape and classes.
        train: Training samples.
        val: Validation samples; ``None``: ``data.val_fraction`` of the training samples are held out.
        test: Test samples; ``None``: the validation samples.
        fingerprint: A hash of all of them.
    """

    spec: DataSpec
    train: Images
    val: Images | None
    test: Images | None
    fingerprint: str


_offered: ContextVar[DataObject | None] = ContextVar("offered_data", default=None)


@contextlib.contextmanager
def offered_data(data: DataObject | None) -> Iterator[None]:
    """Inside this block ``data=python_object`` stands for these samples."""
    token = _offered.set(data)
    try:
        yield
    finally:
        _offered.reset(token)


@dataclass
class PythonObjectDataConfig(DataConfig):
    """Keys of ``data=python_object``."""

    fingerprint: str | None = setting("A hash of the samples; distrain sets it, so that ranks can compare their data.")


@register("data", "python_object", PythonObjectDataConfig)
class PythonObjectData(DataSource):
    """Arrays in memory. Floating-point numbers reach the model as they are, unless ``mean`` and ``std`` are given."""

    compatible_keys = DataSource.compatible_keys | {"fingerprint"}

    def __init__(self, config: PythonObjectDataConfig) -> None:
        self._config = config

    def describe(self) -> DataSpec:
        """The shape and classes of the given arrays.

        Raises:
            ConfigError: No arrays are given, since this is a command, for example.
        """
        return check_shared_keys(self._config, self._data().spec)

    def load(self) -> Splits:
        """Holds out validation samples where none are given.

        Raises:
            ConfigError: There is nothing to train or to test on.
        """
        data, config = self._data(), self._config
        if data.val is None and data.test is None and config.val_fraction == 0:
            problem = "leaves no samples to test the model on; pass val=… or test=…, or leave it above 0"
            raise ConfigError("data.val_fraction", config.val_fraction, problem)
        splits = assemble(config, data.spec, data.train, data.test, val=data.val)
        notes = [
            f"{len(splits.train)} samples to train on, {len(splits.val)} for validation, {len(splits.test)} to test"
        ]
        if data.test is None:
            notes = [
                f"{len(splits.train)} samples to train on, {len(splits.val)} for validation, which are also the test"
            ]
        return dataclasses.replace(splits, notes=tuple(notes))

    def _data(self) -> DataObject:
        data = _offered.get()
        if data is None:
            problem = (
                "stands for arrays in a Python program, and a run folder holds no data; pass them in Python: "
                "distrain.evaluate(run, data=…)"
            )
            raise config_error("data=python_object", problem)
        return data
