"""The two small networks have the published layers, sizes and initial values, and train in all formats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrain.config.groups import ModelConfig
from distrain.errors import ConfigError
from distrain.models.cnn import CifarCNN, SimpleCNN
from distrain.models.trial import ModelTrial


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_cifar_cnn_has_the_tutorials_number_of_parameters() -> None:
    assert parameters(CifarCNN(3, 10, (32, 32))) == 122_570


def test_simple_cnn_has_two_convolutions_and_a_dense_layer_of_128() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in SimpleCNN(1, 10, (28, 20)).state_dict().items()}
    assert shapes == {
        "block1.conv.weight": (32, 1, 3, 3),
        "block1.conv.bias": (32,),
        "block2.conv.weight": (64, 32, 3, 3),
        "block2.conv.bias": (64,),
        "dense.linear.weight": (128, 64 * 7 * 5),
        "dense.linear.bias": (128,),
        "output.weight": (10, 128),
        "output.bias": (10,),
    }


def published(model: nn.Module, images: Tensor, padding: int) -> Tensor:
    """The published order of layers: ReLU before pooling."""
    weights = dict(model.named_parameters())
    blocks = sorted(name.removesuffix(".conv.weight") for name in weights if name.endswith("conv.weight"))
    for block in blocks:
        images = F.relu(F.conv2d(images, weights[f"{block}.conv.weight"], weights[f"{block}.conv.bias"], 1, padding))
        images = images if block == "block3" else F.max_pool2d(images, 2)
    dense = F.relu(F.linear(images.flatten(1), weights["dense.linear.weight"], weights["dense.linear.bias"]))
    return F.linear(dense, weights["output.weight"], weights["output.bias"])


@pytest.mark.parametrize(("model", "padding"), [(SimpleCNN(3, 10, (32, 32)), 1), (CifarCNN(3, 10, (32, 32)), 0)])
def test_logits_and_gradients_equal_those_of_the_published_order_of_layers(model: nn.Module, padding: int) -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    actual, expected = model(images), published(model, images, padding)
    assert torch.equal(actual, expected)
    for actual_gradient, expected_gradient in zip(
        torch.autograd.grad(F.cross_entropy(actual, labels), list(model.parameters())),
        torch.autograd.grad(F.cross_entropy(expected, labels), list(model.parameters())),
        strict=True,
    ):
        assert torch.equal(actual_gradient, expected_gradient)


@pytest.mark.parametrize("model", [SimpleCNN(3, 10, (32, 32)), CifarCNN(3, 10, (32, 32))])
def test_initial_weights_are_glorot_uniform_and_biases_zero(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
            continue
        window = parameter[0, 0].numel()  # 9 for a convolution, 1 for a dense layer
        limit = math.sqrt(6 / (window * (parameter.shape[0] + parameter.shape[1])))
        assert 0.97 * limit < parameter.abs().max() <= limit, name


@pytest.mark.parametrize(("name", "target", "side"), [("simple_cnn", "SimpleCNN", 4), ("cifar_cnn", "CifarCNN", 18)])
def test_images_below_the_smallest_size_are_refused(name: str, target: str, side: int) -> None:
    config = ModelConfig(name=name, _target_=f"distrain.models.cnn.{target}")
    ModelTrial(config, in_channels=3, num_classes=10, image_size=(side, side))
    with pytest.raises(ConfigError, match=f"model={name}: needs images of at least {side}x{side} pixels.*{side - 1}"):
        ModelTrial(config, in_channels=3, num_classes=10, image_size=(side, side - 1))


@pytest.mark.parametrize("kind", [SimpleCNN, CifarCNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_training_step_lowers_the_loss(
    kind: type[SimpleCNN | CifarCNN], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = kind(3, 10, (20, 20)).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.rand(6, 3, 20, 20, dtype=dtype).contiguous(memory_format=layout)
    labels = torch.arange(6)
    before = F.cross_entropy(model(images), labels)
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    after = F.cross_entropy(model(images), labels)
    assert after.dtype == dtype
    assert after < before


@pytest.mark.parametrize("kind", [SimpleCNN, CifarCNN])
def test_an_empty_batch_gives_zero_gradients(kind: type[SimpleCNN | CifarCNN]) -> None:
    model = kind(3, 10, (20, 20))
    logits = model(torch.zeros(0, 3, 20, 20))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
