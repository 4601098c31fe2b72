"""What a run does when a loss or a gradient is NaN or infinite, by ``trainer.on_nonfinite``.

- ``stop``: a rank whose loss is not finite fails; the run ends with a message that names the rank, the step and the
  samples. On a CPU the check is free, since the loss is in host memory. On a GPU the loss is checked only where the
  host waits for the device anyway: when metrics are logged and before a save.
- ``skip``: all ranks leave the update out, and training continues with the next batch.
- ``rewind``: parameters, optimizer and compressor are restored from the newest checkpoint. The position in the data and
  the learning rate's schedule continue after the bad batch.

For ``skip`` and ``rewind`` the norm of the reduced gradient is checked before each update, so all ranks see the same
value; a non-finite loss makes the gradient non-finite too (see :class:`~distrain.strategies.precision.Precision`). With
any choice, a checkpoint that contains NaN is never written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.checkpoint.module_state import is_extra_state
from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.data.batch import Batch
from distrain.errors import NonFinite, PeerLost
from distrain.strategies.base import StepResult, Strategy

log = logging.getLogger(__name__)

#: A run that skips more updates than this in a row ends, since it can't recover.
_MAX_SKIPPED_IN_A_ROW = 100
#: Number of samples that a message names.
_SAMPLES_SHOWN = 8


class NonFiniteGuard:
    """Checks each step's result on one rank.

    Args:
        config: The run's configuration.
        strategy: The strategy of the run.
        training_group: The ranks that train.

    Attributes:
        rewind_requested: This rank has seen a non-finite gradient and the run must rewind; the trainer resets it after
            the rewind.
    """

    def __init__(self, config: Config, strategy: Strategy, training_group: Communicator) -> None:
        self.rewind_requested = False
        self._policy = config.trainer.on_nonfinite
        self._strategy = strategy
        self._training_group = training_group
        self._device = strategy.runtime.device
        # Reading the loss would make the host wait for a GPU, so its check is deferred to check_loss_sum.
        self._deferred = self._device.type != "cpu"
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=self._device)
        self._skipped_in_a_row = 0

    def check_step(self, result: StepResult, batch: Batch, step: int) -> bool:
        """Checks one step; returns whether its loss and samples count, which those of a skipped update do not.

        Args:
            result: The step's result.
            batch: The batch of the step.
            step: The number of the step, from 1.

        Raises:
            NonFinite: The configuration ends the run here.
        """
        if self._policy == "stop":
            self._check_loss(result, batch, step)
            return True
        finite = math.isfinite(result.loss_sum.item())
        if not result.skipped:
            self._skipped_in_a_row = 0
            # If the loss is not finite here, the loss scaling of fp16 has skipped the update: normal, so no warning.
            return finite
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > _MAX_SKIPPED_IN_A_ROW:
            raise NonFinite(f"{self._skipped_in_a_row} gradients in a row are not finite")
        self._log_skipped_update(finite, batch, step)
        self.rewind_requested = self._policy == "rewind"
        return False

    def _check_loss(self, result: StepResult, batch: Batch, step: int) -> None:
        if self._deferred:
            is_first = (self._first_bad_step < 0) & ~result.loss_sum.isfinite()
            self._first_bad_step = torch.where(is_first, step, self._first_bad_step)
        elif not math.isfinite(loss := result.loss_sum.item()):
            # A bad sample or parameter of one rank is an error of the whole run, also if the run could lose a rank.
            self._strategy.runtime.expendable = False
            raise NonFinite(f"the loss is {loss} in step {step}, samples {_format_samples(batch.indices)}")

    def _log_skipped_update(self, finite_loss: bool, batch: Batch, step: int) -> None:
        rank = self._strategy.runtime.world.rank
        own = {"rank": rank, "finite": finite_loss, "samples": _format_samples(batch.indices)}
        ranks = [own] if self._strategy.skips_locally else self._training_group.all_gather_json(own, self._device)
        losses = [f"rank {each['rank']} (samples {each['samples']})" for each in ranks if not each["finite"]]
        cause = f"the loss of {', '.join(losses)}" if losses else "the gradient, though no loss,"
        log.warning("step %d: %s is not finite; the update is skipped", step, cause)

    def check_loss_sum(self, loss_sum: float) -> None:
        """Ends the run if a loss since the last call was not finite; called where the host waits for the device anyway.

        If all ranks are at the same step, all of them call it together.

        Args:
            loss_sum: Sum of the losses since the last call over all ranks.

        Raises:
            NonFinite: This rank's loss was the first that was not finite.
            PeerLost: Another rank's loss was the first.
        """
        if not self._deferred or self._policy != "stop" or math.isfinite(loss_sum):
            return
        world = self._strategy.runtime.world
        own: dict[str, Any] = {"rank": world.rank, "host": world.host, "step": int(self._first_bad_step)}
        ranks = [own] if self._strategy.skips_locally else self._training_group.all_gather_json(own, self._device)
        bad = sorted((each["step"], each["rank"], each["host"]) for each in ranks if each["step"] >= 0)
        if not bad:
            return
        step, rank, host = bad[0]
        reason = f"the loss is not finite in step {step}"
        raise NonFinite(reason) if rank == world.rank else PeerLost(rank, host, f"NonFinite: {reason}")


def _format_samples(indices: Tensor) -> str:
    """The first few sample indices, as text."""
    more = f" and {len(indices) - _SAMPLES_SHOWN} more" if len(indices) > _SAMPLES_SHOWN else ""
    return ", ".join(map(str, indices[:_SAMPLES_SHOWN].tolist())) + more


def refuse_nan(model: Mapping[str, Tensor], step: int) -> None:
    """Refuses to save a model that contains NaN.

    Args:
        model: Parameters and buffers by name.
        step: Updates done.

    Raises:
        NonFinite: A tensor contains NaN; the message names the first one.
    """
    for name, tensor in model.items():
        if is_extra_state(name):  # what it means is the module's own business
            continue
        # The maximum of a tensor is NaN if any element is; unlike isnan() on the tensor, it allocates no copy.
        if tensor.is_floating_point() and tensor.numel() and bool(tensor.detach().amax().isnan()):
            raise NonFinite(f"{name} contains NaN after step {step}, which is not saved")


class RewindPoints:
    """Checkpoints that this run saved or resumed from and can rewind to; all ranks hold the same list.

    Args:
        training_group: The ranks that train; the first one chooses.
        device: Device on which the ranks communicate.
    """

    def __init__(self, training_group: Communicator, device: torch.device) -> None:
        self._training_group = training_group
        self._device = device
        self._paths: list[Path] = []
        self._last_rewind_step = -1

    def add(self, path: Path, step: int) -> None:
        """Adds a checkpoint that was loaded or whose save has begun; it is verified only when it is needed.

        Args:
            path: Folder of the checkpoint.
            step: Updates done. A checkpoint saved in the same step as a rewind is not added, since it contains the
                state that was just restored.
        """
        if step != self._last_rewind_step and path not in self._paths[-1:]:
            self._paths.append(path)

    def pop_newest(self, step: int) -> Path:
        """Removes and returns the newest valid checkpoint, so that the next rewind goes further back.

        Args:
            step: Updates done.

        Raises:
            NonFinite: No valid checkpoint is left.
        """
        self._last_rewind_step = step
        newest = self._find_newest() if self._training_group.rank == 0 else 0
        index = int(self._training_group.broadcast(torch.tensor(newest, device=self._device)))
        if index < 0:
            raise NonFinite("a gradient is not finite, and there is no checkpoint to rewind to (any more)")
        path = self._paths[index]
        del self._paths[index:]
        return path

    def _find_newest(self) -> int:
        """Index of the newest valid checkpoint; -1 if there is none."""
        for index, path in reversed(list(enumerate(self._paths))):
            # Checkpoints beyond checkpoint.keep have been removed.
            if not path.exists():
                continue
            try:
                checkpoint_reader.verify(path)
            except DamagedCheckpoint as error:
                log.warning("checkpoint left out: %s", error)
                continue
            return index
        return -1
