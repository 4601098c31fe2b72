"""BatchNorm over the global batch, for replicas that each see a share of it.

Ioffe & Szegedy 2015 (arXiv 1502.03167) §3: mean and variance are those of the whole batch. A replica knows only its
share, so the sums, and in the backward pass the two sums of the gradient, are added over the replicas. Works on CPUs
and GPUs, with uneven shares and with empty ones, and gives what one process gives up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distrain.communication.collectives import Communicator
from distrain.config.groups import ModelConfig
from distrain.torch_internals import BatchNorm


def replacement(model: ModelConfig) -> str:
    """What to type, or to build, to have layers that don't depend on how a batch is divided."""
    return "model.norm=group" if hasattr(model, "norm") else "GroupNorm in the model"


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps)`` with statistics summed over the replicas; also returns them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, communicator: Communicator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.dim()) if d != 1]
        channels = x.shape[1]
        # In float32 at least, as BatchNorm does under autocast. Two passes (mean, then centred squares) because the
        # difference of large sums would lose the digits that the comparison with one process needs.
        wide = x if x.dtype == torch.float64 else x.float()
        sums = torch.cat([wide.sum(dims), wide.new_full((1,), x.numel() // channels)])
        communicator.all_reduce(sums)
        count = sums[-1]
        # Reading the count makes the host wait for a GPU, so it is read only where it may be too small.
        if x.numel() <= channels and count <= 1:
            raise ValueError(f"BatchNorm needs more than one value a channel to train on, got {list(x.shape)}")
        mean = sums[:-1] / count
        shape = [1, channels] + [1] * (x.dim() - 2)
        centred = wide - mean.view(shape)
        variance = communicator.all_reduce(centred.square().sum(dims)) / count
        inverse = torch.rsqrt(variance + eps)
        normalised = centred * inverse.view(shape)
        ctx.save_for_backward(normalised, inverse, count)
        ctx.communicator, ctx.dims, ctx.shape, ctx.dtype = communicator, dims, shape, x.dtype
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        normalised, inverse, count = ctx.saved_tensors
        grad = gradients[0].to(normalised.dtype)
        sums = torch.stack([grad.sum(ctx.dims), (grad * normalised).sum(ctx.dims)])
        ctx.communicator.all_reduce(sums)
        mean_grad, mean_product = (sums / count).view(2, *ctx.shape)
        result = (grad - mean_grad - normalised * mean_product) * inverse.view(ctx.shape)
        return result.to(ctx.dtype), None, None


class SyncBatchNorm(BatchNorm):
    """A BatchNorm layer whose training statistics are those of all replicas' samples together."""

    communicator: Communicator

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {input.dim()}-dimensional input")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input`` ``[N, C, ...]``; N may differ among replicas and be 0."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        normalised: tuple[Tensor, ...] = _Normalise.apply(input, self.eps, self.communicator)  # type: ignore[no-untyped-call]
        output, mean, variance, count = normalised
        if self.training and self.track_running_stats:
            self._update_running(mean, variance, count)
        if self.affine:
            shape = [1, self.num_features] + [1] * (input.dim() - 2)
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        # The running variance is the unbiased one, as in torch's own layer.
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


class DeferredBatchNorm(BatchNorm):
    """A BatchNorm layer that normalises each microbatch by itself but updates its running statistics once a step.

    As torchgpipe does (Kim et al. 2020, arXiv 2004.09910, §3.2): the statistics are those of the whole batch, over all
    microbatches and replicas.
    """

    communicator: Communicator
    sums: Tensor | None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {input.dim()}-dimensional input")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input`` ``[N, C, ...]``."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            dims = [d for d in range(input.dim()) if d != 1]
            wide = input.detach().double()
            count = wide.new_full((1,), input.numel() // input.shape[1])
            sums = torch.cat([wide.sum(dims), wide.square().sum(dims), count])
            self.sums = sums if self.sums is None else self.sums + sums
        return nn.functional.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)

    @torch.no_grad()
    def update_running_statistics(self) -> None:
        """Updates the running statistics from all microbatches of the step; all replicas call it together."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            self.sums = None
            return
        held = self.sums
        if held is None:
            held = torch.zeros(2 * self.num_features + 1, dtype=torch.float64, device=self.running_mean.device)
        total, squares, (count,) = self.communicator.all_reduce(held).split([self.num_features, self.num_features, 1])
        self.sums = None
        mean = total / count
        unbiased = (squares / count - mean.square()) * (count / (count - 1))
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


def _class_of(layer: BatchNorm, normalising: type[BatchNorm]) -> type[BatchNorm]:
    """The class to give a layer so that it normalises as ``normalising`` does, and does all else that it did."""
    own = type(layer)
    if own.__module__.startswith("torch.") or own.forward is BatchNorm.forward:
        return normalising
    return _class_with_own_forward(own, normalising)


def _class_with_own_forward(own: type[BatchNorm], normalising: type[BatchNorm]) -> type[BatchNorm]:
    """A class for a layer whose ``forward`` does more than normalise, like timm's layers with an activation."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.training and self.running_mean is not None:
            return own.forward(self, input, *args, **kwargs)
        counted = self.num_batches_tracked
        count = None if counted is None else counted.clone()

        def normalise(x: Tensor) -> Tensor:
            # Its own forward may have counted this pass already.
            if count is not None:
                counted.copy_(count)
            normalised: Tensor = normalising.forward(self, x)
            return normalised

        with _Normalising(normalise) as mode:
            result = own.forward(self, input, *args, **kwargs)
        if not mode.was_used:
            problem = f"{own.__name__} is a BatchNorm layer, but does not call torch.nn.functional.batch_norm"
            raise ValueError(f"{problem}; type strategy.batchnorm=local")
        return result

    return type(f"{normalising.__name__}Of{own.__name__}", (normalising, own), {"forward": forward})


class _Normalising(TorchFunctionMode):
    """Inside this block another function takes the place of ``torch.nn.functional.batch_norm``.

    Args:
        normalise: Gets the input of the normalisation; weights and statistics are the layer's.

    Attributes:
        was_used: Whether it was called.
    """

    def __init__(self, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._normalise, self.was_used = normalise, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.batch_norm:
            self.was_used = True
            return self._normalise(args[0] if args else (kwargs or {})["input"])
        return func(*args, **(kwargs or {}))


def defer_running_statistics(model: nn.Module, communicator: Communicator) -> int:
    """Makes BatchNorm layers, in place, update running statistics only at :func:`update_running_statistics`.

    Returns:
        How many layers it found.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for layer in layers:
        # Changing the class keeps the layer's identity: names, hooks and references to it stay valid.
        layer.__class__ = _class_of(layer, DeferredBatchNorm)
        assert isinstance(layer, DeferredBatchNorm)
        layer.communicator = communicator
        layer.sums = None
    return len(layers)


def update_running_statistics(modules: Iterable[nn.Module]) -> None:
    """Updates the running statistics of all deferred layers; once a step, on all replicas together."""
    for module in modules:
        for layer in module.modules():
            # A layer whose parameters are frozen is in evaluation mode, and its statistics stay.
            if isinstance(layer, DeferredBatchNorm) and layer.training:
                layer.update_running_statistics()


def exclude_from_compilation() -> None:
    """Excludes synchronised layers from torch.compile, which can't compile their collectives."""
    SyncBatchNorm.forward = torch.compiler.disable(SyncBatchNorm.forward)  # type: ignore[method-assign]


def synchronise_batchnorm(model: nn.Module, communicator: Communicator) -> int:
    """Replaces the model's BatchNorm layers, in place, by ones that see all replicas; names and tensors stay.

    Returns:
        How many layers were replaced.
    """
    count = 0
    for name, child in list(model.named_children()):
        if isinstance(child, BatchNorm) and not isinstance(child, SyncBatchNorm):
            # As above: the layer stays the same object.
            child.__class__ = _class_of(child, SyncBatchNorm)
        if isinstance(child, SyncBatchNorm):
            child.communicator = communicator
            count += 1
        else:
            count += synchronise_batchnorm(model.get_submodule(name), communicator)
    return count
