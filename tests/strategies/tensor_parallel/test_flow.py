"""Which layers can be divided is found by following activations, and anything that mixes channels keeps them whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.models.base import BlockSequence
from distrain.models.cnn import CifarCNN, SimpleCNN
from distrain.models.resnet import ResNet18
from distrain.strategies.precision import Precision
from distrain.strategies.tensor_parallel import plan
from distrain.strategies.tensor_parallel.layers import Division
from distrain.strategies.tensor_parallel.options import TensorParallelConfig
from tests.strategies.tensor_parallel import models


def found(model: nn.Module, ranks: int = 2, side: int = 8, named: dict[str, str] | None = None) -> dict[str, Division]:
    keys = TensorParallelConfig(name="tensor_parallel", plan=named or {})
    precision = Precision("fp32", torch.device("cpu"))
    return plan.find_divisions(model, torch.randn(2, 3, side, side), precision, keys, ranks, auxiliary=False)


def roles(divisions: dict[str, Division]) -> dict[str, str]:
    return {name: division.role for name, division in divisions.items()}


def test_layers_of_distrains_models_are_divided_in_pairs() -> None:
    assert roles(found(CifarCNN(3, 10, (32, 32)), side=32)) == {
        "block1.conv": "column",
        "block2.conv": "row",
        "block3.conv": "column",
        "dense.linear": "row",
    }
    assert roles(found(SimpleCNN(3, 10, (8, 8)))) == {
        "block1.conv": "column",
        "block2.conv": "row",
        "dense.linear": "column",
        "output": "row",
    }
    resnet = found(ResNet18(3, 10, "cifar", "group"), ranks=3)
    blocks = [f"layer{layer}_{index}" for layer in range(1, 5) for index in range(2)]
    layers = {"conv1": "column", "norm1": "channels", "conv2": "row"}
    assert roles(resnet) == {f"{block}.{name}": role for block in blocks for name, role in layers.items()}
    # 64 channels in 32 groups, which stay whole.
    assert {resnet[f"layer1_0.{name}"].blocks for name in layers} == {32}


def test_attention_mlp_grouped_convolutions_and_dropout_are_divided() -> None:
    vit = found(models.ViT(3, 4))
    assert roles(vit) == {
        f"blocks.{index}.{name}": role
        for index in range(2)
        for name, role in (("attn", "attention"), ("mlp.fc1", "column"), ("mlp.drop1", "channels"), ("mlp.fc2", "row"))
    }
    assert (vit["blocks.0.attn"].blocks, vit["blocks.0.mlp.drop1"].blocks) == (5, 23)
    grouped = found(models.GroupedNet(3, 4))
    inner = ("expand_norm", "depthwise", "depthwise_norm", "grouped", "drop")
    expected = {"expand": "column", **dict.fromkeys(inner, "channels"), "project": "row"}
    assert {name: role for name, role in roles(grouped).items() if name in expected} == expected
    assert {grouped[name].blocks for name in expected} == {5}
    assert roles(found(models.Encoder(3, 4)))["second.self_attn"] == "attention"
    # More ranks than heads: the MLP alone.
    assert "blocks.0.attn" not in found(models.ViT(3, 4), ranks=6)
    assert list(found(models.ViT(3, 4), named={"blocks.0": "replicated", "*.attn": "replicated"})) == [
        "blocks.1.mlp.fc1",
        "blocks.1.mlp.drop1",
        "blocks.1.mlp.fc2",
    ]


class Between(BlockSequence):
    """Two layers that could be divided, and something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__(
            {
                "flat": nn.Flatten(),
                "first": nn.Linear(192, 8),
                "between": between,
                "second": nn.Linear(8, 4),
            }
        )


class Does(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.scale = what, nn.Parameter(torch.ones(8))
        self.inner, self.fixed = nn.Identity(), torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, 8]`` to ``[N, 8]``."""
        x = self.inner(x)
        whats = {
            "residual": lambda: x + torch.ones_like(x[:, :1]) * x.sum(1, keepdim=True),
            "parameter": lambda: x * self.scale,
            "fixed": lambda: x * self.fixed,
            "dropout": lambda: F.dropout(x, 0.5, self.training),
            "softmax": lambda: x.softmax(1),
            "sizes": lambda: x.reshape(-1, 8),
            "part": lambda: torch.cat([x[:, 4:], x[:, :4]], 1),
            "training": lambda: x if self.training else x - x.mean(1, keepdim=True),
            "nothing": lambda: x.clamp(min=0) * 2 + 1,
        }
        y: Tensor = whats[self.what]()
        return y


@pytest.mark.parametrize(
    "what", ["residual", "parameter", "fixed", "dropout", "softmax", "sizes", "part", "training", "nothing"]
)
def test_what_mixes_channels_keeps_layers_whole(what: str) -> None:
    model = Between(Does(what))
    keys = TensorParallelConfig(name="tensor_parallel", plan={})
    images, precision = torch.randn(2, 3, 8, 8), Precision("fp32", torch.device("cpu"))
    if what == "nothing":
        assert roles(found(model)) == {"first": "column", "second": "row"}
        return
    with pytest.raises(ValueError, match=r"no layer of Between was found that 2 ranks can divide"):
        plan.find_divisions(model, images, precision, keys, 2, auxiliary=False)


class Swish(nn.Module):
    """An activation function of a class of its own."""

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, 8]`` to ``[N, 8]``; with a dimension, numbers along it depend on each other."""
        return x * (x.sigmoid() if self.dim is None else x.softmax(self.dim))


class Normalised(nn.BatchNorm1d):
    """A norm of a class of its own, with more behind it."""

    def __init__(self, dim: int | None = None) -> None:
        super().__init__(8)
        self.act = Swish(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, 8]`` to ``[N, 8]``."""
        y: Tensor = self.act(super().forward(x))
        return y


@pytest.mark.parametrize("kind", [Swish, Normalised])
def test_modules_of_other_classes_are_tried(kind: type[Swish] | type[Normalised]) -> None:
    apart = roles(found(Between(kind())))
    assert (apart["first"], apart.get("between"), apart["second"]) == (
        "column",
        "channels" if kind is Normalised else None,
        "row",
    )
    with pytest.raises(ValueError, match="no layer"):
        found(Between(kind(1)))


def test_a_plan_names_no_layers_that_share_a_parameter() -> None:
    model = Between(nn.Linear(8, 8))
    model.get_submodule("between").register_parameter("bias", model.get_parameter("first.bias"))
    keys = TensorParallelConfig(name="tensor_parallel", plan={"first": "column"})
    with pytest.raises(
        ValueError, match=r"plan\.first=column: first shares a parameter: first\.bias and between\.bias"
    ):
        plan.check_patterns(keys, model)


def test_layers_that_are_used_elsewhere_too_stay_whole() -> None:
    tied, hooked, first_hooked, twice = (Between(nn.ReLU()) for _ in range(4))
    first_hooked.get_submodule("first").register_forward_hook(lambda *_: None)
    tied.add_module("third", nn.Linear(4, 8))
    tied.add_module("fourth", nn.Linear(8, 4))
    tied.get_submodule("fourth").register_parameter("weight", tied.get_parameter("second.weight"))
    hooked.get_submodule("second").register_forward_hook(lambda *_: None)
    twice.get_submodule("between").add_module("again", nn.Identity())
    twice.add_module("last", nn.Sequential(nn.Linear(4, 8), twice.get_submodule("second")))
    for model in (tied, hooked, first_hooked, twice):
        with pytest.raises(ValueError, match="no layer"):
            found(model)


def test_a_line_says_what_is_divided() -> None:
    model = models.ViT(3, 4)
    line = plan.describe(model, found(model), 2)
    assert line.startswith("2 ranks divide 12 of 20 layers, with 79% of the parameters, and run the same batches; ")
    assert line.endswith("whole on each rank: ViT, patch_embed, blocks.0.norm1, blocks.0.norm2 and 4 more")
