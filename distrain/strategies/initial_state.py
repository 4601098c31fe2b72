"""Ranks that begin with the same model."""

from __future__ import annotations

import json
import logging

import torch
from torch import nn

from distrain.checkpoint import module_state
from distrain.communication.collectives import Communicator, digest

log = logging.getLogger(__name__)


@torch.no_grad()
def synchronise(model: nn.Module, communicator: Communicator, device: torch.device) -> None:
    """Compares parameters and buffers by hash; if a rank's differ, all ranks take those of rank 0.

    Args:
        model: This rank's.
        communicator: The ranks, which call it together.
        device: On which they communicate.
    """
    state = module_state.read(model)
    plain = torch.frombuffer(bytearray(json.dumps(state.to_plain()).encode()), dtype=torch.uint8)
    mine = digest([*state.tensors.values(), plain]).to(device)
    hashes = [int(each) for each in communicator.all_gather(mine)]
    strays = [rank for rank, each in enumerate(hashes) if each != hashes[0]]
    if strays:
        log.warning("the initial parameters of ranks %s differ from those of rank 0, which all ranks use", strays)
        tensors = communicator.merge_tensors(state.tensors, device)
        module_state.load(model, tensors, communicator.all_gather_json(state.to_plain(), device)[0])
