"""The CIFAR-10 network of the airbench paper, whose whitening filters are computed from the data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distrain.data.base import Images
from distrain.errors import ConfigError
from distrain.models.airbench import AirbenchCNN, Block, Whitening
from distrain.models.base import DataDependentInit
from tests.data.helpers import random_images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def network(**changes: Any) -> AirbenchCNN:
    options = {"image_size": (32, 32), "widths": [64, 256, 256], "batchnorm_momentum": 0.4, "scale": 1 / 9}
    return AirbenchCNN(in_channels=3, num_classes=10, **{**options, **changes})


def smooth_images(count: int) -> Images:
    """Neighbouring pixels and channels are correlated, as in photographs."""
    images = random_images(count, height=20, width=20)
    blurred = F.avg_pool2d(images.images.float(), 3, stride=1)
    return dataclasses.replace(images, images=(blurred + blurred.mean(1, keepdim=True)).div(2).byte())


def test_layers_and_parameter_count_are_those_of_the_paper() -> None:
    model = network()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_972_792
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    scales = {f"block{block}.norm{norm}.weight" for block in (1, 2, 3) for norm in (1, 2)}
    assert frozen == {"whitening.conv.weight", *scales}


def test_whitened_patches_are_uncorrelated_with_variance_one() -> None:
    images = smooth_images(300)
    layer = Whitening(3)
    layer.fit(images, MEAN, STD)
    pixels = images.images.double() / 255
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    out = F.conv2d(normalised, layer.conv.weight.detach().double()).transpose(0, 1).flatten(1)
    assert out[12:].equal(-out[:12])
    moments = out[:12] @ out[:12].T / out.shape[1]
    # Below 1 where an eigenvalue is not much larger than the constant that is added to it.
    torch.testing.assert_close(moments, moments.diag().diag(), atol=1e-4, rtol=0)
    assert moments.diag().min() > 0.5
    assert moments.diag().max() < 1.0001


def test_whitening_filters_do_not_depend_on_the_order_of_images() -> None:
    images, layers = smooth_images(400), [Whitening(3), Whitening(3)]
    layers[0].fit(images, MEAN, STD)
    layers[1].fit(images.subset(torch.arange(399, -1, -1)), MEAN, STD)
    assert layers[0].conv.weight.equal(layers[1].conv.weight)


def test_convolutions_are_initialised_as_the_identity() -> None:
    block, images = Block(4, 6, 0.4), torch.randn(2, 4, 8, 8)
    assert block.conv1(images)[:, :4].equal(images)
    assert block.norm1.momentum == 0.4


def test_data_dependent_initialisation_is_recognised_by_its_method() -> None:
    assert isinstance(network(), DataDependentInit)
    assert not isinstance(Block(3, 3, 0.4), DataDependentInit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (8, 32)}, "model.widths=[64, 256, 256]: needs images of at least 9x9 pixels"),
        ({"widths": []}, "model.widths=[]: needs at least one block"),
    ],
)
def test_images_that_are_too_small_and_an_empty_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        network(**changes)
    assert message in str(caught.value)
