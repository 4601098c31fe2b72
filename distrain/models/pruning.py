"""Pruning by magnitude: which weights of a model are zero, and layers that compute with those that are left.

A layer that can be pruned gets a buffer ``prune_mask`` with the shape of its weight: 0 where the weight is zero, and 1
elsewhere. It computes with weight · mask, so the gradient of a pruned weight is zero too, whatever the strategy and the
optimizer do with the parameter, which keeps its name. Checkpoints hold both; who reads one multiplies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.config.schema import LoraConfig, PruneConfig
from distrain.errors import ConfigError
from distrain.models.layers import HEAD, layer_depths, matches, unmatched

_WEIGHT, _MASK = "weight", "prune_mask"
_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def add_masks(config: PruneConfig, lora: LoraConfig, model: nn.Module) -> None:
    """Gives the layers of a model that can be pruned their masks, full of ones; nothing without ``prune.amount``.

    Args:
        config: The section ``prune``.
        lora: The section ``lora``.
        model: The unsplit model, on any device.

    Raises:
        ConfigError: A pattern of ``prune.exclude`` names no weight, no weight is left, the model has LoRA, or another
            key is set without ``prune.amount``.
    """
    if config.amount is None:
        if config.rise_epochs is not None:
            problem = "has no effect without prune.amount, such as prune.amount=0.5"
            raise ConfigError("prune.rise_epochs", config.rise_epochs, problem)
        return
    if lora.rank is not None:
        problem = "makes zeros, and the matrices of lora.rank fill them again when they are merged"
        raise ConfigError("prune.amount", config.amount, problem, ["null"])
    layers, depths = _layers(model), layer_depths(model)
    names = [*layers]
    for index, pattern in enumerate(config.exclude):
        if pattern != HEAD and not any(matches(pattern, name, depths) for name in names):
            problem = "matches no weight of a convolution or linear layer"
            raise unmatched(f"prune.exclude[{index}]", pattern, problem, names)
    pruned = [name for name in names if not any(matches(pattern, name, depths) for pattern in config.exclude)]
    if not pruned:
        problem = "the model has no convolution or linear layer outside of prune.exclude"
        raise ConfigError("prune.amount", config.amount, problem)
    for name in pruned:
        layer = layers[name]
        layer.register_buffer(_MASK, torch.ones_like(layer.get_parameter(_WEIGHT), dtype=torch.uint8))
        layer.__class__ = _masked(type(layer))


def masks_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks among parameters and buffers, by name."""
    return {name: tensor for name, tensor in state.items() if _is_mask(name)}


def choose(state: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks that leave out a share of the weights: those of smallest magnitude in the whole model.

    What has been left out stays so, and may be more than this share.

    Args:
        state: Parameters and buffers of the unsplit model by name.
        share: Of all weights that have masks.

    Returns:
        The masks by name.
    """
    masks = masks_of(state)
    magnitudes = [state[_weight_of(name)].abs().masked_fill(mask == 0, -1.0).flatten() for name, mask in masks.items()]
    joined = torch.cat(magnitudes)
    count = max(round(share * len(joined)), int((joined < 0).sum()))
    kept = torch.ones(len(joined), dtype=torch.uint8, device=joined.device)
    # Stable, so that of equal magnitudes every rank leaves out the same ones.
    kept[joined.sort(stable=True).indices[:count]] = 0
    parts = kept.split([len(each) for each in magnitudes])
    return {name: part.view(mask.shape) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def merged(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of the model without masks that computes the same.

    Args:
        tensors: Parameters and buffers by name.

    Raises:
        DamagedCheckpoint: A mask doesn't fit its weight.
    """
    if not any(_is_mask(name) for name in tensors):
        # Maybe not read yet.
        return tensors
    result = {name: tensor for name, tensor in tensors.items() if not _is_mask(name)}
    for name, mask in tensors.items():
        if _is_mask(name):
            weight = result.get(_weight_of(name))
            if weight is None or weight.shape != mask.shape:
                raise DamagedCheckpoint(f"{name} doesn't fit its weight")
            result[_weight_of(name)] = weight.masked_fill(mask == 0, 0.0)
    return result


def without_other_masks(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the masks whose names are not known."""
    return {name: tensor for name, tensor in tensors.items() if name in known or not _is_mask(name)}


def _is_mask(name: str) -> bool:
    return name.rpartition(".")[2] == _MASK


def _weight_of(mask: str) -> str:
    return mask.removesuffix(_MASK) + _WEIGHT


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers that have a weight of their own, which no other module uses, by its name."""
    holders = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get(_WEIGHT)
        if isinstance(module, _LAYERS) and weight is not None and holders[id(weight)] == 1:
            found[f"{name}.{_WEIGHT}" if name else _WEIGHT] = module
    return found


def _masked(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of layers that read their weight through the mask; it has the name of the original."""

    def weight(layer: Any) -> Tensor:
        masked: Tensor = torch_internals.own_parameter(layer, _WEIGHT) * getattr(layer, _MASK)
        return masked

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, _WEIGHT: property(weight)})
