"""LoRA: linear layers and 1×1 convolutions that learn by two small matrices each (Hu et al. 2021, arXiv 2106.09685).

A layer with the weight W gets two more parameters, ``lora_a`` [rank, inputs] and ``lora_b`` [outputs, rank], and
computes with W + alpha / rank · B A, while W keeps its value. B starts at zero, so the model starts as it was. The
layer keeps its class, and all other parameters their names: a forward hook adds to the layer's output.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from distrain import rng
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.config.schema import LoraConfig
from distrain.errors import ConfigError
from distrain.models.layers import HEAD, layer_depths, matches, unmatched

#: Names of the two matrices in their layer.
_A, _B = "lora_a", "lora_b"
#: Names shown in a line.
_SHOWN = 6


def add(config: LoraConfig, model: nn.Module, seed: int) -> None:
    """Gives the chosen layers of a model their matrices; does nothing without ``lora.rank``.

    Args:
        config: The section ``lora``.
        model: The unsplit model, on any device.
        seed: Of the run. The first values of a layer's A depend on it and the layer's name alone.

    Raises:
        ConfigError: A pattern names no layer that can have them, or there is no such layer, or the rank is above those
            of all layers, or another key is set without ``lora.rank``.
    """
    if config.rank is None:
        for key in ("alpha", "match"):
            if (value := getattr(config, key)) is not None:
                raise ConfigError(f"lora.{key}", value, "has no effect without lora.rank, such as lora.rank=8")
        return
    chosen = _chosen(config, model)
    most = max(min(cast(Tensor, layer.weight).shape[:2]) for layer in chosen.values())
    if config.rank > most:
        problem = f"is above {most}, the largest rank that a chosen layer's weight has"
        raise ConfigError("lora.rank", config.rank, problem)
    for name, layer in chosen.items():
        weight = cast(Tensor, layer.weight)
        outputs, inputs = weight.shape[:2]
        generator = torch.Generator("cpu").manual_seed(rng.words(f"lora {seed} {name}", 1)[0])
        uniform = torch.rand(config.rank, inputs, generator=generator, dtype=torch.float64, device="cpu")
        layer.register_parameter(_A, nn.Parameter(((2 * uniform - 1) / math.sqrt(inputs)).to(weight)))
        layer.register_parameter(_B, nn.Parameter(weight.new_zeros(outputs, config.rank)))
        layer.lora_scale = _scale(config)  # type: ignore[assignment]
        layer.register_forward_hook(_add_update, with_kwargs=True)


def frozen(config: LoraConfig, model: nn.Module) -> list[str]:
    """Names of the parameters that are never trained; empty without ``lora.rank``.

    Args:
        config: The section ``lora``.
        model: After :func:`add`.

    Raises:
        ConfigError: A pattern of ``lora.also_train`` names no parameter.
    """
    if config.rank is None:
        return []
    depths, layers = layer_depths(model), _adapted(model)
    matrices = {f"{layer}.{name}" for layer in layers for name in (_A, _B)}
    own = [name for name, _ in model.named_parameters() if name not in matrices]
    free = [name for name in own if name.removesuffix(".weight") not in layers]
    for index, pattern in enumerate(config.also_train):
        if pattern != HEAD and not any(matches(pattern, name, depths) for name in free):
            problem = "matches no parameter besides the weights of layers with LoRA"
            raise unmatched(f"lora.also_train[{index}]", pattern, problem, free)
    also = {name for name in free if any(matches(pattern, name, depths) for pattern in config.also_train)}
    return [name for name in own if name not in also]


def describe(config: LoraConfig, model: nn.Module, trained: Collection[str]) -> str:
    """Which layers have matrices, and how much of the model is trained, in one line.

    Args:
        config: The section ``lora``.
        model: After :func:`add`.
        trained: Names of the parameters that are trained in some epoch.
    """
    layers = _adapted(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrices = {f"{layer}.{name}" for layer in layers for name in (_A, _B)}
    others = [name for name in sizes if name in trained and name not in matrices]
    count = sum(sizes[name] for name in trained)
    return (
        f"LoRA of rank {config.rank}, alpha / rank = {_scale(config):g}, in {_listed([*layers])}: "
        f"{sum(sizes[name] for name in matrices):,} values; also trained: "
        f"{_listed(others) or 'nothing'} ({sum(sizes[name] for name in others):,} values); together "
        f"{100 * count / sum(sizes.values()):.3g} % of {sum(sizes.values()):,}"
    )


def merged(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of the model without LoRA that computes the same.

    Args:
        config: The section ``lora`` of the run that trained it.
        tensors: Parameters and buffers by name.

    Returns:
        The same without the matrices of layers, which their weights contain.

    Raises:
        DamagedCheckpoint: A layer's matrices don't fit its weight.
    """
    if config.rank is None:
        return tensors
    result = dict(tensors)
    for layer in _layers_in(tensors):
        a, b, weight = result.pop(f"{layer}.{_A}"), result.pop(f"{layer}.{_B}"), result.get(f"{layer}.weight")
        fits = weight is not None and a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
        if weight is None or not fits or weight.shape[:2] != (b.shape[0], a.shape[1]) or weight[:1, :1].numel() != 1:
            raise DamagedCheckpoint(f"the matrices {_A} and {_B} of {layer} don't fit its weight")
        update = _scale(config) * (b.double() @ a.double())
        result[f"{layer}.weight"] = (weight.double() + update.view(weight.shape)).to(weight.dtype)
    return result


def refuse_unmerged(tensors: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Refuses to start from the weights of a run with LoRA, which are not in its layers' weights alone.

    Args:
        tensors: The weights by name.
        model: Is to start from them.
        source: Where they are.

    Raises:
        ConfigError: Says how to merge them.
    """
    own, adapted = dict(model.named_parameters()), _adapted(model)
    layers = [layer for layer in _layers_in(tensors) if layer in adapted or f"{layer}.{_A}" not in own]
    if layers:
        problem = f"are those of a run with LoRA (in {_listed(layers)}), whose weights are not merged"
        way_out = "distrain export run=DIR output=FILE.safetensors merges them; start from that file"
        raise ConfigError("init.weights", source, f"{problem}; {way_out}")


def _scale(config: LoraConfig) -> float:
    return 1.0 if config.alpha is None or config.rank is None else config.alpha / config.rank


def _add_update(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Forward hook: the layer's output [N, …], and what its matrices make of its input."""
    inputs: Tensor = args[0] if args else kwargs["input"]
    a, b = cast(Tensor, layer.lora_a), cast(Tensor, layer.lora_b)
    scale = cast(float, layer.lora_scale)
    if isinstance(layer, nn.Conv2d):
        inner = functional.conv2d(inputs, a[:, :, None, None], stride=layer.stride)
        return output + functional.conv2d(scale * inner, b[:, :, None, None])
    return output + functional.linear(scale * functional.linear(inputs, a), b)


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with matrices by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and hasattr(module, "lora_scale")
    }


def _layers_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that have both matrices among saved tensors."""
    layers = [name.removesuffix(f".{_A}") for name in tensors if name.endswith(f".{_A}")]
    return [layer for layer in layers if f"{layer}.{_B}" in tensors]


def _chosen(config: LoraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are to have matrices, by name.

    Raises:
        ConfigError: As :func:`add`.
    """
    problems = _problems(model)
    layers = {name: module for name, module in model.named_modules() if name in problems}
    depths = layer_depths(model)
    in_head = {name for name in problems if matches(HEAD, f"{name}.weight", depths)}
    usable = [name for name, problem in problems.items() if not problem]
    if config.match is None:
        chosen = {name for name in usable if name not in in_head}
        if not chosen:
            found = [f"{name} {problem or 'belongs to the last layer'}" for name, problem in problems.items()]
            problem = "finds no linear layer or 1×1 convolution before the model's last layer"
            listed = f" ({'; '.join(found[:_SHOWN])}{' …' if len(found) > _SHOWN else ''})" if found else ""
            raise ConfigError("lora.match", None, f"{problem}{listed}")
    else:
        chosen = set()
        for index, pattern in enumerate(config.match):
            named = in_head if pattern == HEAD else set(fnmatch.filter(problems, pattern))
            if not named:
                raise unmatched(f"lora.match[{index}]", pattern, "matches no layer's name", usable)
            if not named & {*usable}:
                name = min(named)
                problem = f"names no linear layer and no 1×1 convolution: {name} {problems[name]}"
                raise ConfigError(f"lora.match[{index}]", pattern, problem, usable)
            chosen |= named & {*usable}
        if not chosen:
            raise ConfigError("lora.match", [], "names no layer", usable)
    return {name: layers[name] for name in usable if name in chosen}


def _problems(model: nn.Module) -> dict[str, str]:
    """Why each module with parameters of its own, besides the model itself, can't have matrices; empty if it can."""
    holders = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    # Its forward pass reads the weights of its submodules, and does not call them.
    silent = {
        child for module in model.modules() if isinstance(module, nn.MultiheadAttention) for child in module.children()
    }
    problems = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not name or not own:
            continue
        problems[name] = ""
        if not isinstance(module, nn.Linear | nn.Conv2d):
            problems[name] = f"is a {type(module).__name__}"
        elif isinstance(module, nn.Conv2d) and (
            module.kernel_size != (1, 1) or module.groups != 1 or module.padding not in ((0, 0), "valid", "same")
        ):
            kernel, groups, padding = module.kernel_size, module.groups, module.padding
            problems[name] = f"is a convolution with kernel {kernel}, groups {groups}, padding {padding}"
        elif type(module).forward not in (nn.Linear.forward, nn.Conv2d.forward):
            problems[name] = f"is a {type(module).__name__} with a forward of its own"
        elif "weight" not in own or any(hasattr(module, each) for each in (_A, _B)):
            problems[name] = "computes its weight from other parameters"
        elif holders[id(own["weight"])] > 1:
            problems[name] = "shares its weight with another module"
        elif module in silent:
            problems[name] = "is never called by nn.MultiheadAttention, which uses its weight alone"
    return problems


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
