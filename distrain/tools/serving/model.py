"""What is served: models behind one interface, and the one that answers now."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from distrain.tools.serving.metrics import Metrics

log = logging.getLogger(__name__)

#: The answer for an image, as plain data: the entries of :meth:`distrain.tasks.base.Task.predict`.
Answer = dict[str, Any]
#: Pixels of an image, uint8 [C, H, W].
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class About:
    """What users are told of a model.

    Attributes:
        name: Of the checkpoint or file.
        step: Number of updates.
        model: Its name in the configuration.
        task: What it was trained to do.
        classes: Names of the classes, labels or numbers.
        shape: Channels, height and width that images are decoded to.
        largest_top: How many ranked answers an image can get at most.
    """

    name: str
    step: int
    model: str
    task: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    largest_top: int


class ServedModel(ABC):
    """A model that answers for batches of images; used by one thread at a time."""

    about: About

    @abstractmethod
    def answer(self, pixels: Pixels, top: int) -> list[Answer | None]:
        """Answers for images.

        Args:
            pixels: uint8 [n, C, H, W], of :attr:`About.shape`.
            top: How many ranked answers an image gets, at most :attr:`About.largest_top`.

        Returns:
            One answer for each image; ``None`` where the model's output is not finite.
        """


class Source(ABC):
    """Where models come from: a run's folder or a file, in which newer ones may appear."""

    @abstractmethod
    def state(self) -> Hashable:
        """What is there, found out quickly. While it stays the same, there is no newer model.

        Raises:
            OSError: It can't be looked at.
        """

    @abstractmethod
    def load(self) -> ServedModel:
        """Reads the model that should be served.

        Raises:
            ConfigError: There is none, or it can't be used.
        """

    @abstractmethod
    def newest(self) -> Hashable:
        """Which model :meth:`load` would read; takes longer than :meth:`state`.

        Raises:
            ConfigError: As for :meth:`load`.
        """


def warm_up(model: ServedModel, batch_sizes: Sequence[int]) -> ServedModel:
    """Runs a model on black images, since the first batch of each size takes several times as long as later ones."""
    for size in batch_sizes:
        model.answer(np.zeros((size, *model.about.shape), np.uint8), 1)
    return model


class CurrentModel:
    """The model that new requests are answered by. A request keeps the model it began with.

    Args:
        source: Where models come from.
        batch_sizes: Those that a new model is tried with before it answers.
        metrics: Where reloads are counted.

    Raises:
        ConfigError: There is no usable model.
    """

    def __init__(self, source: Source, batch_sizes: Sequence[int], metrics: Metrics) -> None:
        self._source, self._batch_sizes, self._metrics = source, batch_sizes, metrics
        # Before loading: what appears meanwhile is found at the next look.
        self._state, self._newest = source.state(), source.newest()
        self._failed: str | None = None
        self.model = warm_up(source.load(), batch_sizes)
        metrics.model_step.set(self.model.about.step)

    async def watch(self, seconds: float, executor: Executor) -> None:
        """Looks for a newer model every so many seconds, until it is cancelled.

        Args:
            seconds: Time between two looks.
            executor: Runs what takes long.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(seconds)
            newer = await loop.run_in_executor(executor, self._newer)
            if newer is not None:
                self.model = newer
                self._metrics.model_step.set(newer.about.step)
                self._metrics.reloads.labels("loaded").inc()
                log.warning("serving %s from now on", newer.about.name)

    def _newer(self) -> ServedModel | None:
        """A newer model that has been tried; ``None`` if there is none."""
        try:
            state = self._source.state()
            if state == self._state:
                return None
            newest = self._source.newest()
            loaded = None if newest == self._newest else warm_up(self._source.load(), self._batch_sizes)
        except Exception as error:  # whatever a damaged or half-written model raises: the one that answers goes on
            problem = f"{type(error).__name__}: {error}"
            if problem != self._failed:
                self._failed = problem
                self._metrics.reloads.labels("failed").inc()
                log.warning("keeps serving %s, since what is newer can't be used (%s)", self.model.about.name, problem)
            return None
        self._state, self._newest, self._failed = state, newest, None
        return loaded
