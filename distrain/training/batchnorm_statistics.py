"""BatchNorm's statistics, measured over the training data by the model that a strategy holds.

The statistics that were gathered during training are those of other weights than an average's. Izmailov et al. 2018
(arXiv 1803.05407, §3.2) therefore measure them again, as ``torch.optim.swa_utils.update_bn`` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.data.loader import Loader
from distrain.models.freezing import still_modules
from distrain.runtime.device import float64_device
from distrain.strategies.base import Strategy
from distrain.torch_internals import BatchNorm
from distrain.training.evaluation import EvaluationStopped

#: The samples and the augmentation are those of this epoch, so that a model has one result, whenever it is measured.
_EPOCH = 0


@torch.no_grad()
def measure(strategy: Strategy, loader: Loader, why_stop: Callable[[], str | None]) -> bool:
    """Gives the BatchNorm layers of the model the statistics of the training samples; all ranks call it together.

    Each batch is normalised by its own statistics, over all replicas. A layer gets the mean over the batches of their
    means, and that of their unbiased variances. A smaller last batch is left out, unless it is the only one. All else
    is as in evaluation: dropout does nothing, and layers whose parameters are never trained keep their statistics.

    Args:
        strategy: Holds the model.
        loader: Of the training samples.
        why_stop: Called after every batch; returns why all ranks stop there, the same on each of them.

    Returns:
        Whether the model has such layers, on any rank.

    Raises:
        EvaluationStopped: ``why_stop`` gave a reason; some layers have the statistics of a batch.
    """
    layers = _layers(strategy)
    counted = torch.tensor([len(layers)], device=strategy.runtime.device)
    loader.shard = strategy.agree_on_shard()
    if not int(strategy.training_group.all_reduce(counted)):
        return False
    measured = [_Measured(layer, strategy.replicas) for layer in layers]
    activity, batches = strategy.runtime.activity, len(loader)
    activity.batches = (0, batches)
    full = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_uncompiled(strategy))
        for each in measured:
            stack.enter_context(each.watching())
        for done, batch in enumerate(loader.epoch(_EPOCH), 1):
            full = full or batch.global_count
            # A rank without a sample would not run the layers, and so would not take part in their sums.
            if batch.global_count == full and full >= loader.shard[1]:
                strategy.eval_step(batch)
                for each in measured:
                    each.end_batch()
            activity.batches = (done, batches)
            activity.progress += 1
            if reason := why_stop():
                raise EvaluationStopped(reason)
    for each in measured:
        each.finish()
    return True


def _layers(strategy: Strategy) -> list[nn.Module]:
    """This rank's BatchNorm layers with running statistics that training changes."""
    layers: list[nn.Module] = []
    for module in strategy.own_modules():
        freezing = strategy.freezing
        frozen = freezing.parameters - freezing.ever_trained if freezing is not None else frozenset()
        still = set(still_modules(module, frozen)) if frozen else set()
        layers += [
            each
            for name, each in module.named_modules()
            if isinstance(each, BatchNorm) and each.running_mean is not None and name not in still
        ]
    return layers


@contextlib.contextmanager
def _uncompiled(strategy: Strategy) -> Iterator[None]:
    """A compiled model runs uncompiled in this block, since it does not call hooks that were added later."""
    if not strategy.config.trainer.compile:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Measured:
    """A layer that normalises by the statistics of what it is given, which are added up.

    Args:
        layer: In evaluation mode, so that it normalises by its running statistics.
        replicas: The ranks that each give it a share of a batch.
    """

    def __init__(self, layer: Any, replicas: Communicator) -> None:
        self._layer, self._replicas = layer, replicas
        #: Count, means and sums of centred squares of each pass of a batch; there are several if it runs in parts.
        self._passes: list[tuple[Tensor, Tensor, Tensor]] = []
        device = float64_device(layer.running_mean.device)
        self._sums = torch.zeros(2, len(layer.running_mean), dtype=torch.float64, device=device)
        self._batches = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """In this block passes are measured."""
        hook = self._layer.register_forward_pre_hook(self._normalise_by_own, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _normalise_by_own(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        dims = [dim for dim in range(x.dim()) if dim != 1]
        # In float32 at least, and in two passes, as SyncBatchNorm does in training.
        wide = x if x.dtype == torch.float64 else x.float()
        sums = torch.cat([wide.sum(dims), wide.new_full((1,), x.numel() // x.shape[1])])
        self._replicas.all_reduce(sums)
        count = sums[-1]
        mean = sums[:-1] / count
        squares = (wide - mean.view(1, -1, *[1] * (x.dim() - 2))).square_().sum(dims)
        self._replicas.all_reduce(squares)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(squares / count)
        self._passes.append((count, mean, squares))

    def end_batch(self) -> None:
        """Adds the statistics of a batch; those of its parts are combined (Chan et al. 1979)."""
        if not self._passes:
            return
        counts, means, squares = (torch.stack(each).to(self._sums) for each in zip(*self._passes, strict=True))
        count, counts = counts.sum(), counts.unsqueeze(1)
        mean = (counts * means).sum(0) / count
        all_squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
        self._sums += torch.stack((mean, all_squares / (count - 1).clamp_min(1)))
        self._batches += 1
        self._passes.clear()

    def finish(self) -> None:
        """Gives the layer the means over the batches; one that did not run keeps what it has."""
        if self._batches:
            mean, variance = self._sums / self._batches
            self._layer.running_mean.copy_(mean)
            self._layer.running_var.copy_(variance)
