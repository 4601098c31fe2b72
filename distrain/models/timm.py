"""model=timm: the architectures of timm (PyTorch Image Models), by name.

timm is imported only where such a model is chosen; it needs a torchvision that fits the installed torch.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.models.arguments import keywords
from distrain.models.foreign import ChannelStatistics, ForeignModelConfig


@dataclass
class TimmConfig(ForeignModelConfig):
    """Keys of ``model=timm``."""

    arch: str = setting("Name of the architecture in timm, such as resnet18 or vit_tiny_patch16_224.")
    normalisation: str = setting(
        "How images are normalised. data: by data.mean and data.std, null: measured. model: by the mean and standard "
        "deviation that the architecture's pretrained weights expect.",
        choices=("data", "model"),
        default="data",
    )

    @override
    def identity(self) -> tuple[str, str]:
        return "model.arch", self.arch

    @override
    def target_arguments(self) -> dict[str, Any]:
        return {"arch": self.arch, **self.kwargs}

    @override
    def channel_statistics(self) -> ChannelStatistics | None:
        if self.normalisation == "data":
            return None
        weights = _pretrained_weights(self.arch)
        return ChannelStatistics(tuple(weights.mean), tuple(weights.std))


@register("model", "timm", TimmConfig)
def create(arch: str, num_classes: int, in_channels: int, image_size: tuple[int, int], **kwargs: Any) -> nn.Module:
    """Builds an architecture with random parameters.

    Args:
        arch: Its name.
        num_classes: Logits per sample.
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels.
        **kwargs: Further arguments of the architecture in timm.

    Raises:
        ConfigError: timm can't be imported or has no such architecture, an argument would load weights, or the
            architecture takes images of another size.
    """
    arguments = architecture_arguments(arch, num_classes, in_channels, image_size, **kwargs)
    model: nn.Module = _timm().create_model(arch, pretrained=False, **arguments)
    return model


def architecture_arguments(
    arch: str, num_classes: int, in_channels: int, image_size: tuple[int, int], **kwargs: Any
) -> dict[str, Any]:
    """The arguments of :func:`create`, as timm names them.

    Raises:
        ConfigError: As :func:`create`.
    """
    weights = _pretrained_weights(arch)
    timm = _timm()
    for name in inspect.signature(timm.create_model).parameters.keys() & kwargs.keys():
        problem = "is not for the architecture; init.weights=FILE starts from weights"
        raise ConfigError(f"model.kwargs.{name}", kwargs[name], problem)
    arguments = {"num_classes": num_classes, "in_chans": in_channels, **kwargs}
    if "img_size" in keywords(timm.models.model_entrypoint(arch)).parameters:
        arguments = {"img_size": image_size, **arguments}
    elif weights.fixed_input_size and image_size != tuple(weights.input_size[1:]) and "img_size" not in kwargs:
        needed, given = ("x".join(map(str, size)) for size in (weights.input_size[1:], image_size))
        raise ConfigError("model.arch", arch, f"takes images of {needed} pixels alone, and the data set's have {given}")
    return arguments


def _pretrained_weights(arch: str) -> Any:
    """What timm knows of an architecture's weights: the size and normalisation of their images.

    Raises:
        ConfigError: timm can't be imported, or has no such architecture.
    """
    timm = _timm()
    if not timm.is_model(arch):
        close = difflib.get_close_matches(arch.lower(), timm.list_models(), n=3, cutoff=0.5)
        problem = "timm has no such architecture; python -c 'import timm; print(timm.list_models())' lists all"
        raise ConfigError("model.arch", arch, problem, meant=close)
    try:
        return timm.get_pretrained_cfg(arch)
    except RuntimeError as error:
        name = arch.partition(".")[0]
        raise ConfigError("model.arch", arch, f"{str(error).rstrip('.')}; without a tag it is {name}") from error


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise _not_importable(error) from error
        raise ConfigError("model.name", "timm", "timm is not installed; pip install 'distrain[timm]'") from error
    except Exception as error:  # compiled parts of torchvision that don't fit torch raise errors of several kinds
        raise _not_importable(error) from error
    return timm


def _not_importable(error: Exception) -> ConfigError:
    problem = f"timm can't be imported ({type(error).__name__}: {error})"
    way_out = f"it needs a torchvision made for torch {torch.__version__}, and pip install 'distrain[timm]' finds one"
    return ConfigError("model.name", "timm", f"{problem}; {way_out}")
