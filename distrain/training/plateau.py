"""``scheduler=plateau``: the learning rate falls when the monitored number of the validation stops getting better.

As ``torch.optim.lr_scheduler.ReduceLROnPlateau`` does. The number is the same on all ranks, so they lower the rate
together; the counts are part of the run's position in a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from distrain.checkpoint.progress import Progress
from distrain.optim.schedulers import PlateauConfig

log = logging.getLogger(__name__)

#: Whether a value is better than the best so far by more than a difference.
IsBetter = Callable[[float, float | None, float], bool]


def note(config: PlateauConfig, value: float, is_better: IsBetter, progress: Progress) -> None:
    """Counts an epoch whose validation gave a value, and lowers the rate from the next step on if it is time."""
    if is_better(value, progress.lr_score, config.min_delta):
        progress.lr_score, progress.lr_bad_epochs = value, 0
    else:
        progress.lr_bad_epochs += 1
    if progress.lr_cooldown:
        progress.lr_cooldown -= 1
        progress.lr_bad_epochs = 0
    if progress.lr_bad_epochs <= config.patience:
        return
    progress.lr_bad_epochs, progress.lr_cooldown = 0, config.cooldown
    factor = max(progress.lr_factor * config.factor, config.final_factor)
    if factor < progress.lr_factor:
        progress.lr_factor = factor
        log.info("scheduler=plateau: from epoch %d on the learning rate is %g × lr", progress.epoch + 1, factor)
