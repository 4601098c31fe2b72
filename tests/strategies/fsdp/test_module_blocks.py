"""Parameters belong to the smallest call that contains their uses, and blocks are divided by size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distrain.strategies.fsdp.module_blocks import Call, ModuleBlock, choose_blocks, observe
from tests.strategies.fsdp.models import Transformer


def calls(call: Call) -> dict[str, list[str]]:
    """The parameters of each call by the module's name."""
    found = {call.module: call.parameters} if call.parameters else {}
    for each in call.calls:
        found |= calls(each)
    return found


def test_a_parameter_belongs_to_the_smallest_call_around_all_its_uses() -> None:
    model = Transformer(3, 4)
    state = torch.get_rng_state()
    found = calls(observe(model, torch.zeros(2, 3, 8, 8))[0])
    assert torch.equal(torch.get_rng_state(), state)
    # Read by the model itself, or used twice in it.
    assert set(found[""]) == {"embed.weight", "token", "positions", "scale.weight", "scale.bias"}
    # Attention reads its projection's weight without calling it.
    assert "blocks.0.self_attn.out_proj.weight" in found["blocks.0.self_attn"]
    assert found["blocks.1.linear2"] == ["blocks.1.linear2.weight", "blocks.1.linear2.bias"]
    assert sum(map(len, found.values())) == len(list(model.parameters()))


class Unfinished(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.unused = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        normalised: Tensor = self.norm(inputs)
        return normalised


def test_observing_changes_no_buffer_and_what_is_unused_belongs_to_the_model() -> None:
    model = Unfinished()
    root, problem = observe(model, torch.randn(2, 4))
    assert (calls(root)[""], problem) == (["unused.weight", "unused.bias"], "")
    assert model.norm.num_batches_tracked is not None
    assert int(model.norm.num_batches_tracked) == 0


def test_a_model_that_fails_is_one_block_and_the_reason_is_told() -> None:
    root, problem = observe(nn.Linear(3, 3), torch.randn(2, 4))
    assert root.parameters == ["weight", "bias"]
    assert "RuntimeError" in problem


def test_blocks_are_divided_where_they_are_too_large_and_small_neighbours_are_joined() -> None:
    def linear(name: str) -> Call:
        return Call(name, parameters=[f"{name}.w"])

    middle = Call("b", [linear("b.0"), linear("b.1")], ["b.scale"])
    root = Call("", [linear("a"), middle, Call("act"), linear("c"), linear("d")], ["token"])
    sizes: dict[str, Any] = {"a.w": 4, "b.scale": 1, "b.0.w": 6, "b.1.w": 6, "c.w": 3, "d.w": 3, "token": 1}

    def modules(limit: float) -> list[tuple[str, ...]]:
        return [block.modules for block in choose_blocks(root, sizes, limit)]

    assert modules(100) == [("",)]
    assert modules(13) == [("",), ("a",), ("b",), ("c", "d")]
    assert modules(7) == [("",), ("a",), ("b",), ("b.0",), ("b.1",), ("c", "d")]
    assert choose_blocks(root, sizes, 1)[0] == ModuleBlock(("",), ("token",))
    names = [name for block in choose_blocks(root, sizes, 1) for name in block.parameters]
    assert sorted(names) == sorted(sizes)
