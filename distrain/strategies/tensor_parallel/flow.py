"""Finds layers that can be divided, by following activations through a recorded forward pass.

A layer with weights may be divided by output channels if all that becomes of its output keeps channels apart until
other layers sum over them: those are divided by input channels. What lies between is known not to mix channels
(activation functions, pooling, BatchNorm), or to mix them in blocks (GroupNorm, grouped convolutions), which are kept
whole. Everything else, such as an addition to an activation that is not divided, ends the attempt, and the layer stays
whole on all ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distrain import torch_internals
from distrain.strategies.pipeline.calls import (
    Call,
    Fixed,
    Trace,
    Value,
    function_name,
    leaves_of,
    states_in,
    values_in,
)
from distrain.strategies.tensor_parallel.layers import (
    CONVOLUTIONS,
    DROPOUTS,
    WEIGHT_LAYERS,
    Division,
    blocks_of,
    is_channel_norm,
    why_not,
)
from distrain.strategies.tensor_parallel.separation import keeps_channels_apart

#: Layers and functions of one tensor that compute each element from itself alone.
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Identity,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS = {
    "relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "sigmoid", "tanh", "softplus", "mish",
    "hardswish", "hardsigmoid", "hardtanh", "logsigmoid", "softsign", "clamp", "clamp_min", "clamp_max", "square",
    "abs", "neg", "exp", "sqrt", "rsqrt", "contiguous", "clone", "float", "double", "half", "bfloat16", "to",
}  # fmt: skip
_BINARY_FUNCTIONS = {"add", "sub", "mul", "div", "truediv", "iadd", "imul", "maximum", "minimum"}
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_POOL_FUNCTIONS = {
    f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)
} | {"interpolate"}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}


class _Mixed(Exception):
    """Channels are mixed, or it is not known that they are not."""


@dataclass(frozen=True)
class _Channels:
    """Where a divided activation has its channels, and how many there are on all ranks together."""

    dim: int
    count: int


@dataclass
class _Region:
    """What is divided together: the layers between the first and the last ones, and what flows between them."""

    blocks: int
    layers: dict[str, Division] = field(default_factory=dict)
    values: dict[int, _Channels] = field(default_factory=dict)

    def add(self, name: str, division: Division) -> None:
        """Adds a layer; blocks that it keeps whole are kept whole everywhere."""
        if name in self.layers:
            raise _Mixed
        self.layers[name] = division
        self.blocks = math.gcd(self.blocks, division.blocks)


def divisible(
    model: nn.Module,
    traces: list[Trace],
    kept: frozenset[str],
    ranks: int,
    together: Callable[[Collection[str]], bool] = lambda names: True,
) -> dict[str, Division]:
    """The layers that can be divided, by name, in the order in which they run.

    Args:
        model: The model.
        traces: Of its forward pass in training and in evaluation mode; what holds for one only is not divided.
        kept: Names of modules that are to stay whole.
        ranks: Number of ranks; a layer with fewer blocks is not divided.
        together: Whether layers of these names may be divided together.
    """
    flows = [_Flow(model, trace) for trace in traces]
    found: dict[str, Division] = {}
    for name in flows[0].candidates():
        if name in found or name in kept:
            continue
        regions = [flow.region(name) for flow in flows]
        if any(region is None or region != regions[0] for region in regions):
            continue
        layers = regions[0] or {}
        fits = all(division.blocks >= ranks for division in layers.values())
        if fits and together(layers) and not any(each in found or each in kept for each in layers):
            found |= layers
    return found


class _Flow:
    """A recorded forward pass as a list of calls."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._modules = dict(model.named_modules())
        self._trace = trace
        self._attention = {name for name, module in self._modules.items() if not why_not(module, "attention")}
        # Divided as a whole, whatever their classes do inside.
        self._closed = self._attention | {name for name, module in self._modules.items() if is_channel_norm(module)}
        self._calls = list(self._leaves(trace.root))
        self._output = values_in(trace.output)
        counts = Counter(call.target for call in self._calls if isinstance(call.target, str))
        self._called_once = {name for name, count in counts.items() if count == 1}
        tensors = Counter(
            id(each)
            for module in model.modules()
            for _, each in module.named_parameters(recurse=False, remove_duplicate=False)
        )
        self._tied = {each for each, count in tensors.items() if count > 1}
        #: Parameters that are used without their module.
        self._used = {name for call in self._calls for name in states_in(call.arguments)}

    def _leaves(self, call: Call) -> Iterator[Call]:
        for each in call.calls or ():
            if each.calls is None or each.target in self._closed:
                yield each
            else:
                yield from self._leaves(each)

    def candidates(self) -> list[str]:
        """Names of the modules that a region may begin with."""
        named = [str(call.target) for call in self._calls if isinstance(call.target, str)]
        return [name for name in named if self._is_free(name) and self._role_of_start(name)]

    def _role_of_start(self, name: str) -> str:
        if name in self._attention:
            return "attention"
        return "" if why_not(self._modules[name], "column") else "column"

    def _is_free(self, name: str) -> bool:
        """Whether a module, and its parameters, are used in one place only."""
        module = self._modules[name]
        own = [id(parameter) for parameter in module.parameters()]
        used = any(each == name or each.startswith(f"{name}.") for each in self._used)
        alone = name in self._called_once and not used and not self._tied.intersection(own)
        return alone and not torch_internals.has_hooks(module)

    def region(self, start: str) -> dict[str, Division] | None:
        """All that is divided with a first layer; ``None`` if it must stay whole."""
        module = self._modules[start]
        position = next(index for index, call in enumerate(self._calls) if call.target == start)
        if start in self._attention:
            if isinstance(module, nn.MultiheadAttention) and not _is_self_attention(self._calls[position]):
                return None
            return {start: Division("attention", blocks_of(module, "attention"))}
        blocks = blocks_of(module, "column")
        region = _Region(blocks)
        try:
            region.add(start, Division("column", blocks))
            linear = isinstance(module, nn.Linear)
            self._give(region, self._calls[position], _Channels(-1 if linear else 1, blocks))
            for call in self._calls[position + 1 :]:
                used = values_in(call.arguments) & region.values.keys()
                if used:
                    self._follow(region, call, used)
        except _Mixed:
            return None
        is_summed = any(division.role == "row" for division in region.layers.values())
        if not is_summed or self._output & region.values.keys():
            return None
        return {
            name: Division(each.role, region.blocks, each.dim, each.channels) for name, each in region.layers.items()
        }

    def _shape(self, number: int) -> torch.Size:
        shape = self._trace.values[number].shape
        if not shape:
            raise _Mixed
        return shape

    def _give(self, region: _Region, call: Call, channels: _Channels) -> None:
        """Notes that a call's result is divided."""
        if len(call.results) != 1 or call.results[0] is None:
            raise _Mixed
        shape = self._shape(call.results[0])
        dim = channels.dim % len(shape)
        if shape[dim] != channels.count:
            raise _Mixed
        region.values[call.results[0]] = _Channels(dim, channels.count)

    def _follow(self, region: _Region, call: Call, used: set[int]) -> None:
        """Follows divided activations through a call.

        Raises:
            _Mixed: They would have to be whole.
        """
        args, kwargs = call.arguments
        inputs = [region.values[number] for number in used]
        if isinstance(call.target, str):
            if len(args) != 1 or kwargs or not isinstance(args[0], Value):
                raise _Mixed
            self._through_module(region, call, inputs[0], self._shape(args[0].number))
            return
        name = function_name(call.target).removesuffix("_")
        others = values_in(call.arguments) - region.values.keys()
        is_fixed = any(isinstance(leaf, Fixed) for leaf in leaves_of(call.arguments))
        if others or is_fixed or states_in(call.arguments) or "out" in kwargs:
            raise _Mixed
        if name in _BINARY_FUNCTIONS and all(each == inputs[0] for each in inputs):
            ranks = {len(self._shape(number)) for number in used}
            if len(ranks) != 1:
                raise _Mixed
            self._give(region, call, inputs[0])
            return
        if len(used) != 1 or not isinstance(args[0], Value):
            raise _Mixed
        shape = self._shape(args[0].number)
        self._give(region, call, _after_function(name, args, kwargs, inputs[0], shape, self._result_shape(call)))

    def _result_shape(self, call: Call) -> torch.Size:
        return self._shape(call.results[0]) if len(call.results) == 1 and call.results[0] is not None else torch.Size()

    def _through_module(self, region: _Region, call: Call, channels: _Channels, shape: torch.Size) -> None:
        name = str(call.target)
        module, kind = self._modules[name], type(self._modules[name])
        if torch_internals.has_hooks(module):
            raise _Mixed
        if kind in _ELEMENTWISE or (kind in _POOLS and _pools_apart(kind.__name__, channels, shape)):
            self._give(region, call, channels)
        elif kind is nn.Flatten:
            start, end = int(module.start_dim), int(module.end_dim)
            self._give(region, call, _flattened(channels, shape, start, end))
        elif kind in DROPOUTS and name in self._called_once:
            region.add(name, Division("channels", channels.count, channels.dim - len(shape), channels.count))
            self._give(region, call, channels)
        elif keeps_channels_apart(module, len(shape), channels.dim):
            self._give(region, call, channels)
        elif not self._is_free(name):
            raise _Mixed
        elif not why_not(module, "channels"):
            if channels.dim != 1:
                raise _Mixed
            region.add(name, Division("channels", blocks_of(module, "channels")))
            count = int(module.out_channels) if kind in CONVOLUTIONS else channels.count
            self._give(region, call, _Channels(1, count))
        elif kind in WEIGHT_LAYERS and not why_not(module, "row"):
            if channels.dim != (len(shape) - 1 if kind is nn.Linear else 1):
                raise _Mixed
            region.add(name, Division("row", channels.count))
        else:
            raise _Mixed


def _is_self_attention(call: Call) -> bool:
    """Whether a call of torch's attention is of a kind that its replacement knows."""
    args, kwargs = call.arguments
    asks = {name for name, value in kwargs.items() if value is not None and value is not False}
    return len(args) == 3 and args[0] == args[1] == args[2] and kwargs.get("need_weights") is False and not asks


def _after_function(
    name: str, args: Any, kwargs: Any, channels: _Channels, shape: torch.Size, result: torch.Size
) -> _Channels:
    """Where the channels are after a function of one divided activation.

    Raises:
        _Mixed: It isn't known to keep them apart.
    """
    if name in _ELEMENTWISE_FUNCTIONS or name in _BINARY_FUNCTIONS:
        return channels
    if name in _POOL_FUNCTIONS and _pools_apart(name, channels, shape):
        return channels
    if name == "flatten":
        start = kwargs.get("start_dim", args[1] if len(args) > 1 else 0)
        end = kwargs.get("end_dim", args[2] if len(args) > 2 else -1)
        return _flattened(channels, shape, start, end)
    if name in ("view", "reshape"):
        sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
        # A number of channels in the code would be that of the whole activation.
        if len(sizes) == 2 and sizes[1] == -1 and len(result) == 2 and result[0] == shape[0]:
            return _flattened(channels, shape, 1, -1)
    if name in _REDUCTIONS:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(dims, int):
            dims = (dims,)
        if isinstance(dims, tuple | list) and dims and all(type(dim) is int for dim in dims):
            reduced = {dim % len(shape) for dim in dims}
            if channels.dim not in reduced:
                is_kept = len(result) == len(shape)
                before = 0 if is_kept else sum(dim < channels.dim for dim in reduced)
                return _Channels(channels.dim - before, channels.count)
    raise _Mixed


def _pools_apart(name: str, channels: _Channels, shape: torch.Size) -> bool:
    """Whether a pooling, by its name, keeps channels apart: one without a dimension of samples would pool over them."""
    dims = int(name[-2]) if name[-1] == "d" else len(shape) - 2
    return channels.dim == 1 and len(shape) == dims + 2


def _flattened(channels: _Channels, shape: torch.Size, start: int, end: int) -> _Channels:
    """Where the channels are after dimensions were flattened into one."""
    start, end = start % len(shape), end % len(shape)
    if channels.dim < start:
        return channels
    if channels.dim == start:
        # The values of a channel remain together.
        return _Channels(start, channels.count * math.prod(shape[start + 1 : end + 1]))
    if channels.dim > end:
        return _Channels(channels.dim - (end - start), channels.count)
    raise _Mixed
