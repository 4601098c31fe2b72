"""What a run says of its memory, by kind, and what it says if there is too little."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import Failed, OutOfMemory
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.world import World
from distrain.strategies import held_memory
from distrain.training.memory import MEMORY_KINDS, MIB, MemoryWatch, is_out_of_memory, memory_line
from tests.harness import run_ranks
from tests.runs import NormNet, check, compose, small, train_on_rank

NORM = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch")
RUN = ("trainer.max_steps=2", "trainer.epochs=9", "resume=never")


class Greedy(NormNet):
    """Asks for more memory than there is as soon as it gets more samples than a trial has."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, "batch")

    def forward(self, input: Tensor) -> Tensor:
        """Maps images to logits."""
        if self.training and len(input) > 2:
            input = input + torch.empty(2**50)[: input.shape[-1]]
        return super().forward(input)


def test_kinds_add_up_to_what_is_held(tmp_path: Path) -> None:
    run = run_ranks(train_on_rank, 1, small(*RUN, *NORM, "data.height=32", "data.width=32", f"run_dir={tmp_path}"))[0]
    measured = run["summary"]["memory_by_kind_mb"]["measured"]
    assert tuple(measured) == MEMORY_KINDS
    model = NormNet(3, 4, "batch")
    parameters = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    buffers = sum(buffer.nbytes for buffer in model.buffers()) / MIB
    # Adam keeps two values for each. Sums are rounded to tenths.
    expected = {"parameters": parameters + buffers, "gradients": parameters, "optimizer": 2 * parameters, "buckets": 0}
    assert {kind: measured[kind] for kind in expected} == pytest.approx(expected, abs=0.051)
    # What the first convolution returns is kept.
    assert measured["activations"] >= round(10 * 8 * 32 * 32 * 4 / MIB, 1)
    line = memory_line(run["summary"])
    assert line.startswith("parameters 0.0, gradients 0.0, optimizer 0.0, activations 0.")
    planned = {**run["summary"]["memory_by_kind_mb"], "predicted": dict.fromkeys(MEMORY_KINDS, 1.0)}
    assert memory_line({"memory_by_kind_mb": planned}) == (
        f"{line}; predicted parameters 1.0, gradients 1.0, optimizer 1.0, activations 1.0, buckets 1.0"
    )
    assert memory_line({}) == ""


@pytest.mark.parametrize(
    "keys", [("adam",), ("sgd", "optimizer.momentum=0.9"), ("sgd",), ("muon",), ("lion",)], ids=str
)
def test_an_optimizers_state_is_known_before_it_has_one(keys: tuple[str, ...]) -> None:
    config = compose(f"optimizer={keys[0]}", *keys[1:]).optimizer
    model = nn.Sequential(nn.Linear(40, 30), nn.Conv2d(5, 7, 3), nn.LayerNorm(9))

    def make(named: object) -> torch.optim.Optimizer:
        return build_optimizer(config, named, steps_per_epoch=1, total_steps=1, depths={})  # type: ignore[arg-type]

    expected = held_memory.expected_optimizer_bytes(make, model.named_parameters())
    built = make(list(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    held = held_memory.bytes_by_kind({"optimizer": held_memory.optimizer_tensors(built)})["optimizer"]
    assert expected == pytest.approx(held, abs=100)


def test_out_of_memory_is_named_and_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("model=custom", f"model._target_={__name__}.Greedy")
    with pytest.raises(Failed):
        train_on_rank(small(*RUN, *model, f"run_dir={tmp_path}"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distrain: rank 0 on ")]
    assert "failed at step 0: OutOfMemory: out of memory with 10 samples a pass, beside what the rank holds" in line
    assert "type trainer.micro_batch_size=5 or model.checkpoint_activations=all or strategy=fsdp" in line
    assert "torch says: " in line


def test_where_nothing_takes_less_memory_nothing_is_advised() -> None:
    config = small("strategy=fsdp", "strategy.shard=full", "model.checkpoint_activations=all")
    runtime: Any = SimpleNamespace(world=World(0, 2, 0, 2, "here"), device=torch.device("cpu"))
    strategy: Any = SimpleNamespace(own_modules=list, held_tensors=dict, forward_sizes=lambda *_, **__: [[1], [1]])
    batch: Any = SimpleNamespace(global_count=2)
    with pytest.raises(OutOfMemory) as caught, MemoryWatch(config, runtime, strategy).step(batch):
        raise MemoryError
    assert "(MiB: ). torch says" in str(caught.value)


FSDP = "strategy=fsdp strategy.shard=full"


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        (("ddp",), FSDP),
        (("fsdp", "shard=gradients"), "strategy.shard=full"),
        (("fsdp", "shard=full"), ""),
        (("fsdp", "shard=full", "shard_size=2"), "strategy.shard_size=null"),
        # Only ranks that hold the same can share it.
        (("mesh", "mesh.pipeline=2", "mesh.tensor=2"), FSDP),
        (("mesh", "mesh.tensor=2", "shard=optimizer"), "strategy.mesh.shard=2 strategy.shard=full"),
        # With stages shard=full would need more memory in a step, not less.
        (
            ("mesh", "mesh.data=2", "mesh.pipeline=2"),
            "strategy.mesh.data=null strategy.mesh.shard=2 strategy.shard=gradients",
        ),
        (("mesh", "mesh.shard=2", "mesh.pipeline=2"), "strategy.shard=gradients"),
        (("mesh", "mesh.shard=2", "mesh.pipeline=2", "shard=optimizer"), ""),
        (("mesh", "mesh.shard=2", "mesh.tensor=2", "shard=gradients"), "strategy.shard=full"),
        (("mesh", "mesh.data=2", "mesh.shard=2"), "strategy.mesh.data=null strategy.mesh.shard=4"),
        (("mesh", "mesh.shard=4", "shard=optimizer"), "strategy.shard=full"),
    ],
    ids=str,
)
def test_what_needs_less_memory_fits_the_strategy(keys: tuple[str, ...], advice: str) -> None:
    name, *more = keys
    options = [f"strategy={name}", *(f"strategy.{key}" for key in more)]
    assert small(*options).strategy.keys_for_less_memory(4) == advice
    # What is advised can be typed: behind the other keys, or in place of those of the strategy.
    check(small(*([] if advice == FSDP else options), *advice.split()), World(0, 4, 0, 4, "here"))


def test_what_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape"))
