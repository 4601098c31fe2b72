"""Small models that are no sequence, one for each way in which real ones differ from a sequence."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


class Residual(nn.Module):
    """A block with a projection in its shortcut where the shape changes, and an activation in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, stride), norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs), norm(outputs)
        self.act = nn.ReLU(inplace=True)
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.project is None else self.project(x)
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        out += shortcut
        y: Tensor = self.act(out)
        return y


class ResNet(nn.Module):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(in_channels, 4), norm(4)
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8))
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = self.layer2(self.layer1(x))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class ScaledInTraining(nn.Module):
    """Scales what is between its layers, and only in training mode."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.first, self.second = conv(in_channels, 4), conv(4, 4)
        self.scale = nn.Parameter(torch.full((), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y: Tensor = self.second(x * self.scale if self.training else x + 0 * self.scale)
        return y


class LooksAtMode(nn.Module):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = ScaledInTraining(in_channels), nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean((2, 3)))
        return y


class DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm, self.conv = norm(inputs), conv(inputs, 4)

    def forward(self, features: list[Tensor]) -> Tensor:
        y: Tensor = self.conv(F.relu(self.norm(torch.cat(features, 1))))
        return y


class DenseNet(nn.Module):
    """Each layer gets the results of all before it, in a list that grows."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = conv(in_channels, 4)
        self.layers = nn.ModuleList(DenseLayer(4 * count) for count in range(1, 5))
        self.head = nn.Linear(20, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = torch.cat(features, 1)
        y: Tensor = self.head(F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))
        return y


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.up(F.silu(self.down(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class InvertedResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(channels, 2 * channels, 1), norm(2 * channels)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.excite, self.project = SqueezeExcite(2 * channels), nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        expanded = F.silu(self.depthwise(F.silu(self.norm1(self.expand(x)))))
        y: Tensor = x + self.project(self.excite(expanded))
        return y


class EfficientNet(nn.Module):
    """Stochastic depth of rate 0, as a function that looks at the mode."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = conv(in_channels, 4, 2)
        self.blocks = nn.Sequential(*(InvertedResidual(4) for _ in range(3)))
        self.classifier = nn.Linear(4, num_classes)
        self.rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x)).mean((2, 3))
        if self.rate and self.training:
            x = F.dropout(x, self.rate)
        y: Tensor = self.classifier(x)
        return y


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.project(x.transpose(1, 2).reshape(n, tokens, width))
        return y


class EncoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """A class token expanded to the batch, position embeddings, a check, and rotations computed from positions."""

    turns: Tensor

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, 8, 4, 4)
        self.class_token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(EncoderBlock(8) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, num_classes)
        self.register_buffer("turns", torch.linspace(0.1, 1, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        torch._assert(h == 8 and w == 8, "wrong size")
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], 1) + self.positions
        # The same for each batch, without a batch dimension, and used by all blocks.
        turn = torch.cos(torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] * self.turns)
        for block in self.blocks:
            x = block(x * turn)
        y: Tensor = self.head(self.norm(x)[:, 0])
        return y


class UNet(nn.Module):
    """Skips that pass over several stages; the pooled output is what is classified."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.enter = conv(in_channels, 4)
        self.down1, self.down2 = conv(4, 8), conv(8, 8)
        self.up1, self.up2 = nn.ConvTranspose2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.join1, self.join2 = conv(16, 8), conv(8, 4)
        self.exit = nn.Conv2d(4, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.enter(x))
        second = F.relu(self.down1(F.max_pool2d(first, 2)))
        x = F.relu(self.down2(F.max_pool2d(second, 2)))
        x = F.relu(self.join1(torch.cat([second, self.up1(x)], dim=1)))
        x = F.relu(self.join2(torch.cat([first, self.up2(x)], dim=1)))
        y: Tensor = self.exit(x).mean((2, 3))
        return y


class ModeDependent(nn.Module):
    """Does other things in training than in evaluation, and keeps a layer in evaluation mode."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.first, self.frozen_norm = conv(in_channels, 4), nn.BatchNorm2d(4)
        self.second, self.third = conv(4, 4), conv(4, 4)
        self.head, self.auxiliary = nn.Linear(4, num_classes), nn.Linear(4, num_classes)

    def train(self, mode: bool = True) -> ModeDependent:
        super().train(mode)
        self.frozen_norm.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.frozen_norm(self.first(x)))
        if self.training:
            x = x * 1.5
        x = F.relu(self.second(x))
        between = x.mean((2, 3))
        x = self.third(x).mean((2, 3))
        if not self.training:
            return self.head(x)
        return {"logits": self.head(x) + 0.1 * self.auxiliary(between)}


class SharedTwice(nn.Module):
    """One submodule is called twice, one weight is used twice, one is not used at all, and one has no gradient."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = conv(in_channels, 4)
        self.shared = nn.Sequential(conv(4, 4), nn.ReLU())
        self.middle, self.unused = Residual(4, 4), nn.Linear(3, 3)
        self.tied1, self.tied2 = conv(4, 4), conv(4, 4)
        self.tied2.weight = self.tied1.weight
        self.fixed = conv(4, 4)
        self.last = conv(4, 4)
        self.head = nn.Linear(4, num_classes)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.stem(x)).tanh())
        x = self.middle(x)
        x = self.tied2(self.tied1(x).tanh())
        with torch.no_grad():
            gate = self.fixed(x).sigmoid()
        x = x.clone()
        x[:, :2] *= gate[:, :2]
        y: Tensor = self.head(F.relu(self.last(x)).flatten(2).mean(2))
        return y


class Decides(nn.Module):
    """Decides by a value; it is run as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        # A parameter's value, since that of a batch depends on how it is divided.
        return y if self.inner.weight.sum() > 0 else -y


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * gradients[0]


class Unseen(Decides):
    """Uses what torch's functions don't show."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Doubled.apply(self.inner(x))  # type: ignore[no-untyped-call]
        return y


class Counts(Decides):
    """Changes a buffer and an attribute of its own."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.last = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.last = random.Random(0).random()
        self.calls += self.training
        y: Tensor = self.inner(x)
        return y * 1


class Remembers(Decides):
    """Changes what its attributes hold: a tensor in a dictionary, and a number in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[str, Tensor] = {"mean": torch.zeros(())}
        self.counts = [[0]]

    def forward(self, x: Tensor) -> Tensor:
        self.means["mean"] = self.inner.weight.detach().mean()
        self.counts[0][0] += 1
        y: Tensor = self.inner(x)
        return y + self.means["mean"]


class WithWholes(nn.Module):
    """Submodules that can't be traced, between ones that can."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem, self.decides = conv(in_channels, 4), Decides()
        self.unseen, self.counts, self.remembers = Unseen(), Counts(), Remembers()
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unseen(self.decides(self.stem(x)))
        y: Tensor = self.head(self.remembers(self.counts(x)).mean((2, 3)))
        return y


class Wrapped(nn.Module):
    """A model in a model, with a sequence whose own forward does more; blocks of two inputs and two outputs."""

    class Trunk(nn.Sequential):
        def forward(self, input: Any) -> Any:
            for block in self:
                input = block(*input)
            return input

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = conv(4, 4), conv(4, 4)

        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(left) + right, self.right(right.relu())

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = conv(in_channels, 8)
        self.trunk = self.Trunk(*(self.Pair() for _ in range(3)))
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.trunk(self.stem(x).chunk(2, dim=1))
        y: Tensor = self.head((left * right).mean((2, 3)))
        return y


class Refused(nn.Module):
    """Can't be traced, or not be cut, in one of several ways."""

    def __init__(self, in_channels: int, num_classes: int, kind: str) -> None:
        super().__init__()
        self.kind, self.steps = kind, 0
        self.first, self.second = conv(in_channels, 4), conv(4, 4)
        self.third, self.head = WithWholes(4, 4), nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Any:  # of Refused
        x = self.first(x)
        if self.kind == "values" and x.sum() > 0:
            x = -x
        if self.kind == "item":
            x = x * x.mean().item()
        if self.kind == "attribute":
            self.steps += 1
        if self.kind == "function":
            x = Doubled.apply(x)  # type: ignore[no-untyped-call]
        if self.kind == "draws":
            x = x * random.random()
        if self.kind == "samples" and len(x) > 2:
            x = x * 2
        if self.kind == "root":
            x = x * len(x) ** 0.5
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = (x @ x).float()
        if self.kind == "mean":
            x = x - x.mean(0, keepdim=True) + 0 * self.first.weight.sum()
        x = self.second(x)
        y: Tensor = self.head(self.third(x))
        if self.kind == "heads" and self.training:
            return {"layers": (x, y), "auxiliary": x.mean((2, 3)), "logits": y}
        return y


MODELS: dict[str, type[nn.Module]] = {
    "resnet": ResNet,
    "densenet": DenseNet,
    "efficientnet": EfficientNet,
    "vit": ViT,
    "unet": UNet,
    "mode": ModeDependent,
    "shared": SharedTwice,
    "wholes": WithWholes,
    "wrapped": Wrapped,
}


def build(in_channels: int, num_classes: int, kind: str) -> nn.Module:
    if kind not in MODELS:
        return Refused(in_channels, num_classes, kind)
    return MODELS[kind](in_channels, num_classes)
