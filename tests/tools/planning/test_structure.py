"""What is found out of a model's blocks without timing them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distrain.communication.collectives import Communicator
from distrain.runtime.live_memory import LiveMemory
from distrain.strategies.batchnorm import synchronise_batchnorm
from distrain.strategies.precision import Precision
from distrain.tools.planning.structure import BlockStructure, possible_starts, shared_looks, structures
from tests.communication.shared_memory.ranks import form_group
from tests.harness import run_ranks

FP32 = Precision("fp32", torch.device("cpu"))


def test_sizes_and_operations_by_hand() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5, bias=False))
    model[2].weight.requires_grad_(False)
    first, relu, last = structures(model, torch.randn(4, 10), FP32)
    assert first.gradients == (4 * 200, 4 * 20)
    assert (last.gradients, last.state_bytes) == ((), 4 * 100)
    assert (first.flops, relu.flops, last.flops) == (2 * 200, 0, 2 * 100)
    # A view makes no kernel.
    assert structures(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.randn(4, 2, 5), FP32)[0].kernels == 0
    assert (first.kernels, relu.kernels, last.kernels) == (1, 1, 1)
    # The first layer keeps its input, ReLU its result. The last one needs only its weight, which is no activation.
    assert (first.saved_bytes, relu.saved_bytes, last.saved_bytes) == (4 * 10, 4 * 20, 0)


def test_memory_that_several_blocks_keep_counts_once() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    first, relu, last = structures(model, torch.randn(4, 10), FP32)
    assert first.saved_bytes + relu.saved_bytes + last.saved_bytes == 4 * (10 + 20)


def test_a_parameter_of_several_blocks_counts_once() -> None:
    shared = nn.Linear(6, 6)
    first, second = structures(nn.Sequential(shared, nn.Sequential(shared, nn.BatchNorm1d(6))), torch.randn(4, 6), FP32)
    assert first.state_bytes == 4 * 42
    # Weight, bias, mean and variance, and the number of batches.
    assert (second.gradients, second.state_bytes, second.batchnorms) == ((4 * 6, 4 * 6), 4 * 24 + 8, 1)


def test_why_a_model_can_not_be_cut() -> None:
    shared = nn.Linear(6, 6)
    begins, problem = possible_starts(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 6), FP32)
    assert begins == set()
    assert "can be cut at 0 places" in problem
    assert possible_starts(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.randn(2, 6), FP32) == ({1}, "")


def test_memory_on_its_way_counts_beside_what_is_saved() -> None:
    model = nn.Sequential(nn.Linear(10, 1000, bias=False), nn.ReLU(), nn.Sigmoid(), nn.Linear(1000, 1, bias=False))
    before = [parameter.clone() for parameter in model.parameters()]
    found = structures(model, torch.randn(100, 10), FP32)
    assert [block.saved_bytes for block in found] == [40, 4000, 4000, 0]
    # In the backward passes: gradients of the output and the weight; of output and input, twice; of input and weight.
    assert [block.extra_bytes for block in found] == pytest.approx([440000, 800000, 800000, 404000], rel=0.02)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)


class DependsOnValues(nn.Module):
    """Fails without values."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * 2 if value.mean().item() > 10 else value


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("middle", [nn.MaxPool2d(2), DependsOnValues()])
def test_long_passes_are_looked_at_without_values(layout: torch.memory_format, middle: nn.Module) -> None:
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), middle)
    last = nn.Sequential(nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    model = nn.Sequential(first, last).to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(4, 3, 16, 16).to(memory_format=layout)

    def change(trial: nn.Module) -> object:
        return synchronise_batchnorm(trial, Communicator())

    weight = model[0][0].weight
    before = weight.clone()
    for own in (None, change):
        assert structures(model, images, FP32, own, needs_values=False) == structures(model, images, FP32, own)
    assert torch.equal(model[0][0].weight, before)
    assert model[0][0].weight is weight


def test_memory_of_a_block_whose_output_and_its_gradient_are_held() -> None:
    block = nn.Sequential(nn.Linear(10, 2000, bias=False), nn.GLU(), nn.ReLU())
    first, last = structures(nn.Sequential(block, nn.Linear(1000, 1)), torch.randn(100, 10), FP32)
    # The largest gradient is that of GLU's input. It comes after ReLU's backward pass, which frees both.
    assert first.extra_bytes == pytest.approx(800000, rel=0.02)
    assert first.extra_bytes_at_end == pytest.approx(800000 + 2 * 400000, rel=0.02)
    assert (first.saves_input, first.saves_output, last.saves_input) == (True, True, False)


def test_memory_that_autograd_keeps_is_followed_until_it_is_freed() -> None:
    weight = torch.ones(100, requires_grad=True)
    with LiveMemory(torch.device("cpu")) as live:
        total = (weight * 2).exp().sum()
        # The result of exp, which has no name in Python, is kept for the backward pass.
        assert live.held == 4 * 100 + 4
        assert live.restart_peak() == 4 * (100 + 100)
        total.backward()
        del total
    assert live.held == 4 * 100
    assert weight.grad is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_peak_is_that_of_torchs_allocator(layout: torch.memory_format) -> None:
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 256, 3), nn.BatchNorm2d(256), nn.ReLU()]
    model = nn.Sequential(*layers).to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(2, 3, 16, 16).to(memory_format=layout)

    def step() -> None:
        model(images).sum().backward()

    step()
    with LiveMemory(torch.device("cpu")) as live:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert live.peak == pytest.approx(peak, rel=0.1)


def look_together() -> tuple[list[int], list[list[BlockStructure]]]:
    """The ways in which this rank looks at a model, and what all ranks know of it."""
    everyone, mine = form_group(), []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def look(index: int) -> list[BlockStructure]:
        mine.append(index)
        blocks = structures(model, torch.randn(2 + index, 3, 8, 8), FP32)
        return [dataclasses.replace(block, flops=block.flops + everyone.rank / 3) for block in blocks]

    return mine, shared_looks(4, look, everyone, torch.device("cpu"))


def test_ranks_share_the_work_and_know_the_same() -> None:
    found = run_ranks(look_together, 3)
    assert [mine for mine, _ in found] == [[0, 3], [1], [2]]
    blocks = found[0][1]
    assert all(of_rank == blocks for _, of_rank in found)
    assert [round(way[0].flops % 1, 2) for way in blocks] == [0.0, 0.33, 0.67, 0.0]
    assert blocks[0][0].gradients == (4 * 3 * 9 * 4, 4 * 4)
    assert blocks[0][1].batchnorm_gradients == (0,)
