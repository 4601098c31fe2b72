"""``callbacks=[filters]``: a picture of what the first convolution looks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn
from typing_extensions import override

from distrain.training.callbacks import Callback, RunView

log = logging.getLogger(__name__)


class Filters(Callback):
    """Logs a picture of the first convolution's filters, at the start and after epochs.

    Filters over three channels are drawn in colour, others as the mean over their channels.

    Args:
        every_epochs: Epochs between two pictures.
    """

    only_on_main = True

    def __init__(self, every_epochs: int = 1) -> None:
        if every_epochs < 1:
            raise ValueError(f"every_epochs={every_epochs} must be at least 1")
        self._every = every_epochs

    @override
    def on_fit_start(self, run: RunView) -> None:
        if _first_convolution(run) is None:
            log.warning("callback filters: the model has no convolution of images, so no filters are drawn")
        elif run.progress.step == 0:
            self._draw(run)

    @override
    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        if run.progress.epoch % self._every == 0:
            self._draw(run)

    @staticmethod
    def _draw(run: RunView) -> None:
        layer, logger = _first_convolution(run), run.report.logger
        if layer is None or not logger.accepts_figures:
            return
        # Imports matplotlib, which takes long.
        from distrain.reporting import figures

        logger.figure(run.progress.step, "epoch/filters", figures.filters(layer.weight.detach().float().cpu()))


def _first_convolution(run: RunView) -> nn.Conv2d | None:
    """The first one of this rank's part of the model; rank 0 has the first part."""
    layers = (layer for module in run.strategy.own_modules() for layer in module.modules())
    return next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
