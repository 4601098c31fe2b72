"""What is found out of a model's blocks without timing them."""

from __future__ import annotations

import torch
from torch import nn

from distrain.strategies.precision import Precision
from distrain.tools.planning.structure import possible_starts, structures

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
