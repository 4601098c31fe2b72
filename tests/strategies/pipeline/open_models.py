"""Models of torchvision and timm, small, and without what draws random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.strategies.pipeline import traced_models

#: Options of all models but those in ``OPTIONS``.
SMALL = ("data.height=32", "data.width=32")
#: EfficientNets with SiLU amplify rounding: in images of 32 pixels their last BatchNorm layers see 7 to 10 values a
#: channel. In one process, after ten steps at a rate of 0.01, parameters that began 1e-16 apart are 3e-5 apart. With
#: images of 64 pixels and a rate of 1e-4 they are 5e-15 apart, so orders of additions can be compared.
OPTIONS = dict.fromkeys(
    ("tv_efficientnet", "timm_efficientnet"), ("data.height=64", "data.width=64", "optimizer.lr=1e-4")
)
#: Added to the variances of EfficientNet-Lite's BatchNorm layers. With its own 1e-5 and random initial parameters, this
#: network of ReLU6 amplifies 1e-16 to more than 1e-3 at any size and rate that was tried: no two orders of additions
#: could be compared.
EPS = 1.0


def tv_resnet18(in_channels: int, num_classes: int) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    return model


def tv_densenet(in_channels: int, num_classes: int) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.DenseNet(8, (2, 3, 2), 16, num_classes=num_classes)
    return model


def tv_efficientnet(in_channels: int, num_classes: int) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.efficientnet_b0(
        num_classes=num_classes, stochastic_depth_prob=0.0, dropout=0.0
    )
    return model


def tv_convnext(in_channels: int, num_classes: int) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    model: nn.Module = ConvNeXt(blocks, stochastic_depth_prob=0.0, layer_scale=0.5, num_classes=num_classes)
    return model


def tv_vit(in_channels: int, num_classes: int) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=num_classes)
    # torchvision starts with a head of zeros.
    nn.init.normal_(model.heads[0].weight, std=0.1)  # type: ignore[index, union-attr]
    return model


def tv_swin(in_channels: int, num_classes: int) -> nn.Module:
    from torchvision.models import SwinTransformer

    model: nn.Module = SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=num_classes
    )
    return model


def from_timm(name: str, **options: Any) -> Callable[[int, int], nn.Module]:
    def build(in_channels: int, num_classes: int) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, in_chans=in_channels, num_classes=num_classes, **options)
        return model

    return build


def unet(in_channels: int, num_classes: int) -> nn.Module:
    return traced_models.UNet(in_channels, num_classes)


#: By name, and whether it has BatchNorm.
MODELS: dict[str, tuple[Callable[[int, int], nn.Module], bool]] = {
    "tv_resnet18": (tv_resnet18, True),
    "tv_densenet": (tv_densenet, True),
    "tv_efficientnet": (tv_efficientnet, True),
    "tv_convnext": (tv_convnext, False),
    "tv_vit": (tv_vit, False),
    "tv_swin": (tv_swin, False),
    "timm_resnet": (from_timm("resnet10t"), True),
    "timm_densenet": (from_timm("densenet121", growth_rate=8, block_config=(2, 3, 2)), True),
    "timm_efficientnet": (from_timm("efficientnet_b0", drop_rate=0.0, drop_path_rate=0.0), True),
    "timm_efficientnet_lite": (from_timm("efficientnet_lite0", drop_rate=0.0, drop_path_rate=0.0, bn_eps=EPS), True),
    "timm_convnext": (from_timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), False),
    "timm_vit": (
        from_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=48, num_heads=3), False
    ),
    "unet": (unet, False),
}  # fmt: skip


def build(in_channels: int, num_classes: int, kind: str) -> nn.Module:
    return MODELS[kind][0](in_channels, num_classes)


def options(kind: str) -> tuple[str, ...]:
    """Configuration keys with which a model is trained."""
    return OPTIONS.get(kind, SMALL)
