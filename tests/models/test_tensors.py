"""Parameters and buffers are laid out densely where that changes nothing, and refused in one line elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.models.tensors import cast_tensors, convert, lay_out_densely


def holding(buffers: dict[str, Tensor] | None = None, **parameters: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in parameters.items():
        module.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    for name, tensor in (buffers or {}).items():
        module.register_buffer(name, tensor)
    return module


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def halves(whole: Tensor) -> nn.Module:
    return holding(a=whole[0], b=whole[1])


def twice(whole: Tensor) -> nn.Module:
    return holding(a=whole, b=whole)


def interleaved() -> nn.Module:
    both = drawn(6, 8)
    return holding(first=both[:, ::2], second=both[:, 1::2])


#: Tensors with gaps, or none, in any order of dimensions; each is equal to its contiguous copy.
SOUND: dict[str, Callable[[], nn.Module]] = {
    "every second column": lambda: holding(weight=drawn(3, 16)[:, ::2]),
    "one column": lambda: holding(weight=drawn(8, 16)[:, :1]),
    "every third row, transposed": lambda: holding(weight=drawn(9, 4)[::3].t()),
    "a corner of a kernel": lambda: holding(weight=drawn(8, 4, 5, 5)[:, :, 1:4, 1:4]),
    "a diagonal": lambda: holding(weight=drawn(5, 5).diagonal()),
    "channels last, cut": lambda: holding(weight=drawn(8, 4, 3, 3).to(memory_format=torch.channels_last)[:, :2]),
    "a buffer with gaps": lambda: holding({"mean": drawn(16)[::2]}, weight=drawn(2)),
    "whole numbers with gaps": lambda: holding({"index": torch.arange(16)[::2]}, weight=drawn(2)),
    "two parameters in each other's gaps": interleaved,
    "two halves of one tensor": lambda: halves(drawn(2, 4)),
    "a transposed one": lambda: holding(weight=drawn(3, 5).t()),
    "no elements": lambda: holding(weight=torch.empty(0, 3), other=drawn(1)),
    "a scalar": lambda: holding(weight=drawn(4)[2]),
    "a lazily conjugated buffer": lambda: holding({"phase": drawn(4, dtype=torch.cfloat).conj()}, weight=drawn(2)),
}


@pytest.mark.parametrize("case", SOUND)
def test_tensors_with_gaps_get_a_dense_layout_and_keep_their_values(case: str) -> None:
    model = SOUND[case]()
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    lay_out_densely("Net", model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        original, value = before[name]
        assert tensor is original
        assert torch.equal(tensor.detach().resolve_conj(), value.resolve_conj())
        # Each element has a place of its own, without gaps between them.
        places = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size()).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        assert tensor.numel() == 0 or int(places.max() - places.min()) == tensor.numel() - 1
        assert places.unique().numel() == tensor.numel()


def tied() -> nn.Module:
    weight = nn.Parameter(drawn(4, 8)[:, ::2])
    return nn.ModuleList([holding(weight=weight), holding(weight=weight)])


def test_tied_parameters_stay_tied() -> None:
    model = tied()
    lay_out_densely("Net", model)
    first, second = model.state_dict(keep_vars=True).values()
    assert first is second
    assert first.is_contiguous()


def shared(change: Callable[[Tensor], Tensor]) -> nn.Module:
    weight = nn.Parameter(drawn(4, 4))
    return holding({"other": change(weight.detach())}, weight=weight)


def half_of_another() -> nn.Module:
    whole = drawn(4)
    return holding(first=whole, second=whole[2:])


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "expanded": (lambda: holding(shift=torch.zeros(1).expand(8)), "elements of shift are one and the same"),
    "expanded in one dimension": (lambda: holding(w=drawn(4, 1).expand(4, 3)), "elements of w are one and the same"),
    "windows": (lambda: holding(w=drawn(9).unfold(0, 3, 1)), "elements of w are one and the same"),
    "a buffer expanded": (lambda: holding({"b": torch.ones(1).expand(3)}, w=drawn(2)), "elements of b are one and the"),
    "a buffer over a parameter": (lambda: shared(lambda w: w), "other shares memory with weight"),
    "a buffer over a part of it": (lambda: shared(lambda w: w[1:3, ::2]), "other shares memory with weight"),
    "its transpose": (lambda: shared(lambda w: w.t()), "other shares memory with weight"),
    "its bits as whole numbers": (lambda: shared(lambda w: w.view(torch.int32)), "other shares memory with weight"),
    "two parameters": (lambda: twice(drawn(4)), "b shares memory with a"),
    "half a parameter": (half_of_another, "second shares memory with first"),
    "complex": (lambda: holding(weight=drawn(3, dtype=torch.cfloat)), "weight is a complex parameter (complex64)"),
    "sparse": (lambda: holding(w=torch.eye(3).to_sparse()), "w is a sparse_coo tensor"),
    "a lazy parameter": (lambda: nn.LazyLinear(3), "weight is lazy"),
    "a lazy buffer": (lambda: nn.LazyBatchNorm1d(affine=False), "running_mean is lazy"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_laid_out_is_refused_with_a_way_out(case: str, device: str) -> None:
    make, message = REFUSED[case]
    if device == "meta" and case in ("sparse", "its bits as whole numbers"):
        pytest.skip("torch can't make one there")
    with torch.device(device):
        model = make()
    with pytest.raises(ConfigError) as caught:
        lay_out_densely("Net", model)
    assert message in str(caught.value)
    assert str(caught.value).startswith("model._target_=Net: ")
    assert "; " in str(caught.value)


@pytest.mark.parametrize(("dtype", "complex_dtype"), [(torch.float32, torch.cfloat), (torch.float64, torch.cdouble)])
def test_conversion_keeps_complex_numbers_complex_and_whole_numbers_whole(
    dtype: torch.dtype, complex_dtype: torch.dtype
) -> None:
    names = ("float16", "bfloat16", "float32", "float64", "int64", "bool", "complex64", "complex128")
    model = holding({f"of_{name}": torch.ones(2, dtype=getattr(torch, name)) for name in names}, weight=drawn(2))
    cast = cast_tensors(model, dtype)
    same = {"float32", "complex64"} if dtype == torch.float32 else {"float64", "complex128"}
    floating = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    assert set(cast) == floating - same
    assert all(f"of_{kind}" in found for kind, found in cast.items())
    convert(model, dtype)
    for name, buffer in model.named_buffers():
        expected = {"of_int64": torch.int64, "of_bool": torch.bool}.get(name, dtype)
        assert buffer.dtype == (complex_dtype if "complex" in name else expected)
    assert cast_tensors(model, dtype) == {}
