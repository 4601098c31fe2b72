"""Layers that hold a part of their channels.

A layer stays the object that it was, with its name, its hooks and its type; it gets a class that is derived from its
own, and its part of each parameter. So the model's code runs as it is, and meets fewer channels where layers are
divided.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distrain import torch_internals
from distrain.strategies.tensor_parallel.attention import DividedAttention, DividedMultiheadAttention, why_no_attention
from distrain.strategies.tensor_parallel.cut import Cut, channel_sizes
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.strategies.tensor_parallel.separation import parts_compute_the_whole
from distrain.torch_internals import BatchNorm, Convolution, Dropout, InstanceNorm

Role = Literal["column", "row", "channels", "attention"]


@dataclass(frozen=True)
class Division:
    """How a module is divided.

    Attributes:
        role: ``column``: by output channels, for an input that is whole. ``row``: by input channels, for an input that
            is divided, with an output that is whole. ``channels``: input and output are divided, channel by channel.
            ``attention``: by heads.
        blocks: Channels are divided between so many blocks of equal size only.
        dim: Of a dropout layer's input, the dimension of the channels.
        channels: Of a dropout layer's whole input.
    """

    role: Role
    blocks: int
    dim: int = 1
    channels: int = 0


class _Column(nn.Module):
    ranks: LayerGroup

    @override
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(self.ranks.enter(input))
        return output


class _ColumnLinear(_Column, nn.Linear):
    pass


class _ColumnConv1d(_Column, nn.Conv1d):
    pass


class _ColumnConv2d(_Column, nn.Conv2d):
    pass


class _ColumnConv3d(_Column, nn.Conv3d):
    pass


class _RowLinear(nn.Linear):
    ranks: LayerGroup

    @override
    def forward(self, input: Tensor) -> Tensor:
        output = self.ranks.leave(F.linear(input, self.weight))
        # Once, and not on each rank; not in place, since under autocast the sum may have fewer bits than the bias.
        bias: Tensor | None = self.bias
        return output if bias is None else output + bias.to(output.dtype)


class _RowConv(Convolution):
    ranks: LayerGroup

    @override
    def forward(self, input: Tensor) -> Tensor:
        output = self.ranks.leave(self._conv_forward(input, self.weight, None))
        if self.bias is None:
            return output
        return output + self.bias.to(output.dtype).view(-1, *[1] * len(self.kernel_size))


class _RowConv1d(_RowConv, nn.Conv1d):
    pass


class _RowConv2d(_RowConv, nn.Conv2d):
    pass


class _RowConv3d(_RowConv, nn.Conv3d):
    pass


class _DividedDropout(Dropout):
    """Draws for all channels, as one process does, and uses the draws of this rank's."""

    ranks: LayerGroup
    division: Division

    @override
    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        dim, channels = self.division.dim, self.division.channels
        sizes = channel_sizes(channels, self.division.blocks, self.ranks.size)
        rank = self.ranks.rank
        if input.shape[dim] != sizes[rank]:
            raise ValueError(f"dropout of {sizes[rank]} of {channels} channels got {list(input.shape)}")
        shape = list(input.shape)
        shape[dim] = channels
        layout = self.ranks.layout_of(len(shape))
        ones = torch.ones(shape, dtype=input.dtype, device=input.device).contiguous(memory_format=layout)
        factors: Tensor = super().forward(ones)
        return input * factors.narrow(dim, sum(sizes[:rank]), sizes[rank])


class _DividedDropoutOfElements(_DividedDropout, nn.Dropout):
    pass


class _DividedDropout1d(_DividedDropout, nn.Dropout1d):
    pass


class _DividedDropout2d(_DividedDropout, nn.Dropout2d):
    pass


class _DividedDropout3d(_DividedDropout, nn.Dropout3d):
    pass


_COLUMN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _ColumnLinear,
    nn.Conv1d: _ColumnConv1d,
    nn.Conv2d: _ColumnConv2d,
    nn.Conv3d: _ColumnConv3d,
}
_ROW: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _RowLinear,
    nn.Conv1d: _RowConv1d,
    nn.Conv2d: _RowConv2d,
    nn.Conv3d: _RowConv3d,
}
DROPOUTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: _DividedDropoutOfElements,
    nn.Dropout1d: _DividedDropout1d,
    nn.Dropout2d: _DividedDropout2d,
    nn.Dropout3d: _DividedDropout3d,
}
#: Layers with weights that can be divided by output or by input channels.
WEIGHT_LAYERS = tuple(_COLUMN)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Normalisations whose channels, or groups of them, don't depend on each other, and the dimensions of their images.
_CHANNEL_NORMS = {
    nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3,
    nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3, nn.GroupNorm: 2,
}  # fmt: skip


def blocks_of(module: nn.Module, role: Role) -> int:
    """Into how many blocks a module's channels can be divided at most."""
    if role == "attention":
        return int(module.num_heads)  # type: ignore[arg-type]
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, BatchNorm | InstanceNorm):
        return int(module.num_features)
    assert isinstance(module, WEIGHT_LAYERS), "the role was checked"
    if role == "channels":
        return int(module.groups)  # type: ignore[arg-type]
    linear = isinstance(module, nn.Linear)
    sizes = (module.out_features, module.in_features) if linear else (module.out_channels, module.in_channels)
    return int(sizes[role == "row"])  # type: ignore[arg-type]


def why_not(module: nn.Module, role: Role) -> str:
    """Why a module can't have a role; empty if it can."""
    kind = type(module).__name__
    if role == "attention":
        return why_no_attention(module)
    if hasattr(module, "parametrizations"):
        return f"is a parametrised {kind}, whose weight is computed from other tensors"
    if role == "channels":
        grouped = type(module) in CONVOLUTIONS and module.groups != 1
        fits = grouped or is_channel_norm(module)
        return "" if fits else f"is a {kind}; BatchNorm, InstanceNorm, GroupNorm and grouped convolutions fit"
    if type(module) not in WEIGHT_LAYERS:
        return f"is a {kind}; Linear, Conv1d, Conv2d and Conv3d fit"
    if getattr(module, "groups", 1) != 1:
        return "is a grouped convolution, whose groups are divided by channels"
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return "" if "weight" in own else f"is a {kind} whose weight is computed from other tensors"


def is_channel_norm(module: nn.Module) -> bool:
    """Whether a module normalises, and can be divided channel by channel.

    A class that is derived from torch's may do more, such as timm's with an activation function: whether each part
    computes what the whole module computes for its channels is tried.
    """
    if type(module) in _CHANNEL_NORMS:
        return True
    dims = next((dims for kind, dims in _CHANNEL_NORMS.items() if isinstance(module, kind)), 0)
    if not dims or torch_internals.has_hooks(module) or not torch_internals.has_plain_state(module):
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if len(own) < len([*module.parameters(), *module.buffers()]) or any(tensor.dim() > 1 for tensor in own):
        return False
    return blocks_of(module, "channels") > 1 and _is_that_of_parts(module, dims)


def _is_that_of_parts(module: nn.Module, dims: int) -> bool:
    """Whether two halves of a normalisation give what it gives.

    Args:
        module: The normalisation; the trial runs copies of it.
        dims: Number of dimensions of the images that it normalises.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = blocks_of(module, "channels")
    try:
        whole = copy.deepcopy(module).to_empty(device="cpu").double()
        with torch.no_grad():
            for tensor in (*whole.parameters(), *whole.buffers()):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
        channels = int(getattr(whole, "num_features", 0) or whole.num_channels)  # type: ignore[arg-type]
        images = torch.randn(2, channels, *[3] * dims, generator=generator, dtype=torch.float64)
        parts = [copy.deepcopy(whole) for _ in range(2)]
        for rank, part in enumerate(parts):
            for name, cut in _divide_channels(part, blocks, rank, len(parts)).items():
                _keep_part(part, name, cut, rank)
        return parts_compute_the_whole(whole, parts, images.split(channel_sizes(channels, blocks, len(parts)), 1), 1)
    except Exception:  # a user's module may raise anything
        return False


def divide(model: nn.Module, divisions: Mapping[str, Division], group: LayerGroup) -> dict[str, Cut]:
    """Leaves of each divided module what this rank has of it; all ranks call it with the same arguments.

    Args:
        model: The whole model.
        divisions: By the names of modules. They fit to each other: where one ends with divided channels, the next one
            expects them.
        group: The ranks.

    Returns:
        How parameters and buffers were cut, by name.
    """
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        # In evaluation its own code reads its weights, which it has a part of only.
        torch.backends.mha.set_fastpath_enabled(False)
    cuts: dict[str, Cut] = {}
    for name, division in divisions.items():
        module = model.get_submodule(name)
        divided = _divide_attention if division.role == "attention" else _divide_layer
        found = divided(module, division, group)
        for key, cut in found.items():
            _keep_part(module, key, cut, group.rank)
        if division.role == "attention" and not isinstance(module, nn.MultiheadAttention):
            _replace(model, module, DividedAttention(module, group))
        cuts |= {f"{name}.{key}": cut for key, cut in found.items()}
    return cuts


def _divide_layer(module: nn.Module, division: Division, group: LayerGroup) -> dict[str, Cut]:
    """Gives a layer its class and its numbers of channels; returns how its tensors are to be cut."""
    kind, blocks = type(module), division.blocks
    if kind in DROPOUTS:
        _become(module, DROPOUTS[kind], group)
        module.division = division  # type: ignore[assignment]
        return {}
    role = division.role
    if role == "channels":
        return _divide_channels(module, blocks, group.rank, group.size)
    _become(module, (_COLUMN if role == "column" else _ROW)[kind], group)
    cut_tensors = ("weight", "bias") if role == "column" else ("weight",)
    tensors = {name: getattr(module, name) for name in cut_tensors if getattr(module, name) is not None}
    names = ("out_features", "out_channels") if role == "column" else ("in_features", "in_channels")
    _keep_numbers(module, names, blocks, group.rank, group.size)
    return {name: Cut.even(tensor, int(role == "row"), blocks, group.size) for name, tensor in tensors.items()}


def _divide_channels(module: nn.Module, blocks: int, rank: int, ranks: int) -> dict[str, Cut]:
    """As :func:`_divide_layer`, for a layer of which all tensors have the channels first."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    names = ("num_features", "num_channels", "num_groups", "in_channels", "out_channels", "groups")
    _keep_numbers(module, names, blocks, rank, ranks)
    return {name: Cut.even(tensor, 0, blocks, ranks) for name, tensor in tensors.items() if tensor.dim()}


def _keep_numbers(module: nn.Module, names: Sequence[str], blocks: int, rank: int, ranks: int) -> None:
    """Makes a layer's numbers of channels those that a rank has."""
    for name in names:
        if hasattr(module, name):
            setattr(module, name, channel_sizes(getattr(module, name), blocks, ranks)[rank])


def _divide_attention(module: nn.Module, division: Division, group: LayerGroup) -> dict[str, Cut]:
    """As :func:`_divide_layer`, for the layers of an attention."""
    blocks, ranks = division.blocks, group.size
    if isinstance(module, nn.MultiheadAttention):
        _become(module, DividedMultiheadAttention, group)
        joined = dict(module.named_parameters(recurse=False))
        cuts = {name: Cut.even(tensor, 0, blocks, ranks, repeats=3) for name, tensor in joined.items()}
        return cuts | {"out_proj.weight": Cut.even(module.out_proj.weight, 1, blocks, ranks)}
    qkv, projection = module.get_submodule("qkv"), module.get_submodule("proj")
    cuts = {f"qkv.{name}": Cut.even(tensor, 0, blocks, ranks, repeats=3) for name, tensor in qkv.named_parameters()}
    of_projection = _divide_layer(projection, Division("row", blocks), group)
    return cuts | {f"proj.{name}": cut for name, cut in of_projection.items()}


def _become(module: nn.Module, kind: type[nn.Module], group: LayerGroup) -> None:
    module.__class__ = kind
    module.ranks = group  # type: ignore[assignment]


@torch.no_grad()
def _keep_part(module: nn.Module, name: str, cut: Cut, rank: int) -> None:
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    tensor = getattr(owner, key)
    part = cut.part(tensor, rank)
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(owner, key, nn.Parameter(part, requires_grad=tensor.requires_grad) if is_parameter else part)


def _replace(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is module:
                setattr(parent, name, other)
