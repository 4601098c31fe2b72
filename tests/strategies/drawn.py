"""Draws small networks with the peculiarities of real ones, each determined by a number."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 4


class InPlaceResidual(nn.Module):
    """Adds to its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x += self.conv(x.clone()).tanh()
        return x


class WithGaps(nn.Module):
    """Mixes channels by a weight that is a part of a larger tensor."""

    def __init__(self, part: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(part(torch.randn(shape) / 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ncij,cd->ndij", x, self.weight)


class Scale(nn.Module):
    """Multiplies by a buffer, which may be expanded, of whole numbers or truth values."""

    def __init__(self, buffer: Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("factor", buffer, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor
        assert isinstance(factor, Tensor)
        return x * (factor.real if factor.is_complex() else factor).view(1, -1, 1, 1)


class RunningMean(nn.Module):
    """Subtracts a mean over steps that it keeps in a buffer, replaced by a new one or changed in place."""

    mean: Tensor

    def __init__(self, *, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("mean", torch.zeros(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.mean.view(1, -1, 1, 1)
        if self.training and len(x):
            mean = x.detach().mean((0, 2, 3))
            if self.replaces:
                self.mean = 0.9 * self.mean + 0.1 * mean.to(self.mean.dtype)
            else:
                self.mean = self.mean.lerp(mean.to(self.mean.dtype), 0.1)
        return y


class Counter(nn.Module):
    """Counts forward passes in a buffer and changes nothing else."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x * 1


class ExtraState(nn.Module):
    """Has state that is no tensor."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return x

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Twice(nn.Module):
    """Uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x).tanh())
        return y


class Unused(Twice):
    """Has a parameter that it does not use, and one behind a detach()."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.randn(3))
        self.detached = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.detached.detach().view(1, -1, 1, 1)


class Expanded(nn.Module):
    """Has a parameter whose elements are one and the same."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1).expand(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.view(1, -1, 1, 1)


class Complex(nn.Module):
    """Multiplies spectra by a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * self.weight.view(1, -1, 1, 1), s=x.shape[-2:])
        return y


class Views(nn.Module):
    """Shuffles channels by views, and hands over a view."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).flip(1)[:, :c]


class NoGradient(nn.Module):
    """Computes a part of its output without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.conv(x).sigmoid()
        y: Tensor = x * gate
        return y


class Split(nn.Module):
    """Hands over two tensors, and perhaps a mask."""

    def __init__(self, container: type, *, masks: bool) -> None:
        super().__init__()
        self.conv, self.container, self.masks = nn.Conv2d(CHANNELS, CHANNELS, 1), container, masks

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.container((y, x > 0 if self.masks else x))


class Join(nn.Module):
    def forward(self, parts: Any) -> Tensor:
        joined: Tensor = parts[0] * parts[1]
        return joined


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class ChangesItsInput(nn.Module):
    """Normalises the images in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5).div_(2.0)


class Squeeze(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze()


class Nothing(nn.Module):
    """Returns no tensor."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": x}


class Float16(nn.Module):
    """Has parameters of another type than the rest."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(CHANNELS, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.view(1, -1, 1, 1).to(x.dtype)


class Checkpointed(Twice):
    """Computes its forward pass again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


def conv() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def channels_last(module: nn.Conv2d) -> nn.Module:
    module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return module


#: Blocks from [N, 4, H, W] to the same shape. Some can't be trained, or not equally on several ranks.
BLOCKS: dict[str, Callable[[], list[nn.Module]]] = {
    "conv": lambda: [conv()],
    "channels-last weight": lambda: [channels_last(conv())],
    "depthwise": lambda: [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)],
    "frozen": lambda: [frozen(conv())],
    "frozen norm": lambda: [frozen(nn.GroupNorm(2, CHANNELS))],
    "relu": lambda: [nn.ReLU()],
    "relu in place": lambda: [nn.ReLU(inplace=True)],
    "leaky in place": lambda: [nn.LeakyReLU(0.2, inplace=True)],
    "gelu": lambda: [nn.GELU()],
    "silu in place": lambda: [nn.SiLU(inplace=True)],
    "one activation twice": lambda: [act := nn.Tanh(), conv(), act],
    "residual in place": lambda: [nn.Identity(), InPlaceResidual()],
    "sequence": lambda: [nn.Sequential(conv(), nn.Tanh(), conv())],
    "twice": lambda: [Twice()],
    "tied": lambda: [*_tied()],
    "unused": lambda: [Unused()],
    "columns of a tensor": lambda: [WithGaps(lambda t: t[:, ::2], (CHANNELS, 2 * CHANNELS))],
    "transposed": lambda: [WithGaps(lambda t: t.t(), (CHANNELS, CHANNELS))],
    "rows of a tensor": lambda: [WithGaps(lambda t: t[1 : 1 + CHANNELS, :CHANNELS], (CHANNELS + 2, CHANNELS + 3))],
    "expanded": lambda: [Expanded()],
    "complex": lambda: [Complex()],
    "group norm": lambda: [nn.GroupNorm(2, CHANNELS)],
    "batch norm": lambda: [nn.BatchNorm2d(CHANNELS)],
    "batch norm without statistics": lambda: [nn.BatchNorm2d(CHANNELS, track_running_stats=False)],
    "instance norm": lambda: [nn.InstanceNorm2d(CHANNELS, affine=True)],
    "old weight norm": lambda: [nn.utils.weight_norm(conv())],
    "weight norm": lambda: [nn.utils.parametrizations.weight_norm(conv())],
    "spectral norm": lambda: [nn.utils.parametrizations.spectral_norm(conv())],
    "scale": lambda: [Scale(torch.linspace(0.5, 1.5, CHANNELS))],
    "expanded buffer": lambda: [Scale(torch.full((1,), 0.9).expand(CHANNELS))],
    "integer buffer": lambda: [Scale(torch.arange(1, CHANNELS + 1))],
    "boolean buffer": lambda: [Scale(torch.arange(CHANNELS) > 0, persistent=False)],
    "complex buffer": lambda: [Scale(torch.polar(torch.ones(CHANNELS), torch.arange(CHANNELS) / 3), persistent=False)],
    "replaced buffer": lambda: [RunningMean(replaces=True)],
    "buffer of samples": lambda: [RunningMean(replaces=False)],
    "counter": lambda: [Counter()],
    "plain extra state": lambda: [ExtraState({"calls": [1, 2]})],
    "extra state of tensors": lambda: [ExtraState(torch.arange(3.0))],
    "extra state that can't be saved": lambda: [ExtraState(object())],
    "views": lambda: [Views()],
    "identity": lambda: [nn.Identity()],
    "no gradient": lambda: [NoGradient()],
    "two tensors": lambda: [Split(tuple, masks=False), Join()],
    "list of two": lambda: [Split(list, masks=False), Join()],
    "tensor and mask": lambda: [Split(tuple, masks=True), Join()],
    "dropout": lambda: [nn.Dropout(0.3)],
    "noise": lambda: [Noise()],
    "half": lambda: [Float16(torch.float16)],
    "double": lambda: [Float16(torch.float64)],
    "checkpointed": lambda: [Checkpointed()],
    "pooling": lambda: [nn.AvgPool2d(3, stride=1, padding=1)],
}
#: Ways to logits.
HEADS: dict[str, Callable[[int], list[nn.Module]]] = {
    "linear": lambda classes: [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, classes)],
    "two layers": lambda classes: [
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 6), nn.ReLU(inplace=True), nn.Linear(6, classes)
    ],
    "norm of vectors": lambda classes: [
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, classes)
    ],
    "squeezed": lambda classes: [nn.Conv2d(CHANNELS, classes, 3), nn.AdaptiveAvgPool2d(1), Squeeze()],
    "frozen": lambda classes: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), frozen(nn.Linear(CHANNELS, classes))],
    "no tensor": lambda classes: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, classes), Nothing()],
}  # fmt: skip
_USUAL_HEADS = ("linear", "two layers")
#: Parts that can't be equal to one process where a batch is divided among ranks, and further ones where a rank runs its
#: share in several passes.
UNEQUAL_ON_RANKS = {"dropout", "noise", "replaced buffer", "buffer of samples"}
UNEQUAL_IN_PASSES = UNEQUAL_ON_RANKS | {
    "batch norm", "batch norm without statistics", "norm of vectors", "spectral norm", "counter"
}  # fmt: skip


def _tied() -> list[nn.Module]:
    first, second = conv(), conv()
    second.weight = first.weight
    return [first, nn.Tanh(), second]


def names(seed: int) -> tuple[list[str], str]:
    """What the network of this number is made of: its blocks and its head."""
    draw = random.Random(seed)
    blocks = [draw.choice(list(BLOCKS)) for _ in range(draw.randint(2, 5))]
    # Few networks with a head that is refused, so that most reach training.
    head = draw.choice(_USUAL_HEADS) if draw.random() < 0.85 else draw.choice(list(HEADS))
    return blocks, head


def model(in_channels: int, num_classes: int, seed: int) -> nn.Module:
    """The network of this number, with parameters from torch's global generator."""
    blocks, head = names(seed)
    draw = random.Random(-seed - 1)
    parts: list[nn.Module] = [ChangesItsInput()] if draw.random() < 0.1 else []
    parts.append(nn.Conv2d(in_channels, CHANNELS, 3, padding=1))
    for name in blocks:
        parts.extend(BLOCKS[name]())
    network = nn.Sequential(*parts, *HEADS[head](num_classes))
    if draw.random() < 0.05:
        network.requires_grad_(False)
    return network


def loss_sum(outputs: Tensor | dict[str, Tensor], targets: Tensor) -> Tensor:
    """What the runs minimise, summed over the samples."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    return F.cross_entropy(logits, targets, reduction="sum")
