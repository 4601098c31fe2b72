"""A block that is computed again gives the same bits, and leaves no trace of its second computation."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.runtime.device import RandomState, seed_everything
from distrain.strategies.batchnorm import defer_running_statistics, synchronise_batchnorm, update_running_statistics
from distrain.strategies.recomputation.block import recompute, recomputed_blocks


class Draws(nn.Module):
    """Draws from all generators, writes to a buffer and an attribute, and depends on the buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, inputs: Tensor, *, scale: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
        self.count += 1
        self.calls += 1
        factor = random.random() + np.random.rand() + self.calls  # noqa: NPY002 - as a user's model may
        hidden = nn.functional.dropout(self.linear(inputs) * factor * scale, 0.5).relu_()
        return hidden.exp(), {"more": hidden.sin()}


class Both(nn.Module):
    """Calls :class:`Draws` and adds up what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = Draws()

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self.draws(inputs, scale=0.3)
        result: Tensor = first + second["more"]
        return result


def convolutional() -> nn.Sequential:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3)]
    head = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 3)), nn.GELU())
    return nn.Sequential(nn.Sequential(*layers), head)


def synchronised() -> nn.Sequential:
    model = convolutional()
    synchronise_batchnorm(model, Communicator())
    return model


def deferred() -> nn.Sequential:
    model = convolutional()
    defer_running_statistics(model, Communicator())
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "all draws": (Both, (5, 6)),
    "BatchNorm, dropout, spectral norm": (convolutional, (5, 2, 4, 4)),
    "synchronised BatchNorm": (synchronised, (5, 2, 4, 4)),
    "deferred BatchNorm": (deferred, (5, 2, 4, 4)),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_and_no_trace(name: str, autocast: bool) -> None:
    make, shape = MODELS[name]
    plain = make()
    again = copy.deepcopy(plain)
    for path, block in again.named_children():
        recompute(path, block)
    # A copy is computed again too.
    again = copy.deepcopy(again)
    assert len(list(recomputed_blocks(again))) == len(list(plain.children()))
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert repr(again) == repr(plain)
    ends = []
    for model in (plain, again):
        seed_everything(1)
        inputs = torch.randn(shape, requires_grad=True)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(inputs)
            output.square().sum().backward()
        update_running_statistics([model])
        ends.append((inputs.grad, RandomState.now()))
    (gradient, state), (other_gradient, other_state) = ends
    assert gradient is not None
    assert other_gradient is not None
    assert torch.equal(gradient, other_gradient)
    assert state.draws_equal(other_state)
    for (key, parameter), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), key  # type: ignore[arg-type]
    for (key, buffer), same in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(buffer, same), key
    if isinstance(again, Both):
        assert again.draws.count == 3


def test_only_inputs_are_kept_and_what_is_computed_again_is_freed_as_the_backward_pass_goes_on() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    for path, block in model.named_children():
        recompute(path, block)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.randn(2, 8))
    # Not the weights either.
    assert len(kept) == 3
    output.sum().backward()
    with torch.no_grad():
        assert not model(torch.randn(2, 8)).requires_grad


def test_what_changes_between_the_passes_is_named() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    recompute("stem", block)
    inputs = torch.randn(2, 4, requires_grad=True)
    hidden = inputs * 2
    output = block(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match=r"checkpoint_activations: block stem can't be computed again: its input"):
        output.sum().backward()

    copies = iter((3, 5))

    class Odd(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.expand(next(copies), *inputs.shape).exp()

    odd = Odd()
    recompute("odd", odd)
    output = odd(torch.randn(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="block odd computes something else the second time: it keeps"):
        output.sum().backward()


def test_a_backward_pass_in_two_halves_computes_a_block_again_once() -> None:
    count = 0

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            nonlocal count
            count += 1
            result: Tensor = self.linear(inputs).tanh()
            return result

    block = Counting()
    recompute("block", block)
    inputs = torch.randn(2, 4, requires_grad=True)
    output = block(inputs).sum()
    (found,) = torch.autograd.grad(output, inputs, retain_graph=True)
    output.backward()
    assert count == 2
    assert inputs.grad is not None
    assert torch.equal(found, inputs.grad)
