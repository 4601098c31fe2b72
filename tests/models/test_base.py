"""A sequence of blocks runs, slices and compiles as one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distrain.models.base import BlockSequence


def three_blocks() -> BlockSequence:
    return BlockSequence({"first": nn.Linear(3, 4), "second": nn.Tanh(), "third": nn.Linear(4, 2)})


def test_blocks_run_in_order_and_name_the_parameters() -> None:
    model, images = three_blocks(), torch.randn(5, 3)
    assert torch.equal(model(images), model[2](model[1](model[0](images))))
    assert list(model.state_dict()) == ["first.weight", "first.bias", "third.weight", "third.bias"]


def test_a_slice_shares_its_blocks_and_keeps_their_names() -> None:
    model, images = three_blocks(), torch.randn(5, 3)
    head, tail = model[:1], model[1:]
    assert torch.equal(tail(head(images)), model(images))
    assert list(tail.state_dict()) == ["third.weight", "third.bias"]
    assert tail[1] is model[2]


def test_torch_compile_compiles_a_block_sequence_as_one_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model, images = three_blocks(), torch.randn(5, 3)
    torch._dynamo.reset()
    expected, names = model(images), list(model.state_dict())
    model.compile(backend=backend, fullgraph=True)
    assert torch.equal(model(images), expected)
    assert len(graphs) == 1
    assert list(model.state_dict()) == names
