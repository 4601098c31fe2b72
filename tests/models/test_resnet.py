"""Residual networks have the published sizes and strides in all variants, and can be trained."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distrain.models.resnet import BasicBlock, Bottleneck, ResNet, ResNet18, ResNet34, ResNet50, ResNetConfig
from distrain.models.trial import ModelTrial
from tests.harness import soaked


def make(kind: Any = ResNet18, *, stem: str = "cifar", norm: str = "batch", num_classes: int = 10) -> ResNet:
    model: ResNet = kind(in_channels=3, num_classes=num_classes, stem=stem, norm=norm)
    return model


@pytest.mark.parametrize(("kind", "count"), [(ResNet18, 11_689_512), (ResNet34, 21_797_672), (ResNet50, 25_557_032)])
def test_parameter_counts_are_the_published_ones(kind: type[ResNet], count: int) -> None:
    with torch.device("meta"):
        model = make(kind, stem="imagenet", num_classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("kind", "depths"), [(ResNet18, (2, 2, 2, 2)), (ResNet34, (3, 4, 6, 3)), (ResNet50, (3, 4, 6, 3))]
)
def test_every_residual_block_is_a_block_of_the_sequence(kind: type[ResNet], depths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        names = [name for name, _ in make(kind).named_children()]
    blocks = [f"layer{layer}_{index}" for layer, depth in enumerate(depths, start=1) for index in range(depth)]
    assert names == ["stem", *blocks, "head"]


@pytest.mark.parametrize(("stem", "sides"), [("cifar", (64, 32, 16, 8)), ("imagenet", (16, 8, 4, 2))])
@pytest.mark.parametrize("kind", [ResNet18, ResNet50])
def test_each_layer_except_the_first_halves_the_image(kind: type[ResNet], stem: str, sides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model, images = make(kind, stem=stem), torch.zeros(2, 3, 64, 64)
    layer_sides = {}
    for name, block in model.named_children():
        images = block(images)
        if name.startswith("layer"):
            layer_sides[name[:6]] = images.shape[-1]
    assert tuple(layer_sides.values()) == sides
    assert images.shape == (2, 10)


def test_a_bottleneck_has_its_stride_in_the_3x3_convolution() -> None:
    block = Bottleneck(256, 128, 2, "batch")
    assert [block.conv1.stride, block.conv2.stride, block.conv3.stride] == [(1, 1), (2, 2), (1, 1)]


def test_initial_weights_keep_the_scale_of_gradients() -> None:
    torch.manual_seed(0)
    weights = [module.weight for module in make(stem="imagenet").modules() if isinstance(module, nn.Conv2d)]
    for weight in weights:
        fan_out = weight[:, 0].numel()
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_each_convolution_has_a_normalisation_or_a_bias(norm: str) -> None:
    with torch.device("meta"):
        modules = list(make(ResNet50, norm=norm).modules())
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    kind = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "none": nn.Identity}[norm]
    assert all((conv.bias is not None) == (norm == "none") for conv in convolutions)
    if norm != "none":
        assert sum(isinstance(module, kind) for module in modules) == len(convolutions)
    assert all(module.num_groups == 32 for module in modules if isinstance(module, nn.GroupNorm))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_without_normalisation_a_block_starts_as_its_shortcut(block: type[BasicBlock | Bottleneck]) -> None:
    torch.manual_seed(0)
    model = ResNet(block, (1, 1), in_channels=3, num_classes=10, stem="cifar", norm="none")
    residual = model[2]
    images = torch.randn(2, residual.conv1.in_channels, 8, 8)
    out = residual(images)
    assert torch.equal(out, torch.relu(residual.shortcut(images)))
    out.sum().backward()
    last = residual.conv2 if block is BasicBlock else residual.conv3
    assert last.weight.grad.any(), "the residual branch must receive a gradient"


@pytest.mark.parametrize("norm", ["group", "none"])
def test_logits_do_not_depend_on_other_samples_without_batchnorm(norm: str) -> None:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1), in_channels=3, num_classes=10, stem="cifar", norm=norm).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    soaked(
        itertools.product(["resnet18", "resnet34", "resnet50"], ["cifar", "imagenet"], ["batch", "group", "none"]),
        [("resnet18", "cifar", "batch"), ("resnet18", "imagenet", "none"), ("resnet50", "imagenet", "group")],
    ),
    ids=str,
)
def test_the_model_check_accepts_8x8_digits(case: tuple[str, str, str]) -> None:
    name, stem, norm = case
    target = f"distrain.models.resnet.ResNet{name.removeprefix('resnet')}"
    config = ResNetConfig(name=name, _target_=target, stem=stem, norm=norm)
    ModelTrial(config, in_channels=1, num_classes=10, image_size=(8, 8))


#: What a step is tried with: norm, block, number format, layout.
STEPS = list(
    itertools.product(
        ["batch", "group", "none"],
        [BasicBlock, Bottleneck],
        [torch.float32, torch.float64],
        [torch.contiguous_format, torch.channels_last],
    )
)


@pytest.mark.parametrize("case", soaked(STEPS, STEPS[::5]), ids=str)
def test_a_training_step_lowers_the_loss(
    case: tuple[str, type[BasicBlock | Bottleneck], torch.dtype, torch.memory_format],
) -> None:
    norm, block, dtype, layout = case
    torch.manual_seed(0)
    model = ResNet(block, (1, 1), in_channels=3, num_classes=10, stem="cifar", norm=norm)
    model = model.to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.rand(6, 3, 12, 12, dtype=dtype).contiguous(memory_format=layout)
    labels = torch.arange(6)
    before = F.cross_entropy(model(images), labels)
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    after = F.cross_entropy(model(images), labels)
    assert after.dtype == dtype
    assert after < before


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_an_empty_batch_gives_zero_gradients(stem: str, norm: str) -> None:
    model = ResNet(BasicBlock, (1, 1), in_channels=3, num_classes=10, stem=stem, norm=norm)
    logits = model(torch.zeros(0, 3, 16, 16))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
