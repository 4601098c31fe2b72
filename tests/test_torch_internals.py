"""What replaces torch's private names where a torch does not have them gives the same results."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from distrain import torch_internals

PACKAGE = Path(torch_internals.__file__).parent


class Hidden:
    """An object without some of its attributes."""

    def __init__(self, wrapped: Any, *hidden: str) -> None:
        self._wrapped, self._hidden = wrapped, hidden

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(name)
        return getattr(self._wrapped, name)


@pytest.fixture(params=["torch's", "fallback"])
def is_fallback(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "fallback":
        for name in ("_foreach_lerp_", "_foreach_copy_", "_foreach_mul", "_foreach_add_", "_foreach_norm"):
            monkeypatch.delattr(torch, name)
        monkeypatch.delattr(pipelining._backward, "stage_backward_input")
        monkeypatch.delattr(dist.distributed_c10d, "_get_process_group_store")
    return bool(request.param == "fallback")


def test_several_tensors_are_interpolated_and_copied(is_fallback: bool) -> None:
    tensors, ends = [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), torch.zeros(2, 2)]
    torch_internals.foreach_lerp(tensors, ends, 0.25)
    assert [float(tensor.mean()) for tensor in tensors] == [0.25, 0.75]
    torch_internals.foreach_copy(tensors, ends)
    assert all(torch.equal(*pair) for pair in zip(tensors, ends, strict=True))


def test_operations_have_an_argument_for_each_tensor_or_for_all(is_fallback: bool) -> None:
    tensors = [torch.ones(3), torch.full((2, 2), 2.0)]
    scaled = torch_internals.foreach("mul", tensors, [3.0, 4.0])
    assert [float(tensor.mean()) for tensor in scaled] == [3.0, 8.0]
    assert torch_internals.foreach("add_", tensors, scaled, alpha=10)[0] is tensors[0]
    assert [float(tensor.mean()) for tensor in tensors] == [31.0, 82.0]
    assert [float(norm) for norm in torch_internals.foreach("norm", tensors)] == pytest.approx([31 * 3**0.5, 164.0])


@pytest.mark.parametrize("hidden", [(), ("_version",)])
def test_a_write_changes_the_count(hidden: tuple[str, ...]) -> None:
    tensor = torch.arange(4.0)
    wrapped: Any = Hidden(tensor, *hidden)
    before = torch_internals.write_count(wrapped)
    assert torch_internals.write_count(wrapped) == before
    tensor[2] = 7
    assert torch_internals.write_count(wrapped) != before


@pytest.mark.parametrize("hidden", [(), ("_is_view",)])
def test_a_view_is_known(hidden: tuple[str, ...]) -> None:
    leaf = torch.ones(4, requires_grad=True)
    assert torch_internals.is_view(Hidden((leaf * 2).view(2, 2), *hidden))  # type: ignore[arg-type]
    assert not torch_internals.is_view(Hidden(leaf, *hidden))  # type: ignore[arg-type]


def test_tensors_of_one_memory_have_one_storage_id() -> None:
    tensor = torch.ones(4)
    assert torch_internals.storage_id(tensor) == torch_internals.storage_id(tensor[1:])
    assert torch_internals.storage_id(tensor) != torch_internals.storage_id(tensor.clone())

    class OldStorage:
        def untyped_storage(self) -> Any:
            return Hidden(tensor.untyped_storage(), "_cdata")

    old: Any = OldStorage()
    assert torch_internals.storage_id(old) == tensor.data_ptr()


class OldModule(nn.Sequential):
    """A module without private methods and registries, as seen from outside."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("_apply", "_load_from_state_dict", "_forward_hooks", "_load_state_dict_pre_hooks"):
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("make", [nn.Sequential, OldModule])
def test_every_parameter_and_buffer_is_replaced_and_parameters_stay_the_same_objects(
    make: Callable[..., nn.Module],
) -> None:
    model = make(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = list(model.parameters())
    torch_internals.apply_to_tensors(model, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64, torch.int64}
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))


def test_a_module_that_may_load_in_its_own_way_is_known() -> None:
    plain, own = nn.Linear(2, 2), nn.Linear(2, 2)
    own.register_load_state_dict_post_hook(lambda module, keys: None)
    assert [torch_internals.loads_in_its_own_way(module) for module in (plain, own)] == [False, True]
    assert torch_internals.loads_in_its_own_way(OldModule())
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, inputs, output: None)
    assert [torch_internals.has_hooks(module) for module in (plain, hooked)] == [False, True]
    assert torch_internals.registered_names(nn.BatchNorm1d(2)) == [
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]


def test_gradients_of_inputs_and_parameters_come_in_two_parts(is_fallback: bool) -> None:
    split: Any = torch_internals.split_backward()
    assert isinstance(split, torch_internals.TorchSplitBackward) is not is_fallback
    torch.manual_seed(0)
    twice = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), twice, nn.Linear(4, 4), nn.Tanh(), twice, nn.Linear(4, 2))
    value, gradient = torch.randn(5, 3, requires_grad=True), torch.randn(5, 2)
    model(value).backward(gradient)
    expected = [value.grad, *(parameter.grad for parameter in model.parameters())]
    value = value.detach().requires_grad_()
    model.zero_grad()
    (first, *_), rest = split.stage_backward_input([model(value)], [gradient], [value], model.parameters())
    split.stage_backward_weight(model.parameters(), rest)
    for ours, torchs in zip([first, *(parameter.grad for parameter in model.parameters())], expected, strict=True):
        assert isinstance(ours, Tensor)
        assert isinstance(torchs, Tensor)
        torch.testing.assert_close(ours, torchs)


def test_the_tensors_of_operations_are_observed_or_an_error_says_that_they_are_not(
    is_fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, noted = nn.Linear(3, 2), set[int]()

    def note(tensor: Tensor) -> None:
        noted.add(torch_internals.storage_id(tensor))

    if is_fallback:
        monkeypatch.setattr(torch_internals, "DispatchMode", nullcontext)
        with pytest.raises(NotImplementedError, match="can't observe operations"):
            torch_internals.observe_operations(note)
        return
    with torch_internals.observe_operations(note):
        layer(torch.ones(4, 3))
    # The operation gets a transposed view of the weight.
    assert {torch_internals.storage_id(layer.weight), torch_internals.storage_id(layer.bias)} <= noted


def test_a_group_without_private_names_has_torchs_usual_timeout_and_no_store(is_fallback: bool) -> None:
    group: Any = object()
    assert torch_internals.group_timeout(group) == 1800
    if is_fallback:
        with pytest.raises(OSError, match="does not tell the store"):
            torch_internals.group_store(group)


def test_no_other_module_uses_a_private_name_of_torch() -> None:
    private = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.stem != "torch_internals"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.ImportFrom) and uses_private_name(node)
    ]
    assert private == []


def uses_private_name(node: ast.Attribute | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        return names[0] == "torch" and any(name.startswith("_") for name in names)
    known = ("_version", "_apply", "_buffers", "_parameters", "_modules", "_metadata", "_cdata", "_is_view")
    owner = ast.unparse(node.value)
    is_private = node.attr.startswith("_") and not node.attr.startswith("__")
    of_torch = owner.partition(".")[0] in ("torch", "dist", "nn", "F")
    return is_private and (of_torch or (node.attr in known and owner != "self"))
