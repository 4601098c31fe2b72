"""What a run does about losses and gradients that are NaN or infinite: ``trainer.on_nonfinite``.

- ``stop``: a rank whose loss is not finite fails, which ends the run with its name, the step and the samples. That
  costs next to nothing: on a CPU the loss is a number at hand; on a GPU it is looked at where the host waits anyway, at
  logs and before a save.
- ``skip``: the update is left out, on all ranks, and the data go on.
- ``rewind``: parameters, optimizer and compressor become those of the newest checkpoint; the data go on after the bad
  batch, and so does the learning rate.

For the last two the gradient's norm is looked at before each update, after it was reduced, so that all ranks see the
same; a loss that is not finite is made to show in it. Whatever is chosen, no checkpoint with NaN in it is written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.config.schema import Config
from distrain.errors import NonFinite, PeerLost

if TYPE_CHECKING:
    from distrain.communication.collectives import Communicator
    from distrain.data.batch import Batch
    from distrain.strategies.base import StepResult, Strategy

log = logging.getLogger(__name__)

#: So many updates left out one after the other mean that the run itself is broken.
_MOST_IN_A_ROW = 100
_SHOWN = 8


class NonFiniteGuard:
    """Looks at every step's result on one rank.

    Args:
        config: The run's configuration.
        strategy: Says whose gradients decide.
        everyone: The ranks that train.

    Attributes:
        wants_back: This rank saw a gradient after which the run goes back; the trainer takes it back when that is done.
    """

    def __init__(self, config: Config, strategy: Strategy, everyone: Communicator) -> None:
        self.wants_back = False
        self._policy = config.trainer.on_nonfinite
        self._strategy = strategy
        self._everyone = everyone
        self._device = strategy.runtime.device
        self._late = self._device.type == "cuda"
        self._first = torch.full((), -1, dtype=torch.int64, device=self._device)
        self._in_row = 0

    def counts(self, result: StepResult, batch: Batch, step: int) -> bool:
        """Whether a step's loss and samples count; those of an update that was left out don't.

        Args:
            result: The step's.
            batch: Its samples.
            step: Its number, from 1.

        Raises:
            NonFinite: The run ends here.
        """
        if self._policy == "stop":
            self._watch_loss(result, batch, step)
            return True
        finite = math.isfinite(result.loss_sum.item())
        if not result.left_out:
            self._in_row = 0
            # fp16's loss scaling may have left the update out, which is nothing to tell of.
            return finite
        self._in_row += 1
        if self._in_row > _MOST_IN_A_ROW:
            raise NonFinite(f"{self._in_row} gradients in a row are not finite")
        self._tell(finite, batch, step)
        self.wants_back = self._policy == "rewind"
        return False

    def _watch_loss(self, result: StepResult, batch: Batch, step: int) -> None:
        if self._late:
            first = (self._first < 0) & ~result.loss_sum.isfinite()
            self._first = torch.where(first, step, self._first)
        elif not math.isfinite(loss := result.loss_sum.item()):
            # What is wrong with one rank's samples or parameters is wrong with the run.
            self._strategy.runtime.expendable = False
            raise NonFinite(f"the loss is {loss} in step {step}, samples {shown(batch.indices)}")

    def _tell(self, finite: bool, batch: Batch, step: int) -> None:
        rank = self._strategy.runtime.world.rank
        mine = {"rank": rank, "finite": finite, "samples": shown(batch.indices)}
        told = [mine] if self._strategy.skips_locally else self._everyone.all_gather_json(mine, self._device)
        losses = [f"rank {each['rank']} (samples {each['samples']})" for each in told if not each["finite"]]
        what = f"the loss of {', '.join(losses)}" if losses else "the gradient, though no loss,"
        log.warning("step %d: %s is not finite; the update is left out", step, what)

    def look(self, loss_sum: float) -> None:
        """Where the host waits for the device anyway: ends the run if a loss was not finite since the last look.

        Args:
            loss_sum: Over all ranks; where they keep step, all call this together.

        Raises:
            NonFinite: This rank's was the first.
            PeerLost: Another rank's was.
        """
        if not self._late or self._policy != "stop" or math.isfinite(loss_sum):
            return
        world = self._strategy.runtime.world
        mine: dict[str, Any] = {"rank": world.rank, "host": world.host, "step": int(self._first)}
        told = [mine] if self._strategy.skips_locally else self._everyone.all_gather_json(mine, self._device)
        bad = sorted((each["step"], each["rank"], each["host"]) for each in told if each["step"] >= 0)
        if not bad:
            return
        step, rank, host = bad[0]
        reason = f"the loss is not finite in step {step}"
        raise NonFinite(reason) if rank == world.rank else PeerLost(rank, host, f"NonFinite: {reason}")


def shown(indices: Tensor) -> str:
    """The first few positions in the split, as text."""
    more = f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else ""
    return ", ".join(map(str, indices[:_SHOWN].tolist())) + more


def refuse_nan(model: Mapping[str, Tensor], step: int) -> None:
    """Makes sure that what is to be saved holds no NaN.

    Raises:
        NonFinite: It does; the first tensor is named.
    """
    for name, tensor in model.items():
        # The largest number of a tensor is NaN if there is one in it; no copy is made.
        if tensor.is_floating_point() and tensor.numel() and bool(tensor.detach().amax().isnan()):
            raise NonFinite(f"{name} holds NaN after step {step}, which is not saved")


class Trail:
    """Checkpoints that this run has saved or come from, and may go back to; all ranks keep the same.

    Args:
        everyone: The ranks that train; the first chooses.
        device: Where they communicate.
    """

    def __init__(self, everyone: Communicator, device: torch.device) -> None:
        self._everyone = everyone
        self._device = device
        self._paths: list[Path] = []
        self._back_at = -1

    def add(self, path: Path, step: int) -> None:
        """A checkpoint is on its way or was loaded; whether it is valid shows when it is needed.

        Args:
            path: Its folder.
            step: Steps done; one that is saved right after going back is what was gone back to, and not noted.
        """
        if step != self._back_at:
            self._paths.append(path)

    def back(self, step: int) -> Path:
        """The newest valid one, which is then not gone back to again.

        Args:
            step: Steps done.

        Raises:
            NonFinite: There is none.
        """
        self._back_at = step
        newest = self._newest() if self._everyone.rank == 0 else 0
        place = int(self._everyone.broadcast(torch.tensor(newest, device=self._device)))
        if place < 0:
            raise NonFinite("a gradient is not finite, and there is no checkpoint to go back to (any more)")
        path = self._paths[place]
        del self._paths[place:]
        return path

    def _newest(self) -> int:
        for place, path in reversed(list(enumerate(self._paths))):
            # Old ones were removed in their time.
            if not path.exists():
                continue
            try:
                checkpoint_reader.verify(path)
            except DamagedCheckpoint as error:
                log.warning("checkpoint left out: %s", error)
                continue
            return place
        return -1
