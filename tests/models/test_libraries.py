"""Networks of torchvision, timm and transformers can be trained as they are; skipped where a library is missing."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from distrain.models.build import CustomConfig
from distrain.models.trial import ModelTrial

TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
TINY_VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
#: Path, side of the images, further arguments.
NETWORKS: list[tuple[str, int, dict[str, Any]]] = [
    ("torchvision.models.resnet18", 32, {}),
    ("torchvision.models.densenet121", 32, {}),
    ("torchvision.models.efficientnet_b0", 32, {}),
    ("torchvision.models.vit_b_16", 32, {}),
    ("torchvision.models.convnext_tiny", 32, {}),
    ("torchvision.models.get_model", 32, {"name": "mobilenet_v3_small"}),
    ("timm.models.resnet18", 32, {}),
    ("timm.models.vit_tiny_patch16_224", 32, {}),
    ("timm.models.convnext_atto", 32, {}),
    ("timm.create_model", 32, {"model_name": "resnet10t"}),
    ("transformers.ResNetForImageClassification", 16, TINY_RESNET),
    ("transformers.ViTForImageClassification", 32, TINY_VIT),
    (f"{__name__}.resnet_of_transformers", 16, {}),
]


def resnet_of_transformers(classes: int, channels: int) -> nn.Module:
    """A user's factory: it makes the configuration object itself."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.ResNetConfig(num_labels=classes, num_channels=channels, **TINY_RESNET)
    model: nn.Module = transformers.ResNetForImageClassification(config)
    return model


def tried(path: str, side: int, kwargs: dict[str, Any], weight: float = 0.0) -> ModelTrial:
    library = path.partition(".")[0]
    pytest.importorskip("transformers" if library == "tests" else library, exc_type=ImportError)
    config = CustomConfig(name="custom", _target_=path, kwargs=kwargs, auxiliary_weight=weight)
    return ModelTrial(config, in_channels=3, num_classes=5, image_size=(side, side))


@pytest.mark.parametrize(("path", "side", "kwargs"), NETWORKS, ids=[path for path, *_ in NETWORKS])
def test_a_network_is_built_for_the_data_and_can_be_trained(path: str, side: int, kwargs: dict[str, Any]) -> None:
    trial = tried(path, side, kwargs)
    assert (trial.unused, trial.ignored_outputs) == ([], [])


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_auxiliary_heads_are_trained_by_their_weight(weight: float) -> None:
    trial = tried("torchvision.models.googlenet", 32, {"init_weights": False}, weight)
    assert trial.auxiliary_outputs == ([] if weight else ["aux_logits2", "aux_logits1"])
    assert {name.partition(".")[0] for name in trial.unused} == (set() if weight else {"aux1", "aux2"})
