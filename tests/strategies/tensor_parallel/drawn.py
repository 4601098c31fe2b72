"""Draws networks with groups of layers that could be divided, and with what must keep them whole between them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.strategies.drawn import ChangesItsInput
from tests.strategies.tensor_parallel.models import Attention, Mlp


class Does(nn.Module):
    """Applies a function without parameters of its own; it is not looked into unless it has a submodule."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x)
        return y


class NormAct(nn.BatchNorm2d):
    """As timm's: a norm of a class of its own, with an activation function."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x))
        return y


class Mixing(nn.BatchNorm2d):
    """A norm of a class of its own that mixes channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


class Fixed(nn.Module):
    """Multiplies by a tensor that is neither a parameter nor a buffer; a part of one channel fits any number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = torch.linspace(0.5, 1.5, channels, dtype=torch.float64).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Scale(nn.Module):
    """Multiplies by one number for all channels, or by one for each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return y


class Branches(nn.Module):
    """Two layers with the same input, whose results are added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x).relu() + self.second(x).sigmoid()
        return y


class LastNorm(nn.Module):
    """A LayerNorm over channels, which are the last dimension for it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


def hooked(module: nn.Module) -> nn.Module:
    """With a hook that uses all channels."""
    module.register_forward_hook(lambda _, __, output: output - output.mean(1, keepdim=True))
    return module


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def _grouped(channels: int) -> nn.Module:
    return nn.Conv2d(channels, 2 * channels, 1, groups=channels)


#: From [N, C, H, W] with so many channels to the same shape.
BETWEEN: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda c: nn.ReLU(),
    "relu in place": lambda c: nn.ReLU(inplace=True),
    "gelu": lambda c: nn.GELU(),
    "function": lambda c: Does(lambda x: F.silu(x, inplace=True) * 2 + 1),
    "sum of itself": lambda c: Does(lambda x: x + x.relu()),
    "batch norm": nn.BatchNorm2d,
    "batch norm without statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "group norm": lambda c: nn.GroupNorm(c // 2, c),
    "one group": lambda c: nn.GroupNorm(1, c),
    "frozen norm": lambda c: frozen(nn.BatchNorm2d(c)),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "norm with more": NormAct,
    "norm that mixes": Mixing,
    "last norm": LastNorm,
    "depthwise": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c),
    "reflecting": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c // 2, padding_mode="reflect", bias=False),
    "convolution": lambda c: nn.Conv2d(c, c, 3, padding=1),
    "several for each": lambda c: nn.Sequential(_grouped(c), nn.Conv2d(2 * c, c, 1, groups=c)),
    "dropout": lambda c: nn.Dropout(0.3),
    "dropout of channels": lambda c: nn.Dropout2d(0.3),
    "function of dropout": lambda c: Does(lambda x: F.dropout(x, 0.3)),
    "pool": lambda c: nn.AvgPool2d(3, 1, 1),
    "function of a pool": lambda c: Does(lambda x: F.max_pool2d(x, 3, 1, 1)),
    "pool over channels": lambda c: Does(lambda x: F.max_pool2d(x.flatten(2), 3, 1, 1).unflatten(2, x.shape[2:])),
    "prelu": lambda c: nn.PReLU(),
    "prelu of each": nn.PReLU,
    "fixed": Fixed,
    "scale": lambda c: Scale(1),
    "scale of each": Scale,
    "softmax": lambda c: nn.Softmax(1),
    "turned": lambda c: Does(lambda x: x.flip(1)),
    "mean": lambda c: Does(lambda x: x + x.mean((2, 3), keepdim=True)),
    "mean of channels": lambda c: Does(lambda x: x - x.mean(1, keepdim=True)),
    "constant": lambda c: Does(lambda x: x * torch.linspace(1, 2, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)),
    "excited": Excited,
    "branches": Branches,
    "hooked": lambda c: hooked(nn.Identity()),
}  # fmt: skip


class Residual(nn.Module):
    """Adds what some layers make of images."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


class Tokens(nn.Module):
    """Layers of tokens, for images."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return y


def names(seed: int) -> list[list[str]]:
    """What the network of this number has between the first and the last layer of each of its groups."""
    draw = random.Random(seed)
    return [[draw.choice(list(BETWEEN)) for _ in range(draw.randint(0, 3))] for _ in range(draw.randint(1, 3))]


def model(in_channels: int, num_classes: int, seed: int) -> nn.Module:
    """The network of this number, with parameters from torch's global generator."""
    draw = random.Random(-seed - 1)
    width, tied = 4 * draw.randint(1, 3), draw.random() < 0.05
    parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
    for between in names(seed):
        channels = draw.choice([4, 6, 10])
        first, last = nn.Conv2d(width, channels, 1), nn.Conv2d(channels, width, 3, padding=1, bias=draw.random() < 0.5)
        if tied:
            last.bias = parts[0].bias  # type: ignore[assignment]
        if draw.random() < 0.05:
            hooked(first)
        layers = [first, *(BETWEEN[name](channels) for name in between), last]
        parts.append(Residual(*layers) if draw.random() < 0.5 else nn.Sequential(*layers))
        match draw.choice(["", "", "attention", "encoder", "mlp"]):
            case "attention":
                parts.append(Residual(Tokens(Attention(width, draw.choice([1, 2, 4]), 0.1))))
            case "encoder":
                encoder = nn.TransformerEncoderLayer(width, 2, 7, dropout=0.1, batch_first=True)
                parts.append(Tokens(encoder))
            case "mlp":
                parts.append(Residual(Tokens(Mlp(width, 9, 0.1))))
    hidden = draw.choice([0, 5])
    pool = nn.AdaptiveAvgPool2d(2)
    sizes = [4 * width, *([hidden] if hidden else []), num_classes]
    linear = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())][:-1]
    network = nn.Sequential(*parts, pool, nn.Flatten(), *linear)
    if draw.random() < 0.5:
        for module in [each for each in network.modules() if isinstance(each, Does)]:
            module.add_module("inner", nn.Identity())
    if seed % 8 == 0:
        network.insert(0, ChangesItsInput())
    return network
