"""Copies of modules to try things with, so that the modules themselves stay as they are."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def trial_copy(block: nn.Module) -> Iterator[nn.Module]:
    """A copy of a block in training mode; parameters, gradients and buffers of the block itself stay as they are.

    A block that can't be copied (one with torch's old weight_norm, say) is used itself, and its buffers are restored.
    """
    try:
        trial = copy.deepcopy(block)
    except Exception:  # copying a user's module may raise anything
        with restored(block):
            yield block.train()
    else:
        yield trial.train()


@contextlib.contextmanager
def restored_attributes(block: nn.Module) -> Iterator[None]:
    """Afterwards the block and the modules in it have the attributes that they had before."""
    attributes = [(module, dict(vars(module))) for module in block.modules()]
    try:
        yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)


@contextlib.contextmanager
def restored(block: nn.Module) -> Iterator[None]:
    """Afterwards the block has its attributes and buffers as they were before, and its gradients."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in block.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    gradients = [(parameter, parameter.grad) for parameter in block.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with restored_attributes(block):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                setattr(module, name, buffer.copy_(values))
        for parameter, gradient in gradients:
            parameter.grad = gradient
