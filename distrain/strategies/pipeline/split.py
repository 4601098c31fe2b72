"""Where to cut a model: blocks are measured once, and the cuts with the fastest slowest stage are found exactly."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.errors import ConfigError, config_error

#: Sizes in bytes of the messages that tell a link's latency and its bandwidth.
_MESSAGES = (4096, 4 * 2**20)


@dataclass(frozen=True)
class BlockCost:
    """What one block takes for one microbatch.

    Attributes:
        name: The block's name in the model.
        parameters: Number of parameters.
        forward_ms: Forward pass.
        backward_ms: Backward pass.
        output_bytes: What it hands to the next block.
        activation_bytes: What autograd keeps for its backward pass.
    """

    name: str
    parameters: int
    forward_ms: float
    backward_ms: float
    output_bytes: int
    activation_bytes: int


def check(model: nn.Module, stages: int, boundaries: Sequence[str]) -> None:
    """Refuses a model that can't be split into so many stages, with the reason.

    Raises:
        ConfigError: As said.
    """
    if not isinstance(model, nn.Sequential):
        kind = type(model).__name__
        raise config_error(
            "model", f"{kind} is no nn.Sequential, so a pipeline doesn't know between which parts to cut"
        )
    names = [name for name, _ in model.named_children()]
    if stages > len(names):
        raise ConfigError("strategy.stages", stages, f"the model has only {len(names)} blocks to share out", names)
    for name in boundaries:
        if name not in names[1:]:
            raise ConfigError("strategy.boundaries", name, "is no block that a stage could begin with", names[1:])
    if boundaries and [names.index(name) for name in boundaries] != sorted({names.index(name) for name in boundaries}):
        raise ConfigError("strategy.boundaries", list(boundaries), "must come in the model's order, each once")
    if boundaries and len(boundaries) != stages - 1:
        problem = f"{stages} stages have {stages - 1} boundaries, not {len(boundaries)}"
        raise ConfigError("strategy.boundaries", list(boundaries), problem)
    cuts = allowed_cuts(model)
    if len(cuts) < stages - 1:
        raise ConfigError(
            "strategy.stages", stages, f"blocks that share parameters must stay together, which leaves {len(cuts)} cuts"
        )
    for name in boundaries:
        if names.index(name) not in cuts:
            raise ConfigError("strategy.boundaries", name, "lies between blocks that share a parameter")


def allowed_cuts(model: nn.Sequential) -> list[int]:
    """Positions of blocks that a stage may begin with: no parameter is used on both sides."""
    blocks = list(model.children())
    found = []
    for cut in range(1, len(blocks)):
        before = {id(p) for block in blocks[:cut] for p in block.parameters()}
        if not any(id(p) in before for block in blocks[cut:] for p in block.parameters()):
            found.append(cut)
    return found


def measure(
    model: nn.Sequential,
    images: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
    repeats: int = 5,
) -> list[BlockCost]:
    """Times each block's forward and backward pass on a real microbatch.

    Works on copies, so that neither parameters, nor gradients, nor running statistics change.

    Args:
        model: The whole model on its device.
        images: A microbatch, ``[N, C, H, W]``.
        autocast: What forward passes run in.
        repeats: The median of so many runs is taken, after one to warm up.
    """
    costs = []
    x = images
    for name, block in model.named_children():
        trial = copy.deepcopy(block).train()
        forwards, backwards = [], []
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        for repeat in range(repeats + 1):
            inputs = x.detach().requires_grad_(x.is_floating_point())
            start = _now(x.device)
            kept = 0
            with autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = trial(inputs)
            middle = _now(x.device)
            output.backward(torch.ones_like(output))
            end = _now(x.device)
            if repeat:
                forwards.append(1000 * (middle - start))
                backwards.append(1000 * (end - middle))
        costs.append(
            BlockCost(
                name,
                sum(p.numel() for p in block.parameters()),
                sorted(forwards)[repeats // 2],
                sorted(backwards)[repeats // 2],
                output.numel() * output.element_size(),
                kept,
            )
        )
        x = output.detach()
    return costs


def measure_point_to_point(line: Communicator, device: torch.device, repeats: int = 3) -> tuple[float, float]:
    """Times messages between the first two ranks of a pipeline; all its ranks call it together.

    Returns:
        Milliseconds that any message takes, and milliseconds a byte takes besides; 0 on ranks that took no part.
    """
    found = []
    for size in _MESSAGES:
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        best = math.inf
        line.barrier()
        for _ in range(repeats if line.rank < 2 else 0):
            start = _now(device)
            # There and back.
            for sender in (0, 1):
                if line.rank == sender:
                    line.start_send(buffer, 1 - sender, tag=0).wait()
                else:
                    line.start_receive(buffer, sender, tag=0).wait()
            best = min(best, 1000 * (_now(device) - start) / 2)
        found.append(best if line.rank < 2 else 0.0)
    a_byte = max(found[1] - found[0], 0.0) / (_MESSAGES[1] - _MESSAGES[0])
    return max(found[0] - a_byte * _MESSAGES[0], 0.0), a_byte


def table(costs: Sequence[BlockCost], starts: Sequence[int], where: Sequence[int]) -> list[dict[str, Any]]:
    """What each stage holds and takes, one row a stage."""
    rows = []
    for stage, start in enumerate(starts):
        stop = starts[stage + 1] if stage + 1 < len(starts) else len(costs)
        part = costs[start:stop]
        rows.append(
            {
                "stage": stage,
                "rank": where[stage],
                "blocks": [cost.name for cost in part],
                "parameters": sum(cost.parameters for cost in part),
                "forward_ms": round(sum(cost.forward_ms for cost in part), 3),
                "backward_ms": round(sum(cost.backward_ms for cost in part), 3),
                "activation_mb": round(sum(cost.activation_bytes for cost in part) / 2**20, 3),
                "output_mb": round(part[-1].output_bytes / 2**20, 3),
            }
        )
    return rows


def described(rows: Sequence[dict[str, Any]]) -> str:
    """The table as people read it, one line a stage."""
    lines = ["stage  rank  parameters  forward ms  backward ms  activation MB  blocks"]
    for row in rows:
        blocks = row["blocks"]
        named = blocks[0] if len(blocks) == 1 else f"{blocks[0]} … {blocks[-1]} ({len(blocks)})"
        lines.append(
            f"{row['stage']:5}  {row['rank']:4}  {row['parameters']:10,}  {row['forward_ms']:10.2f}  "
            f"{row['backward_ms']:11.2f}  {row['activation_mb']:13.2f}  {named}"
        )
    return "\n".join(lines)


def to_rows(costs: Sequence[BlockCost]) -> list[dict[str, Any]]:
    """The costs as plain data."""
    return [asdict(cost) for cost in costs]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
